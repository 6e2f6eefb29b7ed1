"""rk.distributions.Normal and torch's give the same shape, dtype, device and value, or both an error, on any arguments.

A KL of half dtypes is float32 here, since it may exceed their range. The value of a draw is not compared.
"""

import contextlib
import itertools

import pytest
import torch
from torch import distributions as td
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacrev, vmap

from reparam_kernels.distributions import Normal

pytestmark = pytest.mark.usefixtures("says_where", "validating")

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tensor(shape, dtype, value=1.0, device="cpu"):
    return torch.full(shape, value, dtype=dtype, device=device) if dtype.is_floating_point else torch.ones(
        shape, dtype=dtype, device=device)  # fmt: skip


def arguments():
    """Numbers, 0-dim tensors and tensors with dims, of each dtype: as loc or as scale."""
    yield from (0.5, 2, 1e-8)
    for dtype in (*FLOATS, torch.int64):
        yield tensor((), dtype)
        yield tensor((3,), dtype)
    yield tensor((2, 1), torch.float32, 0.25)
    yield tensor((0, 3), torch.float32)


PAIRS = list(itertools.product(arguments(), repeat=2))


def outcome(f):
    """Return what f returns, or a comparable description of the error that it raises."""
    try:
        result = f()
    except Exception as error:
        constraint = "satisfy the constraint" in str(error)
        return ("refused", str(error)) if constraint else ("error",)
    return result


def same(ours, theirs, value=True, kl=False, halves=False):
    if isinstance(ours, tuple) or isinstance(theirs, tuple):
        return isinstance(ours, tuple) and isinstance(theirs, tuple) and ours == theirs
    dtype = theirs.dtype
    if kl and dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    if (ours.shape, ours.dtype, ours.device) != (theirs.shape, dtype, theirs.device):
        return False
    if not value or ours.is_meta or type(ours) is not torch.Tensor:
        return True
    if kl and theirs.dtype == torch.float16:  # it overflows inside
        ours = torch.where(theirs.isfinite(), ours, theirs.float())
    loose = 0.1 if kl and (dtype is not theirs.dtype or halves) else 1e-5 if kl else 0
    return torch.allclose(ours.double(), theirs.double(), rtol=loose, atol=loose, equal_nan=True)


def describe(pair):
    return [f"{a.dtype}{tuple(a.shape)}@{a.device}" if isinstance(a, torch.Tensor) else a for a in pair]


def differences(pairs, action, **how):
    """Return the pairs of arguments for which ours and torch's differ, with both outcomes."""
    different = []
    for pair in pairs:
        ours, theirs = (outcome(lambda cls=cls, pair=pair: action(cls, *pair)) for cls in (Normal, td.Normal))
        halves = any(isinstance(t, torch.Tensor) and t.dtype in (torch.float16, torch.bfloat16) for t in pair)
        if not same(ours, theirs, halves=halves, **how):
            different.append((describe(pair), ours, theirs))
    return different


MEMBERS = ("loc", "scale", "mean", "mode", "stddev", "variance")


@pytest.mark.parametrize("validate", [None, True, False])
def test_the_parameters_that_are_kept(validate):
    for name in MEMBERS:
        assert not differences(PAIRS, lambda cls, a, b, n=name: getattr(cls(a, b, validate_args=validate), n))


@pytest.mark.parametrize("validate", [True, False])
def test_methods_without_noise(validate):
    value = torch.linspace(0.1, 0.9, 3)
    for name in ("log_prob", "cdf", "icdf"):
        assert not differences(PAIRS, lambda cls, a, b, n=name: getattr(cls(a, b, validate_args=validate), n)(value))
    assert not differences(PAIRS, lambda cls, a, b: cls(a, b).entropy())


@pytest.mark.parametrize("sample_shape", [(), (2,), (0,), torch.Size([2, 1]), [2]], ids=str)
def test_draws(sample_shape):
    pairs = [pair for pair in PAIRS if not is_empty_of_integers(pair, sample_shape)]
    for name in ("rsample", "sample"):
        assert not differences(pairs, lambda cls, a, b, n=name: getattr(cls(a, b), n)(sample_shape), value=False)


def is_empty_of_integers(pair, sample_shape=()):
    """Return True for empty integers, which torch accepts and ours refuses."""
    q = outcome(lambda: td.Normal(*pair))
    return not isinstance(q, tuple) and not q.loc.dtype.is_floating_point and 0 in (*sample_shape, *q.batch_shape)


SIDES = {"ours, ours": (True, True), "ours, torch's": (True, False), "torch's, ours": (False, True)}


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_kl(sides):
    """Against N(2, 0.5) in numbers, 0-dim and with dims, as q and as p."""
    pairs = [pair for pair in PAIRS if not mixes_integers_and_floats(pair)]
    others = [(2.0, 0.5), *((tensor(s, d, 2.0), tensor(s, d, 0.5)) for s in ((), (3,)) for d in FLOATS)]
    for other in others:

        def kl(cls, a, b, turned=False, other=other):
            p, q = (cls if ours else td.Normal for ours in sides)
            first, second = (other, (a, b)) if turned else ((a, b), other)
            return td.kl_divergence(p(*first), q(*second))

        assert not differences(pairs, kl, kl=True)
        assert not differences(pairs, lambda cls, a, b: kl(cls, a, b, turned=True), kl=True)


def mixes_integers_and_floats(pair):
    """Return True if integers and floats are mixed, so that the order of torch's ops decides the dtype of its KL."""
    return len({t.is_floating_point() for t in pair if isinstance(t, torch.Tensor)}) > 1


