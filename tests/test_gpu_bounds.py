"""Every access lies in its buffer, and every output element is written exactly once.

The interpreter's loads and stores are recorded. Each address that is not masked off must belong to an element of one of
the call's tensors; stores are counted. Every input also has wide margins that hold poison.
"""

import math
import mmap

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import reparam_kernels as rk
from reparam_kernels.ops.mixture import triton as mixture
from tests.conftest import forget, use_backend
from tests.launches import leaves, planned

MARGIN = 4096  # elements of poison on either side of an input


@pytest.fixture
def watched(monkeypatch):
    """Record the addresses that the kernels read and write, and the tensors that the launcher makes."""
    use_backend(monkeypatch, "triton")
    seen = {"reads": [], "writes": []}
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def note(kind, ptrs, mask):
        at = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)]
        seen[kind].append(at.astype(np.uint64).ravel())

    def watched_load(self, ptrs, mask, other, *rest):
        note("reads", ptrs, mask)
        return load(self, ptrs, mask, other, *rest)

    def watched_store(self, ptrs, value, mask, *rest):
        note("writes", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", watched_store)
    made = []
    make = torch.Tensor.new_empty

    def kept(*args, **kwargs):
        t = make(*args, **kwargs)
        if t.numel():  # the interpreter makes empty views of the same memory
            made.append(t)
        return t

    monkeypatch.setattr(torch.Tensor, "new_empty", kept)
    yield seen, made
    forget()


def fenced(shape, dtype, offset=0, pitch=None, seed=0):
    """Make a tensor between margins of poison, `offset` elements past an aligned address, its rows `pitch` apart."""
    width = shape[-1]
    pitch = pitch or width
    rows = math.prod(shape[:-1])
    base = torch.full((2 * MARGIN + offset + rows * pitch,), math.nan, dtype=dtype)
    t = base[MARGIN + offset :].as_strided((rows, width), (pitch, 1))
    g = torch.Generator().manual_seed(seed)
    t.copy_(torch.randn(rows, width, generator=g) * 0.5)
    return t.view(shape) if pitch == width else t


def addresses(t):
    """Return the address of every element of a tensor."""
    at = torch.zeros(t.shape, dtype=torch.int64)
    for i, (size, stride) in enumerate(zip(t.shape, t.stride(), strict=True)):
        step = torch.arange(size) * stride * t.element_size()
        at += step.view(-1, *[1] * (t.dim() - i - 1))
    return (at + t.data_ptr()).numpy().astype(np.uint64).ravel()


def audit(seen, inputs, outputs, scratch):
    """Check that reads lie in inputs, scratch or the seed, and that only output elements are written, each once."""
    known = np.unique(np.concatenate([addresses(t) for t in (*inputs, *scratch) if t.numel()]))
    read = np.unique(np.concatenate(seen["reads"]))
    assert np.isin(read, known, assume_unique=True).all(), "a read outside of every input"
    written = np.concatenate(seen["writes"])
    expected = np.concatenate([addresses(t) for t in (*outputs, *scratch)])
    np.testing.assert_array_equal(np.sort(written), np.sort(expected), err_msg="not every element once, and no other")


def check(watched, shape, dtype=torch.float32, offsets=(0, 0, 0), pitch=None, samples=(), **options):
    seen, made = watched
    mu = fenced(shape, dtype, offsets[0], pitch).requires_grad_()
    x = fenced(shape, dtype, offsets[1], pitch, seed=1).requires_grad_()
    dz = fenced((*samples, *mu.shape), dtype, offsets[2], seed=2)
    seed = options.pop("seed", torch.tensor([7]))
    made.clear()
    z, kl = rk.reparameterize_kl(mu, x, seed=seed, sample_shape=samples, **options)
    scratch = [t for t in made if t.data_ptr() not in (z.data_ptr(), kl.data_ptr())]
    audit(seen, [mu, x, seed], [z, kl], scratch)
    assert not z.isnan().any()
    assert not kl.isnan().any()
    for part in seen.values():
        part.clear()
    dkl = torch.ones_like(kl)
    dmu, dx = torch.autograd.grad((z, kl), (mu, x), (dz, dkl))
    audit(seen, [mu, x, seed, dz, dkl], [dmu, dx], [])
    assert not dmu.isnan().any()
    assert not dx.isnan().any()


def check_density(watched, shape, prior=False, samples=(3,), **options):
    """Check a sample with its log-density, or with the ratio of that to a prior's."""
    seen, made = watched
    inputs = [fenced(shape, torch.float32, seed=i).requires_grad_() for i in range(4 if prior else 2)]
    seed = torch.tensor([7])
    made.clear()
    if prior:
        out = rk.reparameterize_mc_kl(*inputs[:2], prior=tuple(inputs[2:]), seed=seed, sample_shape=samples, **options)
    else:
        out = rk.reparameterize_log_prob(*inputs, seed=seed, sample_shape=samples, **options)
    known = {t.data_ptr() for t in out}
    audit(seen, [*inputs, seed], out, [t for t in made if t.data_ptr() not in known])
    assert not any(t.isnan().any() for t in out)
    for part in seen.values():
        part.clear()
    incoming = [fenced(t.shape, torch.float32, seed=5 + i) for i, t in enumerate(out)]
    grads = torch.autograd.grad(out, inputs, incoming)
    audit(seen, [*inputs, seed, *incoming], grads, [])
    assert not any(t.isnan().any() for t in grads)


@pytest.mark.parametrize("kind", [{"squash": "tanh"}, {"prior": True}], ids=["tanh", "prior"])
def test_samples_with_their_log_density(watched, kind):
    for shape in ((9, 1), (5, 20), (3, 127)):
        check_density(watched, shape, samples=(2,), **kind)
        for part in watched[0].values():
            part.clear()


def test_the_log_density_of_a_row_that_is_summed_in_parts(watched):
    check_density(watched, (1, 2100), samples=())


@pytest.mark.parametrize(
    ("size", "of", "by_point"),
    [((1, 1, 1), "both", True), ((33, 31, 3), "both", True), ((3, 33, 9), "joint", False), ((33, 3, 9), "dims", False)],
)
def test_mixtures(watched, monkeypatch, size, of, by_point):
    """The launcher copies points and components, so every access must lie in a tensor that its launch was given."""
    seen, _ = watched
    items, components, cols = size
    given = {}
    real = mixture.launch

    def audited(kernel, grid, device, *arguments, **constants):
        for part in seen.values():
            part.clear()
        real(kernel, grid, device, *arguments, **constants)
        tensors = [t for t in leaves(arguments) if isinstance(t, torch.Tensor)]
        known = np.unique(np.concatenate([addresses(t) for t in tensors]))
        for kind, part in seen.items():
            assert np.isin(np.unique(np.concatenate(part)), known).all(), (
                f"{kernel.__name__}: one of the {kind} is outside"
            )
        given[kernel.__name__] = True

    monkeypatch.setattr(mixture, "launch", audited)
    shapes = (items, cols), (components, cols), (components, cols), ((items, components) if by_point else (components,))
    tensors = [fenced(shape, torch.float32, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    out = rk.mixture_log_prob(*tensors[:3], log_weights=tensors[3], of=of)
    out = out if isinstance(out, tuple) else (out,)
    grads = torch.autograd.grad(out, tensors, [torch.ones_like(t) for t in out])
    assert not any(t.isnan().any() for t in (*out, *grads))
    values = {"joint": {"joint_kernel"}, "dims": {"dims_kernel"}, "both": {"joint_kernel", "dims_kernel"}}[of]
    backward = {"points_backward_kernel", "components_backward_kernel", "finish_kernel"}
    assert set(given) == {"components_kernel", *values, *backward}


WIDTHS = [1, 3, 4, 5, 20, 127, 128, 1000, 4097]


@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_any_width(watched, width, rows):
    rows = min(rows, 5) if width > 4000 else rows
    check(watched, (rows, width))


@pytest.mark.parametrize("width", [3, 5, 20, 128, 1029])
def test_rows_that_lie_apart(watched, width):
    check(watched, (9, width), pitch=width + 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", range(16))
def test_every_alignment(watched, offset, dtype):
    check(watched, (6, 64), dtype, offsets=(offset, 3 * offset % 16, 5 * offset % 16))


@pytest.mark.parametrize("width", [4, 5, 20, 127, 1030])
def test_seeds_and_samples(watched, width):
    check(watched, (6, width), samples=(3,), seed=torch.arange(6))
    for part in watched[0].values():
        part.clear()
    check(watched, (6, width), samples=(2,))


@pytest.mark.parametrize("event_ndim", [0, 2, 3])
def test_elementwise_and_whole(watched, event_ndim):
    check(watched, (3, 5, 28), event_ndim=event_ndim)


def test_no_rows_launch_nothing(watched):
    z, kl = rk.reparameterize_kl(torch.zeros(0, 5), torch.zeros(0, 5), seed=1)
    assert z.shape == (0, 5)
    assert kl.shape == (0,)
    assert watched[0] == {"reads": [], "writes": []}


@pytest.mark.parametrize("shape", [(37, 20), (3, 2100), (5000,), (4, 3, 5)], ids=str)
def test_a_grid_of_two_dimensions_computes_the_same(monkeypatch, shape):
    """A 2-D grid is used if x cannot hold all programs; here the limit is small."""
    use_backend(monkeypatch, "triton")
    mu, x = (fenced(shape, torch.float32, seed=i).requires_grad_() for i in range(2))
    seed = torch.arange(shape[0]) if len(shape) == 3 else torch.tensor([7])

    def run():
        z, kl = rk.reparameterize_kl(mu, x, seed=seed)
        return z, kl, *torch.autograd.grad((z, kl), (mu, x), (z.detach(), kl.detach()))

    plain = run()
    with planned(grid_limit=0, grid_2d_width=4):
        two_dims = run()
    for got, want in zip(two_dims, plain, strict=True):
        assert torch.equal(got, want)
    forget()


def test_rows_that_lie_more_than_2_to_the_31_apart(watched):
    """Untouched pages of a mapping take no memory."""
    apart = 2**30
    held = torch.frombuffer(mmap.mmap(-1, 4 * (2 * apart + 20)), dtype=torch.float32)
    mu = held.as_strided((3, 20), (apart, 1))
    mu.copy_(torch.randn(3, 20))
    x = torch.randn(3, 20)
    z, kl = rk.reparameterize_kl(mu, x, seed=5)
    same = rk.reparameterize_kl(mu.clone(), x, seed=5)
    assert torch.equal(z, same[0])
    assert torch.equal(kl, same[1])


def test_packed_gradients_beside_a_gradient_of_z_that_lies_apart(watched):
    """The runs of the two differ, and only the gradient of z can be copied to rows that both have."""
    moments = (torch.arange(2 * 3 * 8 * 5.0).view(2, 3, 8, 5) / 240).requires_grad_()
    dz = (torch.arange(2 * 6 * 4 * 5.0).view(2, 6, 4, 5) / 240)[:, :3]
    z, kl = rk.DiagonalGaussian.from_moments(moments, 2, event_ndim=1).rsample_kl(seed=3)
    (got,) = torch.autograd.grad((z, kl), moments, (dz, torch.ones_like(kl)))
    mu, logvar = moments.detach().double().chunk(2, 2)
    sigma = (logvar / 2).exp()
    dx = dz * (z.detach() - mu) / 2 + (sigma**2 - 1) / 2
    torch.testing.assert_close(got.double(), torch.cat([dz + mu, dx], 2), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "width"), [(65537, 3), (65536, 20), (5, 65536), (3, 65537)])
def test_many_rows_and_huge_rows(watched, rows, width):
    check(watched, (rows, width))


def test_the_audit_sees_a_stray_read_and_a_second_write(watched):
    seen, _ = watched
    t, out = torch.zeros(8), torch.zeros(8)
    rk.reparameterize(t, t, seed=torch.tensor([1]))
    with pytest.raises(AssertionError, match="a read outside"):
        audit(seen, [t[:7]], [out], [])
    seen["reads"][:] = [addresses(t)]
    seen["writes"][:] = [addresses(out), addresses(out)[:1]]
    with pytest.raises(AssertionError, match="not every element once"):
        audit(seen, [t], [out], [])
