"""Hypothesis tests of the kernels against the formula in float64, for any op, shape, layout, dtype and option.

An error may be twice that of the textbook formula in plain torch, in the dtype of the arithmetic, on the same input. A
few units in the last place of the added terms, which may cancel, are always allowed. Half dtypes round once more.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

import reparam_kernels as rk
from reparam_kernels.core.dtypes import compute_dtype
from reparam_kernels.ops.latent.formula import log_sigma, sigma_of
from tests.cases import DTYPES, PARAMS, UNIT, noise
from tests.conftest import forget, use_backend

pytestmark = pytest.mark.usefixtures("says_where")

DEPTH = int(os.environ.get("FUZZ_DEPTH", "1"))  # factor on the examples; above 1 they follow --hypothesis-seed
QUIET = settings(
    deadline=None, derandomize=DEPTH == 1, print_blob=DEPTH > 1, database=None, suppress_health_check=list(HealthCheck)
)
# Units of 2^-24: 16 are the 1e-6 of docs/contract.md. Softplus with a prior exceeds it on one element in ten million.
FEW, FEW_SOFTPLUS, FEW_WIDE = 16, 24, 64

DRAW = ("sample_shape", "seed", "eps", "window")

small = st.lists(st.integers(0, 6), max_size=4).map(tuple)
across_pieces = st.sampled_from([(1024,), (1030,), (2, 1029), (3, 700), (40, 33), (5, 3, 70)])
shapes = st.one_of(*[small] * 7, across_pieces)


@st.composite
def laid_out(draw, shape, dtype, positive=False):
    """Draw a tensor inside a larger buffer, with its dims in any order in memory and some of them with stride 0."""
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.lists(st.sampled_from([0, 1, 1, 1, 2, 3]), min_size=len(shape), max_size=len(shape)))
    scale = draw(st.sampled_from([1e-4, 1e-2, 0.1, 1.0, 3.0, 10.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    held = [min(shape[i], 1) if step[i] == 0 else shape[i] * step[i] for i in order]
    buffer = torch.randn(held, generator=g, dtype=torch.float64) * scale
    if positive:
        buffer = buffer.abs() + 0.05
    t = buffer.to(dtype).permute([order.index(i) for i in range(len(shape))])
    for dim, k in enumerate(step):
        t = t[(slice(None),) * dim + (slice(None, None, k),)] if k else t
    return t.expand(shape)


@st.composite
def calls(draw):
    """Draw an op's name, its leaves, its options, and dz and dkl."""
    op = draw(st.sampled_from(["reparameterize", "kl_divergence", "reparameterize_kl", "packed"]))
    shape, dtype, param = draw(shapes), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(PARAMS))
    options = {"param": param}
    if param == "softplus":
        options["min_std"] = draw(st.sampled_from([0.0, 1e-4, 0.1, 1.0, 2.0]))
    if draw(st.booleans()):
        low = draw(st.sampled_from([0.25, 0.5, -math.inf]))
        options["clamp"] = (low, draw(st.sampled_from([0.75, 2.0, math.inf])))
    leaves = {"mu": draw(laid_out(shape, dtype)), "x": draw(laid_out(shape, dtype, param == "std"))}
    if op == "packed":
        shape = shape or (3,)
        dim = draw(st.integers(0, len(shape) - 1))
        packed = (*shape[:dim], 2 * shape[dim], *shape[dim + 1 :])
        leaves = {"moments": draw(laid_out(packed, dtype, param == "std")), "dim": dim}
    samples = ()
    if op != "kl_divergence":
        samples = draw(st.lists(st.integers(0, 3), max_size=2).map(tuple))
        options["sample_shape"] = samples
        source = draw(st.sampled_from(["seed", "items", "eps"]))
        seed = draw(st.integers(0, 2**63 - 1))
        whole = shape
        if source != "eps" and draw(st.integers(0, 3)) == 0:
            start = tuple(draw(st.integers(0, 5)) for _ in shape)
            whole = tuple(first + size + draw(st.integers(0, 5)) for first, size in zip(start, shape, strict=True))
            options["window"] = whole, start
        if source == "eps":
            options["eps"] = draw(laid_out(samples + shape, dtype))
        elif source == "items" and shape and shape[0] > 0:
            options["seed"] = torch.tensor([(seed + i) % 2**63 for i in range(whole[0])])
        else:
            options["seed"] = seed
    dkl = None
    if op != "reparameterize":
        options["event_ndim"] = event_ndim = draw(st.none() | st.integers(0, len(shape)))
        kept = max(len(shape) - 1, min(len(shape), 1)) if event_ndim is None else event_ndim
        dkl = draw(laid_out(shape[: len(shape) - kept], compute_dtype(dtype)))
        prior = draw(st.sampled_from(["none", "numbers", "tensors"] if op != "packed" else ["none", "tensors"]))
        if prior == "numbers":
            options["prior"] = (0.5, 1.5)
        elif prior == "tensors":
            for name, positive in (("mu_p", False), ("x_p", param == "std")):
                own = shape
                if op != "packed":  # if the user expands it, autograd sums its gradient in the dtype of mu
                    own = tuple(draw(st.sampled_from([1, n])) for n in shape[draw(st.integers(0, len(shape))) :])
                leaves[name] = draw(laid_out(own, dtype, positive))
    dz = None if op == "kl_divergence" else draw(laid_out(samples + shape, dtype))
    if dz is not None and dkl is not None:
        dz, dkl = draw(st.sampled_from([(dz, dkl), (dz, dkl), (dz, None), (None, dkl)]))
    return op, leaves, options, dz, dkl


