"""rk.distributions.Normal behaves as torch's, with samples and KL from the fused ops."""

import copy
import itertools
import math
import pickle

import pytest
import scipy.stats
import torch
from torch import distributions as td
from torch.distributions import Independent, Laplace, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import reparam_kernels as rk
from reparam_kernels.distributions import Normal
from tests.cases import DTYPES, UNIT

pytestmark = pytest.mark.usefixtures("says_where")

G = torch.Generator().manual_seed(0)
LOC, SCALE = torch.randn(4, 5, generator=G), torch.rand(4, 5, generator=G) + 0.5
PAIRS = [
    (0.5, 2.0),
    (0, 1),
    (torch.tensor(0.5), 2.0),
    (LOC, 2.0),
    (0.5, SCALE),
    (LOC[:, :1], SCALE[0]),
    (LOC[:2, None], SCALE[:, :1]),
    (LOC[:0], SCALE[0]),
    (LOC, SCALE.double()),
    (LOC.half(), SCALE.bfloat16()),
]


@pytest.fixture(autouse=True)
def seeded(validating):
    torch.manual_seed(0)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{getattr(p[0], 'shape', p[0])}-{getattr(p[1], 'shape', p[1])}")
def test_everything_but_draws_and_kl_matches_torch(pair):
    ours, theirs = Normal(*pair), td.Normal(*pair)
    value = torch.linspace(0.1, 0.9, 3)[:, None, None, None]
    for name in ("batch_shape", "event_shape", "loc", "scale", "mean", "mode", "stddev", "variance"):
        assert_same(getattr(ours, name), getattr(theirs, name))
    for name in ("log_prob", "cdf", "icdf"):
        assert_same(getattr(ours, name)(value), getattr(theirs, name)(value))
    for name in ("entropy", "perplexity"):
        assert_same(getattr(ours, name)(), getattr(theirs, name)())
    for shape in [(), (4,), torch.Size([2, 3])]:
        for draw in ("rsample", "sample"):
            z, like = getattr(ours, draw)(shape), getattr(theirs, draw)(shape)
            assert (z.shape, z.device) == (like.shape, like.device)
            assert z.dtype == like.dtype
    shape = (6, *theirs.batch_shape)
    assert ours.expand(shape).rsample((2,)).shape == theirs.expand(shape).rsample((2,)).shape
    assert type(ours.expand(shape)) is Normal
    assert repr(ours) == repr(theirs)


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    else:
        assert a == b