WRAPPED = {
    "expand": lambda q: q.expand((2, *q.batch_shape)),
    "Independent": lambda q: td.Independent(q, len(q.batch_shape)),
    "TransformedDistribution": lambda q: td.TransformedDistribution(q, [td.transforms.TanhTransform()]),
    "MixtureSameFamily": lambda q: td.MixtureSameFamily(td.Categorical(torch.ones(3)), q),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_is_built_on_it(wrap):
    value = torch.linspace(0.1, 0.9, 3)
    assert not differences(PAIRS, lambda cls, a, b: wrap(cls(a, b)).log_prob(value))
    pairs = [pair for pair in PAIRS if not is_empty_of_integers(pair)]
    assert not differences(pairs, lambda cls, a, b: wrap(cls(a, b)).sample((2,)), value=False)
    assert not differences(pairs, lambda cls, a, b: wrap(cls(a, b)).rsample(), value=False)
    if wrap is not WRAPPED["MixtureSameFamily"]:
        kept = [p for p in PAIRS if any(isinstance(t, torch.Tensor) and t.dim() for t in p)]
        kl = lambda cls, a, b: td.kl_divergence(wrap(cls(a, b)), wrap(td.Normal(a, b)))  # noqa: E731
        assert not differences(kept, kl, kl=True)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_devices(device):
    """Arguments are on meta or on a fake GPU, all of them or some, with and without dims."""
    fake = FakeTensorMode(allow_non_fake_inputs=True) if device == "cuda" else contextlib.nullcontext()
    with fake, torch.no_grad():
        there = [tensor(s, torch.float32, device=f"{device}:0" if device == "cuda" else device) for s in ((), (3,))]
        args = [*there, tensor((), torch.float32), tensor((), torch.float64), tensor((3,), torch.float32), 1.0]
        pairs = list(itertools.product(args, repeat=2))
        off = {"validate_args": False}
        assert not differences(pairs, lambda cls, a, b: cls(a, b).loc)  # validation reads a value
        for name in ("loc", "scale"):
            assert not differences(pairs, lambda cls, a, b, n=name: getattr(cls(a, b, **off), n))
        for draw in ("rsample", "sample"):
            for shape in ((), (2,)):
                how = lambda cls, a, b, d=draw, s=shape: getattr(cls(a, b, **off), d)(s)  # noqa: E731
                # torch's own draws take two 0-dim tensors for one device or for two, as the sample shape is; the fake
                # of torch.normal promotes, which its kernels do not.
                kept = [
                    p for p in pairs if not (p[0] is not p[1] and all(torch.is_tensor(t) and not t.dim() for t in p))
                ]
                kept = [p for p in kept if draw == "rsample" or not any(t is args[3] for t in p)]
                assert not differences(kept, how, value=False)
        for other in ((1.0, 2.0), (args[2], args[3]), (there[0], 1.0), (there[1], there[1]), (args[4], args[4])):
            prior = td.Normal(*other, **off)
            assert not differences(pairs, lambda cls, a, b, q=prior: td.kl_divergence(cls(a, b, **off), q), kl=True)
            assert not differences(pairs, lambda cls, a, b, q=prior: td.kl_divergence(q, cls(a, b, **off)), kl=True)


@pytest.mark.parametrize("validate", [None, True, False])
def test_transforms(validate):
    loc, scale = torch.randn(4, 3), torch.rand(4, 3) + 0.5
    value = torch.zeros(3)

    def log_prob(cls, m, s):
        return cls(m, s, validate_args=validate).log_prob(value)

    def kl(cls, m, s):
        return td.kl_divergence(cls(m, s, validate_args=validate), td.Normal(0.0, 1.0))

    for f in (log_prob, kl):
        for transform in (
            lambda g: vmap(g)(loc, scale),
            lambda g: vmap(g, (0, None))(loc, scale[0]),
            lambda g: vmap(vmap(g))(loc, scale) if g.f is kl else vmap(g)(loc, scale),
            lambda g: jacrev(g, (0, 1))(loc[0], scale[0])[1],
            lambda g: vmap(jacrev(g))(loc, scale),
            lambda g: grad(lambda m, s: g(m, s).sum(), 1)(loc[0], scale[0]),
        ):
            results = []
            for cls in (Normal, td.Normal):

                def g(m, s, cls=cls, f=f):
                    return f(cls, m, s)

                g.f = f
                results.append(transform(g))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    draw = vmap(lambda m, s: Normal(m, s, validate_args=validate).rsample((2,)), randomness="different")
    assert draw(loc, scale).shape == (4, 2, 3)  # torch refuses this


def test_gradients_reach_every_argument():
    """Each gradient has the shape and dtype of its argument, also for 0-dim arguments and other dtypes."""
    for a, b in PAIRS:
        leaves = [[t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
                   for t in (a, b)] for _ in range(2)]  # fmt: skip
        grads = []
        for cls, (loc, scale) in zip((Normal, td.Normal), leaves, strict=True):
            learned = [t for t in (loc, scale) if isinstance(t, torch.Tensor) and t.requires_grad]
            made = outcome(lambda cls=cls, loc=loc, scale=scale: cls(loc, scale))
            if isinstance(made, tuple) or not learned:
                grads.append([])
                continue
            kl = td.kl_divergence(made, td.Normal(2.0, 0.5)).sum() + td.kl_divergence(td.Normal(2.0, 0.5), made).sum()
            grads.append(torch.autograd.grad(kl, learned))
        for g, w in zip(*grads, strict=True):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
            loose = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(g.dtype, 1e-4)
            torch.testing.assert_close(g.double(), w.double(), rtol=loose, atol=loose)
