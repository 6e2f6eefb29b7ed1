"""Hypothesis: any op, shape, layout, dtype and option, the kernels against the reference in float64."""

import math
import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reparam_kernels as rk
from reparam_kernels.backends import cpu, triton
from reparam_kernels.spec import accumulate_dtype, prepare
from tests.cases import DTYPES, PARAMS, UNIT, noise

DEPTH = int(os.environ.get("FUZZ_DEPTH", "1"))  # how many times as many examples; above 1, drawn from --hypothesis-seed
QUIET = settings(
    deadline=None, derandomize=DEPTH == 1, print_blob=DEPTH > 1, database=None, suppress_health_check=list(HealthCheck)
)

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def laid_out(draw, shape, dtype, positive=False):
    """A tensor of the given shape, somewhere in a larger buffer, its dims in any order in memory."""
    seed = draw(st.integers(0, 2**32))
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    scale = draw(st.sampled_from([1e-3, 0.1, 1.0, 3.0]))
    g = torch.Generator().manual_seed(seed)
    buffer = torch.randn([shape[i] * step[i] for i in order], generator=g, dtype=torch.float64) * scale
    if positive:
        buffer = buffer.abs() + 0.05
    t = buffer.to(dtype).permute([order.index(i) for i in range(len(shape))])
    for dim, k in enumerate(step):
        t = t[(slice(None),) * dim + (slice(None, None, k),)]
    assert t.shape == shape
    return t


@st.composite
def calls(draw):
    shape = draw(shapes)
    dtype = draw(st.sampled_from(DTYPES))
    param = draw(st.sampled_from(PARAMS))
    options = {"param": param}
    if param == "softplus":
        options["min_std"] = draw(st.sampled_from([0.0, 1e-4, 0.1, 1.0, 2.0]))
    if draw(st.booleans()):
        low = draw(st.sampled_from([0.25, 0.5, -math.inf]))
        options["clamp"] = (low, draw(st.sampled_from([0.75, 2.0, math.inf])))
    mu = draw(laid_out(shape, dtype))
    x = draw(laid_out(shape, dtype, param == "std"))
    prior = draw(st.sampled_from(["none", "numbers", "tensors"]))
    if prior == "numbers":
        options["prior"] = (0.5, 1.5)
    elif prior == "tensors":
        parts = []
        for positive in (False, param == "std"):
            kept = shape[draw(st.integers(0, len(shape))) :]
            parts.append(draw(laid_out(tuple(draw(st.sampled_from([1, n])) for n in kept), dtype, positive)))
        options["prior"] = tuple(parts)
    options["sample_shape"] = draw(st.lists(st.integers(0, 3), max_size=2).map(tuple))
    options["event_ndim"] = draw(st.none() | st.integers(0, len(shape)))
    seed = draw(st.integers(0, 2**63 - 1))
    if shape and shape[0] > 0 and draw(st.booleans()):
        seed = torch.tensor([(seed + i) % 2**63 for i in range(shape[0])])
    return mu, x, seed, options


def compare(got, want, what, fine, terms=0.0):
    """terms: the size of what was added up to `want`, and may have cancelled."""
    unit = max(UNIT[got.dtype] * 4, fine)
    want = torch.where(want.abs() < torch.finfo(got.dtype).max, want, want.to(got.dtype).double())
    finite = want[want.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    step = torch.finfo(got.dtype).tiny * torch.finfo(got.dtype).eps  # between subnormals
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=unit,
        atol=max(fine * max(largest, terms), step),
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )


def check(module, call):
    mu, x, seed, options = call
    made = prepare("test", mu, x, z=True, kl=True, seed=seed, **options)
    z, kl = module.forward(made)
    eps = noise(z.shape, seed, options["sample_shape"])
    leaves = [mu, x, *(t for t in options.get("prior", ()) if isinstance(t, torch.Tensor))]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wide_options = dict(options)
    if len(leaves) == 4:
        wide_options["prior"] = tuple(wide[2:])
    true_z, true_kl = rk.reference.reparameterize_kl(*wide[:2], eps=eps.double(), **wide_options)
    fine = 1e-12 if mu.dtype == torch.float64 else 2e-6
    compare(z, true_z.detach(), "z", fine, terms=mu.abs().max().item() if mu.numel() else 0.0)
    compare(kl, true_kl.detach(), "kl", fine)
    dz = torch.ones(()).to(mu.dtype).expand(z.shape)
    dkl = torch.ones((), dtype=accumulate_dtype(mu.dtype)).expand(kl.shape)
    got = module.backward(made, dz, dkl, (True, True, False, False))[:2]
    want = torch.autograd.grad((true_z, true_kl), wide[:2], (dz.double(), dkl.double()))
    for name, g, w in zip(("dmu", "dx"), got, want, strict=True):
        compare(g, w, name, fine * 4)


@settings(QUIET, max_examples=400 * DEPTH)
@given(calls())
def test_cpu_kernels_are_the_reference(call):
    check(cpu, call)


@settings(QUIET, max_examples=60 * DEPTH)
@given(calls())
def test_triton_kernels_are_the_reference(call):
    check(triton, call)


@settings(QUIET, max_examples=100 * DEPTH)
@given(shapes, st.integers(0, 2**63 - 1))
def test_randn_does_not_depend_on_shape(shape, seed):
    n = math.prod(shape)
    assert torch.equal(rk.randn(shape, seed=seed).reshape(-1), rk.randn(n, seed=seed))