def test_a_draw_matches_the_op_and_takes_one_seed():
    for shape, draw in itertools.product([(), (3,), (2, 3)], ("rsample", "sample")):
        torch.manual_seed(1)
        z, after = getattr(Normal(LOC, SCALE), draw)(shape), torch.get_rng_state()
        torch.manual_seed(1)
        seed = torch.randint(2**63 - 1, (1,))
        assert torch.equal(torch.get_rng_state(), after)
        eps = rk.randn(*shape, 4, 5, seed=seed.item())
        torch.testing.assert_close(z, LOC + SCALE * eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_are_normal(dtype):
    torch.manual_seed(2)
    q = Normal(torch.tensor([1.0, -2.0], dtype=dtype), torch.tensor([0.5, 3.0], dtype=dtype))
    for z in (q.rsample((20000,)), q.sample((20000,))):
        eps = ((z.double() - q.loc.double()) / q.scale.double()).reshape(-1).numpy()
        assert scipy.stats.kstest(eps, "norm").pvalue > 1e-4
        assert abs(eps.std() - 1) < 0.02


def test_gradients_of_a_draw_are_one_and_eps(backend):
    loc = torch.randn(4, 1, requires_grad=True)
    scale = (torch.rand(3) + 0.5).requires_grad_()
    z = Normal(loc, scale).rsample((2,))
    dz = torch.randn(2, 4, 3)
    z.backward(dz)
    eps = ((z - loc) / scale).detach()
    torch.testing.assert_close(loc.grad, dz.sum((0, 2)).reshape(4, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale.grad, (dz * eps).sum((0, 1)), rtol=1e-4, atol=1e-5)
    assert not Normal(loc, scale).sample().requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sides", [(Normal, Normal), (Normal, td.Normal), (td.Normal, Normal)], ids=str)
def test_kl_is_registered_with_torch_normal_on_either_side(sides, dtype):
    """Values and gradients match torch's formula in float64, for shapes that broadcast either way."""
    for a, b in [((4, 5), (4, 5)), ((4, 5), ()), ((4, 5), (5,)), ((5,), (4, 5)), ((4, 1, 5), (3, 1)), ((0, 2), (2,))]:
        values = [torch.randn(a), torch.rand(a) + 0.5, torch.randn(b), torch.rand(b) + 0.5]
        ours = [v.to(dtype).requires_grad_() for v in values]
        true = [v.detach().double().requires_grad_() for v in ours]
        kl = kl_divergence(sides[0](*ours[:2]), sides[1](*ours[2:]))
        want = kl_divergence(td.Normal(*true[:2]), td.Normal(*true[2:]))
        assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert kl.shape == want.shape
        torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-6)
        weight = torch.rand(kl.shape)
        kl.backward(weight.to(kl.dtype))
        want.backward(weight.double())
        for g, w in zip(ours, true, strict=True):
            assert g.grad is not None
            assert g.grad.dtype == dtype
            torch.testing.assert_close(g.grad.double(), w.grad, rtol=20 * UNIT[dtype] + 1e-6, atol=1e-4)


def test_kl_is_accurate_and_in_range_unlike_torch():
    q, p = Normal(torch.full((9,), 1e-4), 1 + 1e-4), Normal(0.0, 1.0)
    wide = [td.Normal(d.loc.double(), d.scale.double()) for d in (q, p)]
    torch.testing.assert_close(kl_divergence(q, p).double(), exact_kl(*wide), rtol=1e-6, atol=0)
    assert (
        kl_divergence(td.Normal(q.loc, q.scale), td.Normal(0.0, 1.0)).double() / exact_kl(*wide) - 1
    ).abs().max() > 0.1
    half = Normal(torch.tensor([300.0]).half(), torch.tensor([1.0]).half())
    assert kl_divergence(half, Normal(torch.zeros(1).half(), torch.ones(1).half())).item() == 45000.0
    assert kl_divergence(half, Normal(torch.zeros(1).half(), torch.tensor([0.5]).half())).item() > 65504


def exact_kl(p, q):
    d = 2 * (p.scale.log() - q.scale.log())
    return (((p.loc - q.loc) / q.scale) ** 2 + torch.expm1(d) - d) / 2


def test_kl_with_other_families_comes_from_torch():
    q = Normal(torch.randn(3), 0.5)
    assert torch.equal(kl_divergence(q, Laplace(0.0, 1.0)), kl_divergence(td.Normal(q.loc, q.scale), Laplace(0.0, 1.0)))


def test_independent_sums_the_event():
    loc, scale = LOC, SCALE
    q, p = Independent(Normal(loc, scale), 1), Independent(td.Normal(torch.zeros(4, 5), torch.ones(4, 5)), 1)
    true = Independent(td.Normal(loc.double(), scale.double()), 1)
    torch.testing.assert_close(
        kl_divergence(q, p).double(), kl_divergence(true, Independent(td.Normal(0.0 * loc.double(), 1.0), 1))
    )
    z = q.rsample((3,))
    assert z.shape == (3, 4, 5)
    torch.testing.assert_close(q.log_prob(z).double(), true.log_prob(z.double()), rtol=1e-5, atol=1e-5)
    assert q.expand((2, 4)).rsample().shape == (2, 4, 5)


BAD = [
    (torch.tensor([0.0, math.nan]), torch.ones(2)),
    (torch.zeros(2), torch.tensor([1.0, math.nan])),
    (torch.zeros(2), torch.tensor([1.0, 0.0])),
    (torch.zeros(2), torch.tensor([1.0, -math.inf])),
    (torch.zeros(2, dtype=torch.float16), torch.tensor([1.0, -1.0], dtype=torch.float16)),
    (math.nan, 1.0),
    (0.0, -1.0),
    (torch.zeros(3), 0.0),
    (math.nan, torch.ones(3)),
]


@pytest.mark.parametrize("pair", BAD, ids=str)
def test_bad_arguments_raise_as_in_torch_and_pass_without_validation(pair):
    with pytest.raises(ValueError, match="constraint") as theirs:
        td.Normal(*pair)
    with pytest.raises(ValueError, match="constraint") as ours:
        Normal(*pair)
    assert str(ours.value) == str(theirs.value)
    assert Normal(*pair, validate_args=False).batch_shape == td.Normal(*pair, validate_args=False).batch_shape


def test_good_arguments_pass():
    """Infinities and empty tensors are valid."""
    for pair in [(math.inf, 1.0), (torch.tensor([-math.inf, 0.0]), torch.tensor([math.inf, 5e-45])), *PAIRS]:
        assert Normal(*pair)._validate_args == td.Normal(*pair)._validate_args


def test_validation_follows_the_torch_setting():
    kept = Normal(0.0, 1.0)
    explicit = Normal(0.0, 1.0, validate_args=True)
    td.Distribution.set_default_validate_args(False)
    Normal(math.nan, 1.0)
    assert not kept._validate_args
    assert explicit._validate_args
    td.Distribution.set_default_validate_args(True)
    for q in (kept, explicit):
        with pytest.raises(ValueError, match="support"):
            q.log_prob(torch.tensor(math.nan))
    Normal(0.0, 1.0, validate_args=False).log_prob(torch.tensor(math.nan))


def test_a_subclass_with_constraints_of_its_own_is_validated():
    class Above(Normal):
        arg_constraints = {**td.Normal.arg_constraints, "loc": td.constraints.greater_than(5.0)}  # noqa: RUF012

    assert Above(6.0, 1.0).loc == 6
    with pytest.raises(ValueError, match="GreaterThan"):
        Above(4.0, 1.0)


class Counted(TorchDispatchMode):
    """Counts the ops that do arithmetic or read a value."""

    def __init__(self):
        super().__init__()
        self.reads, self.kernels = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.reads += name in ("_local_scalar_dense", "is_nonzero")
        self.kernels += name not in ("expand", "detach", "alias", "_local_scalar_dense", "is_nonzero", "unbind", "view")
        return func(*args, **(kwargs or {}))


def test_validation_costs_less_than_in_torch_and_nothing_if_off():
    loc, scale = torch.randn(128, 20), torch.rand(128, 20) + 0.5

    def kernels(cls, **options):
        with Counted() as counted:
            cls(loc, scale, **options)
        return counted.kernels

    assert kernels(Normal) == 3 < kernels(td.Normal)
    assert kernels(Normal, validate_args=False) == 0


def test_copies():
    q = Normal(torch.randn(3), torch.rand(3) + 0.5)
    for other in (copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert type(other) is Normal
        torch.manual_seed(0)
        z = other.rsample()
        torch.manual_seed(0)
        assert torch.equal(z, q.rsample())


def test_integers_are_refused_by_a_clear_error():
    q = Normal(torch.tensor([0, 1]), torch.tensor([1, 1]))
    with pytest.raises(TypeError, match="mu must be float16, bfloat16, float32 or float64; got int64"):
        q.rsample()
