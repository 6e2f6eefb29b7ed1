"""Philox words and the bits, accuracy and statistics of eps, against published vectors, numpy and theory."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

import reparam_kernels as rk
from reparam_kernels import _C, reference
from reparam_kernels.gpu.philox import normals
from reparam_kernels.ops.noise.formula import philox4x32_10, reference_noise
from tests import oracle

pytestmark = pytest.mark.usefixtures("says_where")

# The known-answer vectors for philox4x32 with 10 rounds that come with Random123 (Salmon et al., kat_vectors).
ONES = 0xFFFFFFFF
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 7, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1, -(2**63), 2**64 - 1]
EDGES = np.array([0, 1, 2, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], dtype=np.uint32)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(isa, counter, key, words):
    assert tuple(_C.test_philox(counter, key)) == words
    assert tuple(int(w) for w in oracle.philox(counter, key)) == words
    as_tensors = [torch.tensor(c) for c in counter], [torch.tensor(k) for k in key]
    assert tuple(int(w) for w in philox4x32_10(*as_tensors)) == words


def eps_of(seed, count, dtype=torch.float32):
    return rk.randn(count, seed=seed, dtype=dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_eps_bits_match_the_oracle_on_every_instruction_set(isa, seed):
    np.testing.assert_array_equal(
        eps_of(seed, 1_000_003).numpy().view(np.int32), oracle.randn(seed, 1_000_003).view(np.int32)
    )


@pytest.mark.parametrize("seed", SEEDS[-3:])
def test_eps_bits_match_the_oracle_in_triton(backend, seed):
    count = 1_000_003 if backend == "cpu" else 300_001
    np.testing.assert_array_equal(eps_of(seed, count).numpy().view(np.int32), oracle.randn(seed, count).view(np.int32))


@pytest.mark.parametrize(("negative", "positive"), [(-1, 2**64 - 1), (-(2**63), 2**63), (-7, np.uint64(2**64 - 7))])
def test_seeds_count_modulo_two_to_the_64(backend, negative, positive):
    want = oracle.randn(int(positive), 9)
    for seed in (negative, positive, torch.tensor([negative])):
        np.testing.assert_array_equal(rk.randn(9, seed=seed).numpy(), want)
        np.testing.assert_allclose(rk.reference.randn(9, seed=seed).numpy(), want, rtol=0, atol=2e-6)


def test_eps_is_exact_for_edge_words_in_every_position(isa):
    """0 gives the largest radius and 2^32 - 1 the smallest; the angles are at each quarter turn."""
    near = EDGES.astype(np.uint64)
    x, y = np.meshgrid(np.concatenate([EDGES, (near * 3 % 2**32).astype(np.uint32)]), EDGES)
    x, y = x.reshape(-1), y.reshape(-1)
    got = np.frombuffer(_C.test_box_muller(x.tobytes(), y.tobytes()), dtype=np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(got.T, oracle.box_muller(x, y))
    r, cosine, sine = oracle.exact_pair(x, y)
    assert np.isfinite(got).all()
    assert (r > 0).all()
    assert (np.abs(got[:, 0] - cosine) <= 5e-7 * r).all()
    assert (np.abs(got[:, 1] - sine) <= 5e-7 * r).all()


def test_eps_accuracy(isa):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32)
    x[: 2**16] = np.uint32(2**32 - 1) - np.arange(2**16, dtype=np.uint32)  # u near 1, whose logarithm vanishes
    x[2**16 : 2**17] = np.arange(2**16, dtype=np.uint32)
    y = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32)
    got = np.frombuffer(_C.test_box_muller(x.tobytes(), y.tobytes()), dtype=np.float32).reshape(-1, 2)
    r, cosine, sine = oracle.exact_pair(x, y)
    assert (np.abs(got[:, 0] - cosine) / r).max() <= 5e-7
    assert (np.abs(got[:, 1] - sine) / r).max() <= 5e-7
    assert np.abs(got).max() < 6.7638


@triton.jit
def window(out_ptr, seed_ptr, first_group, BLOCK: tl.constexpr):
    seed = tl.load(seed_ptr + tl.arange(0, 1)[:, None])
    groups = first_group + tl.zeros([1, 1], tl.int64)
    tl.store(out_ptr + tl.arange(0, BLOCK)[None, :], normals(seed, groups, 1, BLOCK))


@pytest.mark.parametrize("first", [2**34 - 6, 2**34 - 1, 2**34, 2**34 + 3, 2**36 + 1])
def test_eps_bits_match_the_oracle_across_the_counter_carry(isa, first):
    """Element 2^34 has counter 2^32; no tensor of that size is made."""
    expected = oracle.randn(5, 40, first=first)
    np.testing.assert_array_equal(np.frombuffer(_C.test_eps(5, first, 40), dtype=np.float32), expected)
    out = torch.zeros(64)
    window[(1,)](out, torch.tensor([5]), first // 4, BLOCK=64)
    np.testing.assert_array_equal(out.numpy()[first % 4 :][:40], expected)


def test_eps_is_the_same_for_every_dtype(backend):
    eps = eps_of(3, 1001)
    assert torch.equal(eps_of(3, 1001, torch.float64), eps.double())
    for dtype, spacing in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        # the interpreter truncates to bfloat16, and a GPU rounds
        torch.testing.assert_close(eps_of(3, 1001, dtype).float(), eps, rtol=2 * spacing, atol=6e-8)
        if backend == "cpu":
            assert torch.equal(eps_of(3, 1001, dtype), eps.to(dtype))


def test_reference_noise_is_the_formula():
    assert (reference.randn(4001, seed=9, dtype=torch.float64) - eps_of(9, 4001)).abs().max() < 5e-7 * 6.8
    x, y = oracle.words(9, 0, 1001)
    exact = np.stack(oracle.exact_pair(x, y)[1:], -1).reshape(-1)[:4001]
    noise = reference_noise(torch.tensor([9]), (4001,))
    np.testing.assert_allclose(noise.numpy(), exact, rtol=1e-12, atol=1e-12)


def test_per_item_seeds_match_separate_draws(backend):
    seeds = torch.tensor([3, 2**40, 3, 0, 77])
    whole = rk.randn(5, 3, 7, seed=seeds)
    for i, seed in enumerate(seeds.tolist()):
        assert torch.equal(whole[i], rk.randn(3, 7, seed=seed))


def test_randn_takes_the_arguments_of_torch_randn():
    assert rk.randn((2, 3), seed=1).shape == (2, 3)
    assert rk.randn([2, 3], seed=1).shape == (2, 3)
    assert rk.randn(torch.Size([2, 3]), seed=1).shape == (2, 3)
    assert rk.randn((), seed=1).shape == ()
    assert rk.randn(0, 5, seed=1).shape == (0, 5)
    assert rk.randn(3, seed=1, requires_grad=True).requires_grad
    out = torch.zeros(4, 6)[:, ::2]
    assert rk.randn(4, 3, seed=1, out=out) is out
    assert torch.equal(out, rk.randn(4, 3, seed=1))
    with pytest.raises(TypeError, match="randn: dtype must be float16"):
        rk.randn(3, dtype=torch.int32)


def test_randn_like_has_the_metadata_of_torch_and_the_noise_of_randn():
    base = torch.zeros(2, 3, 4, 5)
    for like in (
        base,
        base.to(memory_format=torch.channels_last),
        base.permute(3, 1, 0, 2),
        base.half(),
        base[..., ::2],
    ):
        for options in (
            {},
            {"dtype": torch.float64},
            {"memory_format": torch.contiguous_format, "requires_grad": True},
        ):
            eps, theirs = rk.randn_like(like, seed=3, **options), torch.randn_like(like, **options)
            assert (eps.dtype, eps.shape, eps.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
            assert eps.requires_grad == theirs.requires_grad
            assert torch.equal(eps, rk.randn(like.shape, seed=3, dtype=eps.dtype))
    with pytest.raises(TypeError, match=r"^randn_like: input"):
        rk.randn_like(base.int())


def test_manual_seed_and_generators_control_the_noise():
    torch.manual_seed(5)
    first = rk.randn(10)
    second = rk.randn(10)
    torch.manual_seed(5)
    assert torch.equal(rk.randn(10), first)
    assert not torch.equal(first, second)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(rk.randn(10, generator=generator), first)


# ---- statistics, with fixed seeds: each bound is that of a test at the 0.1 % level


@pytest.fixture(scope="module")
def many():
    return rk.randn(4_000_000, seed=2024).double().numpy()


def test_eps_is_normal_by_kolmogorov_and_smirnov(many):
    assert stats.kstest(many, "norm").pvalue > 1e-3


def test_eps_is_normal_by_chi_square(many):
    cells = np.floor(stats.norm.cdf(many) * 1000).astype(int)
    assert stats.chisquare(np.bincount(cells, minlength=1000)).pvalue > 1e-3


def test_eps_has_normal_moments_to_the_eighth(many):
    moment = {0: 1, 2: 1, 4: 3, 6: 15, 8: 105, 10: 945, 12: 10395, 14: 135135, 16: 2027025}
    for k in range(1, 9):
        mean, variance = moment.get(k, 0), moment[2 * k] - moment.get(k, 0) ** 2
        z = ((many**k).mean() - mean) / np.sqrt(variance / len(many))
        assert abs(z) < 3.3, k


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 7, 8, 16, 64, 1024])
def test_neighbours_are_uncorrelated(many, lag):
    z = (many[:-lag] * many[lag:]).mean() * np.sqrt(len(many) - lag)
    squares = ((many[:-lag] ** 2 - 1) * (many[lag:] ** 2 - 1)).mean() / 2 * np.sqrt(len(many) - lag)
    assert abs(z) < 3.3
    assert abs(squares) < 3.3


def test_neighbouring_seeds_are_uncorrelated():
    eps = rk.randn(64, 100_000, seed=torch.arange(64)).double().numpy()
    off = np.corrcoef(eps)[np.triu_indices(64, 1)] * np.sqrt(100_000)
    assert stats.kstest(off, "norm").pvalue > 1e-3


@pytest.mark.parametrize("bound", [2.0, 3.0, 4.0, 4.5])
def test_tails_hold_as_many_as_theory_says(many, bound):
    expected = 2 * stats.norm.sf(bound) * len(many)
    assert stats.poisson.cdf((np.abs(many) > bound).sum(), expected) > 5e-4
    assert stats.poisson.sf((np.abs(many) > bound).sum() - 1, expected) > 5e-4


def test_no_items_have_no_noise():
    """With a seed for each of them, on any device."""
    seeds, empty = torch.arange(0), torch.zeros(0, 3)
    for device in ("cpu", "meta"):
        found = rk.reparameterize(empty.to(device), empty.to(device), seed=seeds.to(device))
        assert found.shape == rk.randn(0, 3, seed=seeds.to(device), device=device).shape == (0, 3)
    assert rk.reference.randn(0, 3, seed=seeds).shape == (0, 3)
    assert rk.reference.reparameterize(empty, empty, seed=seeds).shape == (0, 3)