def run(op, leaves, options):
    """Return (z, kl) of the public function."""
    options = dict(options)
    if "mu_p" in leaves:
        options["prior"] = (leaves["mu_p"], leaves["x_p"])
    if op == "packed":
        prior, draw = options.pop("prior", None), {n: options.pop(n) for n in DRAW if n in options}
        q = rk.DiagonalGaussian.from_moments(leaves["moments"], leaves["dim"], **options)
        if prior is not None:
            own = {name: value for name, value in options.items() if name != "clamp"}
            prior = rk.DiagonalGaussian(*prior, **own)
        return q.rsample_kl(prior, **draw)
    outputs = getattr(rk, op)(leaves["mu"], leaves["x"], **options)
    return {"reparameterize": (outputs, None), "kl_divergence": (None, outputs)}.get(op, outputs)


def textbook(mu, x, prior, eps, options):
    """Compute z and kl by the textbook formulas in plain torch, in the dtype of mu."""
    param, min_std = options["param"], options.get("min_std", 0.0)

    def scale(t):
        if param in ("logvar", "logstd"):
            return (t / 2 if param == "logvar" else t).exp(), t if param == "logvar" else 2 * t
        sigma = t if param == "std" else softplus(t) + min_std
        return sigma, 2 * sigma.log()

    x = x.clamp(*options["clamp"]) if "clamp" in options else x
    sigma, logvar = scale(x)
    delta, d = mu, logvar
    if prior:
        sigma_p, logvar_p = scale(prior[1])
        delta, d = (mu - prior[0]) / sigma_p, logvar - logvar_p
    kl = (delta**2 + d.exp() - 1 - d) / 2
    event = options.get("event_ndim")
    event = max(mu.dim() - 1, min(mu.dim(), 1)) if event is None else event
    return None if eps is None else mu + sigma * eps, kl.sum(tuple(range(mu.dim() - event, mu.dim()))) if event else kl


