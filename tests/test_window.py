"""A window has the noise of the whole at its place: any part, any dims, samples, seeds, backends and transforms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reparam_kernels as rk
from reparam_kernels.core import window as windows
from reparam_kernels.gpu import launch as launcher
from reparam_kernels.gpu.plan import classify_window, window_levels, window_numbers
from reparam_kernels.ops.noise.formula import index_in_whole
from tests import oracle
from tests.cases import inputs
from tests.launches import recording
from tests.test_properties import QUIET

pytestmark = pytest.mark.usefixtures("says_where")


@st.composite
def partitions(draw, rank=5, size=7, long_rows=False):
    """Draw the shape of a whole and the boxes that a few cuts make of it, each with its start and shape."""
    whole = draw(st.lists(st.integers(1, size), min_size=1, max_size=rank))
    if long_rows:
        whole[-1] *= draw(st.sampled_from([1, 40, 300]))
    boxes = [((0,) * len(whole), tuple(whole))]
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(boxes) - 1))
        start, shape = boxes.pop(i)
        dim = draw(st.integers(0, len(whole) - 1))
        at = draw(st.integers(0, shape[dim]))
        boxes.append((start, (*shape[:dim], at, *shape[dim + 1 :])))
        moved = (*start[:dim], start[dim] + at, *start[dim + 1 :])
        boxes.append((moved, (*shape[:dim], shape[dim] - at, *shape[dim + 1 :])))
    return tuple(whole), boxes


def places(start, shape):
    return tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))


def seeds_of(kind, whole):
    return 2**40 + 7 if kind == "one" else torch.arange(whole[0]) * 2**33 - 1


@settings(QUIET, max_examples=40)
@given(st.data())
@pytest.mark.parametrize("kind", ["one", "items"])
def test_the_parts_of_a_partition_make_the_whole(kind, data):
    whole, boxes = data.draw(partitions(size=4, long_rows=True))
    seed = seeds_of(kind, whole)
    parts = torch.full(whole, math.nan)
    for start, shape in boxes:
        parts[places(start, shape)] = rk.randn(shape, seed=seed, window=(whole, start))
        reference = rk.reference.randn(shape, seed=seed, window=(whole, start))
        torch.testing.assert_close(parts[places(start, shape)], reference, rtol=0, atol=5e-6)
    assert torch.equal(parts, rk.randn(whole, seed=seed))


@pytest.mark.parametrize("kind", ["one", "items"])
def test_parts_of_the_latent_layer_are_those_of_the_whole(kind, backend):
    """z by bits and gradients to rounding, in every dim and with samples."""

    quick = backend == "cpu"  # and the interpreter is not

    @settings(QUIET, max_examples=60 if quick else 3)
    @given(
        partitions(rank=4 if quick else 3, size=5 if quick else 4),
        st.lists(st.integers(1, 3), max_size=2).map(tuple),
        st.booleans(),
    )
    def check(partition, samples, density):
        whole, boxes = partition
        seed = seeds_of(kind, whole)
        mu, x = inputs(whole, requires_grad=True)

        def run(mu, x, **window):
            options = {"seed": seed, "sample_shape": samples, "event_ndim": 0, **window}
            return (rk.reparameterize_log_prob if density else rk.reparameterize_kl)(mu, x, **options)

        z, kl = run(mu, x)
        weight = torch.arange(z.numel()).reshape(z.shape).cos()
        grads = torch.autograd.grad((z * weight).sum() + kl.sum(), (mu, x))
        for start, shape in boxes:
            at = places(start, shape)
            behind = (slice(None),) * len(samples) + at
            part = [t[at].detach().requires_grad_() for t in (mu, x)]
            part_z, part_kl = run(*part, window=(whole, start))
            assert torch.equal(part_z, z[behind])
            torch.testing.assert_close(part_kl, kl[behind if density else at], rtol=2e-6, atol=2e-6)
            part_grads = torch.autograd.grad((part_z * weight[behind]).sum() + part_kl.sum(), part)
            for got, want in zip(part_grads, grads, strict=True):
                torch.testing.assert_close(got, want[at], rtol=1e-5, atol=1e-5)

    check()


def test_every_rank_up_to_five_in_triton(monkeypatch):
    from tests.conftest import forget, use_backend

    use_backend(monkeypatch, "triton")
    try:
        whole = (3, 4, 5, 6, 7)
        want = torch.from_numpy(oracle.randn(5, math.prod(whole))).view(whole)
        for cut in range(2, 32, 3):  # which dims are cut
            start = tuple(1 if cut >> dim & 1 else 0 for dim in range(5))
            shape = tuple(size - 2 * first for size, first in zip(whole, start, strict=True))
            got = rk.randn(shape, seed=5, window=(whole, start))
            assert torch.equal(got, want[places(start, shape)]), start
    finally:
        forget()


@pytest.mark.parametrize("start", [(2**18 - 1, 2**18 + 5, 2**18), (0, 0, 3), (2**20 - 2, 7, 2**20 - 9)])
def test_indices_beyond_2_to_the_34_match_the_oracle(start, backend, isa):
    """Their counters have a high word; the whole has 2^60 elements and is never made."""
    whole, shape = (2**20,) * 3, (2, 3, 9)
    got = rk.randn(shape, seed=9, window=(whole, start))
    formula = rk.reference.randn(shape, seed=9, window=(whole, start))
    for i in range(2):
        for j in range(3):
            first = ((start[0] + i) * 2**20 + start[1] + j) * 2**20 + start[2]
            want = oracle.randn(9, 9, first=first)
            np.testing.assert_array_equal(got[i, j].numpy(), want)
            np.testing.assert_allclose(formula[i, j].numpy(), want, rtol=0, atol=5e-6)


def test_4096_ranks_of_2_to_the_40_elements():
    """The indices of each rank's corners, by the host half of the GPU launch and by the formula."""
    whole, shape, starts = (2**8, 2**12, 2**20), (2**8, 2**6, 2**14), range(64)
    for a in starts:
        for b in starts:
            start = (0, a * 2**6, b * 2**14)
            window = (whole, start)
            kind = classify_window(window, shape, 1, 1)
            levels = window_levels(kind, 1, kind.depth())
            first, group, *pairs = window_numbers(window, shape, 1, levels)
            for corner in ((0, 0, 0), (255, 63, 2**14 - 1), (3, 17, 5)):
                want = ((start[0] + corner[0]) * 2**12 + start[1] + corner[1]) * 2**20 + start[2] + corner[2]
                row, index = corner[0] * shape[1] + corner[1], first + corner[2]
                for size, stride in zip(pairs[::2], pairs[1::2], strict=True):
                    index += row % size * stride
                    row //= size
                assert index == want
                if a % 16 == b % 8 == 3:
                    local = torch.tensor((corner[0] * shape[1] + corner[1]) * shape[2] + corner[2])
                    assert index_in_whole(local, shape, window, 1) == want
            assert group == 2**40
    assert math.prod(shape) * 4096 == 2**40