def terms(mu, x, prior, eps, dz, dkl, options, slack):
    """Return the sizes of the terms of z, kl and each gradient, in float64. slack is the part that counts of the terms
    that cancel in expm1(d) - d and of the rounding of d: all for float64, in which both sides evaluate the textbook
    formula, else what the rounding of the truth needs."""
    param, min_std = options["param"], options.get("min_std", 0.0)
    low, high = options.get("clamp", (-math.inf, math.inf))
    inside, x = (x >= low) & (x <= high), x.clamp(low, high)

    def scale(t):
        """Return sigma and d log sigma / dt."""
        sigma = sigma_of(t, param, min_std)
        slope = {"logvar": torch.full_like(t, 0.5), "logstd": torch.ones_like(t)}.get(param)
        return sigma, slope if slope is not None else (1 if param == "std" else t.sigmoid()) / sigma

    sigma, to_x = scale(x)
    mu_p, x_p = prior or (torch.zeros(()).double(), None)
    sigma_p, to_p = (torch.ones(()).double(), None) if x_p is None else scale(x_p)
    log_p = 0.0 if x_p is None else log_sigma(x_p, param, min_std)
    delta, d = (mu - mu_p) / sigma_p, 2 * (log_sigma(x, param, min_std) - log_p)
    event = options.get("event_ndim")
    event = max(mu.dim() - 1, min(mu.dim(), 1)) if event is None else event
    em1 = (d.expm1().abs() + slack) * (1 + slack * d.abs())
    kl = (delta**2 + (d.expm1() - d).abs() + slack * d.abs() * (1 + em1)) / 2
    overflows = bool((em1 + delta**2 > torch.finfo(torch.float32).max / 8).any())
    sizes = {"kl": kl.expand(mu.shape), "mu": torch.zeros_like(mu), "x": torch.zeros_like(mu)}
    if event:
        sizes["kl"] = sizes["kl"].sum(tuple(range(mu.dim() - event, mu.dim())))
    if eps is not None:
        sizes["z"] = mu.abs() + (sigma * eps).abs()
    if dz is not None:
        lead = tuple(range(dz.dim() - mu.dim()))
        sizes["mu"] = sizes["mu"] + (dz.abs().sum(lead) if lead else dz.abs())
        each = (dz * eps * sigma).abs()
        sizes["x"] = sizes["x"] + (each.sum(lead) if lead else each) * to_x * inside
    if dkl is not None:
        dkl = dkl.abs().reshape((*dkl.shape, *[1] * event))
        to_mu = (dkl * (delta / sigma_p).abs()).expand(mu.shape)
        sizes["mu"] = sizes["mu"] + to_mu
        sizes["x"] = sizes["x"] + dkl * em1 * to_x * inside
        if x_p is not None:
            sizes["mu_p"] = to_mu.sum_to_size(mu_p.shape)
            sizes["x_p"] = (dkl * (em1 + delta**2) * to_p).expand(mu.shape).sum_to_size(x_p.shape)
    return sizes, overflows


def excess(got, want, plain, size, few, arithmetic, overflows):
    """Return the largest error relative to its bound. overflows: exp(d) or delta^2 exceeds float32, and so may products
    with them."""
    if got.numel() == 0:
        return 0.0
    info = torch.finfo(got.dtype)
    got, plain = got.double(), plain.double()
    bound = few * UNIT[arithmetic] * size
    bound = torch.maximum(bound, 2 * (plain - want).abs().nan_to_num(0.0, posinf=0.0))
    if info.bits == 16:  # the last rounding; Triton's interpreter truncates to bfloat16
        bound = bound + want.abs() * info.eps
    bound = bound + 2 * info.tiny * info.eps
    same = (got == want) | (got.isnan() & want.isnan())
    overflowed = got.isinf() & ((want.abs() + bound > info.max) | overflows) & (got.sign() == want.sign())
    error = torch.where(same | overflowed, 0.0, (got - want).abs() / bound)
    return error.nan_to_num(math.inf).max().item()


def gradients(outputs, incoming, leaves):
    asked = [(y, g) for y, g in zip(outputs, incoming, strict=True) if g is not None]
    ys, gs = zip(*asked, strict=True)
    return torch.autograd.grad(ys, list(leaves.values()), gs, allow_unused=True)


def noise_in_window(z_shape, options):
    """Cut the noise of a call out of that of the whole."""
    samples = options["sample_shape"]
    own = z_shape[len(samples) :]
    whole, start = options.get("window", (own, (0,) * len(own)))
    eps = noise((*samples, *whole), options["seed"], samples)
    return eps[(..., *(slice(first, first + size) for first, size in zip(start, own, strict=True)))]


def check(call):
    """Return each result's largest error relative to its bound."""
    op, leaves, options, dz, dkl = call
    tensors = {name: t.detach().requires_grad_() for name, t in leaves.items() if name != "dim"}
    z, kl = run(op, {**leaves, **tensors}, options)
    grads = gradients((z, kl), (dz, dkl), tensors)
    got = {"z": z, "kl": kl, **dict(zip(tensors, grads, strict=True))}
    eps = None
    if z is not None:
        eps = options["eps"] if "eps" in options else noise_in_window(z.shape, options)
    dtype = next(iter(tensors.values())).dtype
    arithmetic = compute_dtype(dtype)

    def by(function, to):
        """Compute z, kl and the gradients by a formula in another dtype."""
        own = {name: t.detach().to(to).requires_grad_() for name, t in tensors.items()}
        mu, x = own["moments"].chunk(2, leaves["dim"]) if op == "packed" else (own["mu"], own["x"])
        prior = (own["mu_p"], own["x_p"]) if "mu_p" in own else options.get("prior")
        prior = prior and tuple(torch.as_tensor(p, dtype=to) for p in prior)
        e, gz, gk = (t if t is None else t.to(to) for t in (eps, dz, dkl))
        ys = function(mu, x, prior, e, options)
        grads = gradients(ys, (gz, gk), own)
        detached = [p.detach() for p in prior] if prior else None
        return dict(zip(("z", "kl", *own), (*ys, *grads), strict=True)), (mu.detach(), x.detach(), detached, e, gz, gk)

    want, inputs = by(formula, torch.float64)
    plain, _ = by(textbook, arithmetic)
    wide = dtype == torch.float64
    sizes, overflows = terms(*inputs, options, 1.0 if wide else 1e-9)
    overflows = overflows and not wide
    if op == "packed":
        sizes["moments"] = torch.cat([sizes.pop("mu"), sizes.pop("x")], leaves["dim"])
    few = FEW_WIDE if wide else FEW_SOFTPLUS if options["param"] == "softplus" else FEW
    out = {}
    for name, value in got.items():
        if value is None or want[name] is None:
            assert value is None or not value.any(), name
        else:
            parts = (value, want[name], plain[name], sizes[name])
            out[name] = excess(*(t.detach() for t in parts), few, arithmetic, overflows)
    return out


def formula(mu, x, prior, eps, options):
    """Compute z and kl by the reference."""
    names = ("param", "min_std", "clamp", "event_ndim", "sample_shape")
    own = {name: options[name] for name in names if name in options}
    if eps is None:
        own.pop("sample_shape", None)
        return None, rk.reference.kl_divergence(mu, x, prior=prior, **own)
    return rk.reference.reparameterize_kl(mu, x, eps=eps, prior=prior, **own)


@pytest.mark.parametrize(("backend", "examples"), [("cpu", 400), ("triton", 60)])
def test_kernels_are_the_formula(monkeypatch, record_property, backend, examples):
    tried, worst = 0, {}

    @settings(QUIET, max_examples=examples * DEPTH)
    @given(calls())
    def explore(call):
        nonlocal tried
        tried += 1
        for name, part in check(call).items():
            assert part <= 1, f"{name}: the error is {part:.3g} of its bound"
            worst[name] = max(part, worst.get(name, 0.0))

    use_backend(monkeypatch, backend)
    try:
        explore()
    finally:
        forget()
    record_property(f"examples on {backend}", tried)
    record_property("largest error, of its bound", ", ".join(f"{n} {part:.2f}" for n, part in worst.items()))


def test_randn_does_not_depend_on_shape(record_property):
    tried = 0

    @settings(QUIET, max_examples=100 * DEPTH)
    @given(shapes, st.integers(0, 2**63 - 1))
    def explore(shape, seed):
        nonlocal tried
        tried += 1
        assert torch.equal(rk.randn(shape, seed=seed).reshape(-1), rk.randn(math.prod(shape), seed=seed))

    explore()
    record_property("examples", tried)