def test_a_packed_posterior_and_a_head_take_a_window():
    moments = torch.randn(4, 6, 8, 8)
    whole = rk.DiagonalGaussian.from_moments(moments).rsample_kl(seed=3)
    part = rk.DiagonalGaussian.from_moments(moments[:, :, 2:7]).rsample(seed=3, window=((4, 3, 8, 8), (0, 0, 2, 0)))
    assert torch.equal(part, whole[0][:, :, 2:7])
    head, h = rk.GaussianHead(5, 4), torch.randn(6, 5)
    z, kl = head(h, seed=3)
    part_z, part_kl = head(h[4:], seed=3, window=((6, 4), (4, 0)))
    torch.testing.assert_close(part_z, z[4:])
    torch.testing.assert_close(part_kl, kl[4:])


def test_one_item_of_many_takes_its_own_seed():
    """Its index restarts, though the seed that it selects is a single one."""
    seeds = torch.arange(4) + 10
    got = rk.randn(1, 3, 5, seed=seeds, window=((4, 3, 5), (2, 0, 0)))
    assert torch.equal(got[0], rk.randn(3, 5, seed=12))


def test_vmap_is_a_loop_over_windows():
    mu, x = inputs((3, 4, 5))
    for seed in (5, torch.arange(9)):
        window = ((9, 8), (5, 2))
        got = torch.vmap(lambda mu, x, seed=seed, window=window: rk.reparameterize(mu, x, seed=seed, window=window))(
            mu, x
        )
        want = [rk.reparameterize(mu[i], x[i], seed=seed, window=window) for i in range(3)]
        torch.testing.assert_close(got, torch.stack(want))
    seeds = torch.arange(27).view(3, 9)
    for chosen in (seeds[:, :1], seeds):
        eps = torch.vmap(lambda seed: torch.ops.reparam_kernels.noise(seed, [2, 9, 5], 2, [9, 8], [0, 2]))(chosen)
        for i in range(3):
            want = torch.ops.reparam_kernels.noise(chosen[i], [2, 9, 5], 2, [9, 8], [0, 2])
            assert torch.equal(eps[i], want)


def test_the_plan_of_a_launch_does_not_hold_the_numbers_of_a_window():
    mu, x = inputs((8, 16))
    with recording() as launches:
        for start in ((0, 0), (4, 32), (900, 48)):
            rk.reparameterize_kl(mu, x, seed=1, window=((1000, 64), start))
            rk.randn(8, 16, seed=1, window=((1000, 64), start))
        assert len(launcher.PLANS) == 2
        rk.reparameterize_kl(mu, x, seed=1, window=((2000, 640), (7 * 4, 80)))
        assert len(launcher.PLANS) == 2
    assert [launch.arguments["window_ptr"].tolist() for launch in launches[:3:2]] == [
        [0, 64000, 8, 64],
        [4 * 64 + 32, 64000, 8, 64],
    ]


def test_a_whole_may_be_as_large_as_its_index():
    whole = (2**31, 2**31)
    assert windows.check("f", (whole, (2**31 - 1, 2**31 - 4)), (1, 4)) == (whole, (2**31 - 1, 2**31 - 4))
    got = rk.randn(1, 4, seed=1, window=(whole, (2**31 - 1, 2**31 - 4)))
    np.testing.assert_array_equal(got[0].numpy(), oracle.randn(1, 4, first=2**62 - 4))
