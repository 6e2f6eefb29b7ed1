"""The adapters against formulas in float64; tests/integrations compares them with the real packages."""

import importlib.metadata
import itertools
import logging
import sys
from types import ModuleType

import pytest
import torch

import reparam_kernels as rk
from reparam_kernels.integrations import diffusers, ldm, patching, pyro, scvi
from reparam_kernels.integrations.diffusers import DiagonalGaussianDistribution, OobleckDiagonalGaussianDistribution
from tests.cases import DTYPES, UNIT

pytestmark = pytest.mark.usefixtures("says_where")

SHAPES = [(2, 6, 5), (3, 8, 4, 5), (2, 4, 3, 4, 5)]
CLASSES = [DiagonalGaussianDistribution, OobleckDiagonalGaussianDistribution, ldm.DiagonalGaussianDistribution]


def moments(shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return generators if len(generators) > 1 else generators[0]


def truth(parameters, oobleck=False, dim=1):
    """Return mean and std in float64."""
    mean, x = parameters.double().chunk(2, dim)
    return mean, torch.log1p(x.exp()) + 1e-4 if oobleck else x.clamp(-30, 20).div(2).exp()


def divergence(mean, std, mean_p=0.0, std_p=1.0):
    std_p = torch.as_tensor(std_p, dtype=torch.float64)
    return ((mean - mean_p) / std_p) ** 2 / 2 + (std / std_p) ** 2 / 2 - 0.5 - (std / std_p).log()


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__module__ + c.__name__)
def test_sample_and_its_gradient(backend, cls, dtype, noise):
    for shape in SHAPES:
        parameters = moments(shape, dtype).requires_grad_()
        z = cls(parameters, noise=noise).sample(seeded(5))
        half = (shape[0], shape[1] // 2, *shape[2:])
        if noise == "torch":
            drawn = torch.float32 if cls is ldm.DiagonalGaussianDistribution else dtype
            eps = torch.randn(half, generator=seeded(5), dtype=drawn)
        else:
            eps = rk.randn(half, seed=torch.randint(2**63 - 1, half[:1], generator=seeded(5)))
        mean, std = truth(parameters.detach().requires_grad_(), cls is OobleckDiagonalGaussianDistribution)
        want = mean + std * eps.double()
        tolerance = {"rtol": 8 * UNIT[dtype], "atol": 8 * UNIT[dtype] if dtype != torch.float64 else 1e-7}
        assert z.dtype == (
            torch.promote_types(dtype, torch.float32) if cls is CLASSES[2] and noise == "torch" else dtype
        )
        torch.testing.assert_close(z.double(), want, **tolerance)
        dz = moments(half, dtype, seed=9)
        z.backward(dz.to(z.dtype))
        wide = parameters.detach().double().requires_grad_()
        mean, std = truth(wide, cls is OobleckDiagonalGaussianDistribution)
        (mean + std * eps.double()).backward(dz.double())
        assert parameters.grad.dtype == dtype
        torch.testing.assert_close(parameters.grad.double(), wide.grad, rtol=8 * UNIT[dtype], atol=tolerance["atol"])


@pytest.mark.parametrize("noise", ["torch", "philox"])
def test_generators_one_a_list_or_none(noise):
    parameters = moments((3, 8, 4, 4))
    posterior = DiagonalGaussianDistribution(parameters, noise=noise)
    assert torch.equal(posterior.sample(seeded(1)), posterior.sample([seeded(1)]))
    assert not torch.equal(posterior.sample(seeded(1)), posterior.sample(seeded(2)))
    whole = posterior.sample(seeded(4, 5, 6))
    assert torch.equal(whole, posterior.sample(tuple(seeded(4, 5, 6, 7))))
    for i, seed in enumerate([4, 5, 6]):
        one = DiagonalGaussianDistribution(parameters[i : i + 1], noise=noise).sample(seeded(seed))
        assert torch.equal(whole[i : i + 1], one)
    torch.manual_seed(3)
    default = posterior.sample()
    assert torch.equal(default, posterior.sample(torch.Generator().manual_seed(3)))
    with pytest.raises(ValueError, match="a generator for each of the 3 items; got 2"):
        posterior.sample(seeded(1, 2))


def test_a_cpu_generator_draws_on_the_cpu_for_a_tensor_elsewhere():
    """The meta device stands for a GPU."""
    generator, like = seeded(1), seeded(1)
    z = DiagonalGaussianDistribution(torch.empty(2, 8, 4, 4, device="meta")).sample(generator)
    assert z.device.type == "meta"
    torch.randn(2, 4, 4, 4, generator=like)
    assert torch.equal(generator.get_state(), like.get_state())
    assert diffusers.item_seeds(2, generator, torch.device("meta")).device.type == "meta"
    torch.randint(2**63 - 1, (2,), generator=like)
    assert torch.equal(generator.get_state(), like.get_state())


class Elsewhere:
    device = torch.device("cuda:0")


def test_a_generator_of_another_device_is_refused():
    with pytest.raises(ValueError, match="a generator must be on cpu or on the CPU; got cuda:0"):
        DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4)).sample(Elsewhere())


def test_philox_has_one_seed_for_each_item():
    parameters = moments((3, 8, 4, 4))
    posterior = DiagonalGaussianDistribution(parameters, noise="philox")
    seeds = torch.tensor([5, 2**40, 5])
    z = posterior.sample(seed=seeds)
    mean, std = truth(parameters)
    torch.testing.assert_close(z.double(), mean + std * rk.randn(3, 4, 4, 4, seed=seeds), rtol=1e-6, atol=1e-6)
    last = DiagonalGaussianDistribution(parameters[2:], noise="philox").sample(seed=5)
    assert torch.equal(z[2:], last)
    with pytest.raises(ValueError, match='seed goes with noise="philox"'):
        DiagonalGaussianDistribution(parameters).sample(seed=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fix_upstream_bugs", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_and_nll(backend, shape, fix_upstream_bugs, dtype):
    """The inputs exceed the clamp too, for which logvar gets no gradient."""
    parameters = moments(shape, dtype, scale=3.0)
    parameters[0, -1, 0] = 25.0
    parameters[1, -1, 0] = -40.0
    q = DiagonalGaussianDistribution(parameters.clone().requires_grad_(), fix_upstream_bugs=fix_upstream_bugs)
    p = DiagonalGaussianDistribution(moments(shape, dtype, seed=1).requires_grad_())
    sample = moments(q.mean.shape, dtype, seed=2)
    if len(shape) < 4 and not fix_upstream_bugs:
        for call in (q.kl, lambda: q.kl(p), lambda: q.nll(sample)):
            with pytest.raises(IndexError, match="fix_upstream_bugs=True"):
                call()
        return
    dims = tuple(range(1, len(shape))) if fix_upstream_bugs else (1, 2, 3)
    wide = [t.parameters.detach().double().requires_grad_() for t in (q, p)]
    (mean, std), (mean_p, std_p) = map(truth, wide)
    log_density = -0.5 * ((sample.double() - mean) / std) ** 2 - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    for got, want in [
        (q.kl(), divergence(mean, std).sum(dims)),
        (q.kl(p), divergence(mean, std, mean_p, std_p).sum(dims)),
        (q.nll(sample), -log_density.sum(dims)),
        (q.nll(sample, [1]), -log_density.sum(1)),
    ]:
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
        for t in (q.parameters, p.parameters, *wide):
            t.grad = None
        got.sum().backward(retain_graph=True)
        want.sum().backward(retain_graph=True)
        for ours, true in zip((q.parameters, p.parameters), wide, strict=True):
            assert (ours.grad is None) == (true.grad is None)
            if true.grad is not None:
                limit = torch.finfo(dtype).max
                torch.testing.assert_close(
                    ours.grad.double().clamp(-limit, limit),
                    true.grad.clamp(-limit, limit),
                    rtol=4 * UNIT[dtype] + 1e-6,
                    atol=1e-5,
                )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kl_of_a_half_posterior_is_in_range(dtype):
    """At (1, 16, 128, 128) the textbook KL is inf in float16 and has an error above 1e-4 in bfloat16."""
    parameters = torch.randn(1, 32, 128, 128, generator=seeded(0)).to(dtype)
    q = DiagonalGaussianDistribution(parameters)
    want = divergence(*truth(parameters)).sum()
    assert abs(q.kl().item() / want.item() - 1) < 1e-5
    usual = 0.5 * (q.mean**2 + q.var - 1 - q.logvar).sum()
    assert not abs(usual.item() / want.item() - 1) < 1e-4


def test_deterministic():
    parameters = moments((3, 8, 4, 4), torch.float16)
    theirs = DiagonalGaussianDistribution(parameters, True)
    assert torch.equal(theirs.kl(), torch.zeros(1))
    assert torch.equal(theirs.nll(theirs.mean), torch.zeros(1))
    assert not theirs.std.any()
    assert not theirs.var.any()
    generator = seeded(1)
    assert torch.equal(theirs.sample(generator), theirs.mean)
    assert not torch.equal(generator.get_state(), seeded(1).get_state())
    still = DiagonalGaussianDistribution(parameters, True, noise="philox")
    assert torch.equal(still.sample(), still.mean)
    assert torch.equal(still.kl(), torch.zeros(1))
    for noise in ("torch", "philox"):
        mended = DiagonalGaussianDistribution(parameters, True, fix_upstream_bugs=True, noise=noise)
        assert torch.equal(mended.kl(), torch.zeros(3))
        assert mended.nll(mended.mean).shape == (3,)
        generator = seeded(1)
        z = mended.sample(generator)
        assert torch.equal(z, mended.mean)
        assert torch.equal(generator.get_state(), seeded(1).get_state())
        z.zero_()
        assert mended.mean.any()
    assert torch.equal(mended.mode(), parameters[:, :4])
    q = DiagonalGaussianDistribution(moments((3, 8, 4, 4)))
    assert torch.equal(
        q.kl(DiagonalGaussianDistribution(moments((3, 8, 4, 4)), True)).isfinite(), torch.zeros(3).bool()
    )


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_any_chunk_dim(dim):
    parameters = moments((4, 6, 8)).requires_grad_()
    q = DiagonalGaussianDistribution(parameters, chunk_dim=dim, fix_upstream_bugs=True, noise="philox")
    mean, std = truth(parameters, dim=dim)
    torch.testing.assert_close(q.kl().double(), divergence(mean, std).sum((1, 2)), rtol=2e-6, atol=1e-6)
    z = q.sample(seed=3)
    torch.testing.assert_close(z.double(), mean + std * rk.randn(z.shape, seed=3), rtol=1e-6, atol=1e-6)
    o = OobleckDiagonalGaussianDistribution(parameters, chunk_dim=dim, fix_upstream_bugs=True)
    want = divergence(*truth(parameters, True, dim=dim)).sum(dim).mean()
    torch.testing.assert_close(o.kl().double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oobleck_kl_with_and_without_its_bugs(dtype):
    a, b = moments((2, 6, 5), dtype), moments((2, 6, 5), dtype, seed=1)
    (mean, std), (mean_p, std_p) = truth(a, True), truth(b, True)
    own, other = divergence(mean, std), divergence(mean, std, mean_p, std_p)
    twisted = 2 * other + 4 * (std / std_p).log()
    q, p = (OobleckDiagonalGaussianDistribution(t) for t in (a, b))
    fair = OobleckDiagonalGaussianDistribution(a, fix_upstream_bugs=True)
    for got, want, slack in [
        (q.kl(), 2 * own, 2e-6),
        (fair.kl(), own, 2e-6),
        (q.kl(p), twisted, 2e-6),
        (fair.kl(p), other, 2e-6),
    ]:
        torch.testing.assert_close(got.double(), want.sum(1).mean(), rtol=slack, atol=slack)
    assert torch.equal(OobleckDiagonalGaussianDistribution(a, True).kl(), torch.zeros(1))
    assert not torch.equal(OobleckDiagonalGaussianDistribution(a, True).sample(), q.mean)
    still = OobleckDiagonalGaussianDistribution(a, True, fix_upstream_bugs=True)
    assert torch.equal(still.sample(), q.mean)
    assert still.kl().shape == ()


def test_std_and_var_are_computed_when_read():
    posterior = DiagonalGaussianDistribution(moments((2, 8, 4, 4)))
    posterior.mode(), posterior.kl()
    assert not {"std", "var", "logvar"} & set(vars(posterior))
    assert posterior.std is posterior.std
    assert torch.equal(posterior.var, posterior.logvar.exp())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__module__ + c.__name__)
def test_std_read_without_gradients_keeps_its_own(cls):
    """Reading std without gradients must not detach a later sample."""
    parameters = moments((2, 8, 4, 4)).requires_grad_()
    posterior = cls(parameters)
    with torch.no_grad():
        posterior.std.mean(), posterior.var.mean()
    (grad,) = torch.autograd.grad(posterior.sample(seeded(1)).square().sum(), parameters)
    (want,) = torch.autograd.grad(cls(parameters).sample(seeded(1)).square().sum(), parameters)
    assert torch.equal(grad, want)
    assert grad[:, 4:].any()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__module__ + c.__name__)
def test_torch_noise_compiles_whole(cls):
    def step(parameters):
        posterior = cls(parameters)
        return posterior.sample(), posterior.std, posterior.mode()

    parameters = moments((2, 8, 4, 4))
    torch.manual_seed(0)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(parameters)
    torch.manual_seed(0)
    for got, want in zip(compiled, step(parameters), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__module__ + c.__name__)
def test_philox_noise_and_kl_compile_whole(cls):
    def step(parameters):
        posterior = cls(parameters, noise="philox")
        return posterior.sample(seed=7), posterior.kl()

    parameters = moments((2, 8, 4, 4)).requires_grad_()
    for got, want in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(parameters), step(parameters), strict=True
    ):
        assert torch.equal(got, want)
        grads = (torch.autograd.grad(y.sum(), parameters, retain_graph=True)[0] for y in (got, want))
        assert torch.equal(*grads)


def test_philox_saves_nothing_but_the_parameters():
    saved = []
    parameters = moments((2, 8, 4, 4)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        DiagonalGaussianDistribution(parameters, noise="philox").sample()
    assert {t.untyped_storage().data_ptr() for t in saved if t.is_floating_point()} == {
        parameters.untyped_storage().data_ptr()
    }


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_normal_kl_broadcasts_and_takes_numbers(wide):
    a, b, c, d = (torch.randn(s, dtype=wide, generator=seeded(i)) for i, s in enumerate([(4, 1), (5,), (3, 1, 1), ()]))
    for four in [(a, b, c, d), (a, b, 0.0, 0.0), (0.5, b, c, -1), (a, 0, c, 0), (0.0, 0.0, a, d)]:
        leaves = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in four]
        true = [
            t.double().detach().requires_grad_() if isinstance(t, torch.Tensor) else torch.tensor(float(t)).double()
            for t in four
        ]
        kl = ldm.normal_kl(*leaves)
        want = divergence(true[0], (true[1] / 2).exp(), true[2], (true[3] / 2).exp())
        assert kl.dtype == wide
        torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-6)
        kl.sum().backward()
        want.sum().backward()
        for got, t in zip(leaves, true, strict=True):
            if isinstance(got, torch.Tensor):
                torch.testing.assert_close(got.grad.double(), t.grad, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="at least one argument must be a float tensor"):
        ldm.normal_kl(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__module__ + c.__name__)
def test_errors_of_the_constructor(cls):
    with pytest.raises(ValueError, match="got 'gauss'"):
        cls(torch.zeros(2, 8, 4, 4), noise="gauss")
    with pytest.raises(TypeError, match="parameters must be float16"):
        cls(torch.zeros(2, 8, 4, 4, dtype=torch.int64))


@pytest.fixture
def package(monkeypatch):
    """Make a package whose modules share a class, with one module that is loaded later."""

    class Theirs:
        pass

    modules = {}
    for name in ("toy", "toy.a", "toy.b", "toyish", "toy.later"):
        modules[name] = ModuleType(name)
        modules[name].Theirs = Theirs
        if name != "toy.later":
            monkeypatch.setitem(sys.modules, name, modules[name])
    modules["toy.a"].Alias = Theirs
    modules["toy.a"].Other = int
    return modules


class Ours:
    pass


def test_patch_rebinds_lists_and_restores(package, caplog):
    theirs = package["toy"].Theirs
    with caplog.at_level(logging.WARNING):
        patch = patching.Patch("toy", {theirs: Ours})
    assert patch.rebound == ("toy.Theirs", "toy.a.Theirs", "toy.a.Alias", "toy.b.Theirs")
    assert all(name in caplog.text and name in repr(patch) for name in patch.rebound)
    assert package["toy.a"].Theirs is package["toy.a"].Alias is Ours
    assert package["toyish"].Theirs is theirs
    sys.modules["toy.later"] = package["toy.later"]
    package["toy.later"].Theirs = Ours  # loaded while patched
    try:
        patch.restore()
    finally:
        del sys.modules["toy.later"]
    assert all(module.Theirs is theirs for module in package.values())
    assert package["toy.a"].Other is int


def test_patch_is_a_context_manager_that_restores_after_an_error(package):
    theirs = package["toy"].Theirs
    seen = []

    def fails_inside():
        with patching.Patch("toy", {theirs: Ours}) as patch:
            seen.append(package["toy"].Theirs)
            assert "toy.b.Theirs" in patch.rebound
            raise KeyError

    with pytest.raises(KeyError):
        fails_inside()
    assert seen == [Ours]
    assert package["toy"].Theirs is theirs


def test_patching_twice_is_an_error(package):
    swaps = {package["toy"].Theirs: Ours}
    with patching.Patch("toy", swaps), pytest.raises(RuntimeError, match="toy must not be patched already"):
        patching.Patch("toy", swaps)


@pytest.mark.parametrize(
    ("adapter", "name"),
    [(diffusers, "diffusers"), (pyro, "pyro-ppl"), (scvi, "scvi-tools")],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_patch_without_the_package_is_an_error(adapter, name, monkeypatch):
    def missing(_):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(patching, "version", missing)
    with pytest.raises(ModuleNotFoundError, match=f"patch: {name} must be installed"):
        adapter.patch()


def test_a_package_without_the_class_is_an_error():
    with pytest.raises(RuntimeError, match=r"pytest must have pytest\.Normal; got version .*no attribute 'Normal'"):
        patching.find("pytest", "pytest", "Normal")


# ---- the comparison before a patch


def changed(base, **members):
    return type(base.__name__, (base,), members)


def normal_differences(theirs=torch.distributions.Normal, ours=rk.distributions.Normal):
    return list(patching.differences(theirs, ours, patching.normals(theirs)))


def test_our_normal_behaves_as_torchs():
    assert normal_differences() == []


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"entropy": lambda self: torch.distributions.Normal.entropy(self) + 1e-3}, "entropy: values that differ by"),
        ({"mode": property(lambda self: self.loc + 1)}, "mode: values that differ by up to 1"),
        ({"skewness": property(lambda self: 0.0)}, "skewness: theirs 0.0, ours <class 'AttributeError'>"),
        ({"crop": lambda self: self}, "a call of crop that it takes"),
        ({"rsample": lambda self, shape=(), other=False: self.loc.expand(*shape, 4, 60)}, "a call of rsample that"),
        ({"sample": lambda self, sample_shape=(): self.rsample(sample_shape)}, "sample: theirs ((5, 4, 60)"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_a_change_of_theirs_is_found(members, said):
    (line, *_) = normal_differences(theirs=changed(torch.distributions.Normal, **members))
    assert line.startswith(said)


def drawn_wrongly(draw):
    return changed(rk.distributions.Normal, rsample=lambda self, sample_shape=(): draw(self, torch.Size(sample_shape)))


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda q, n: 2 * rk.distributions.Normal.rsample(q, n) - q.loc, "samples of ours that do not have their mean"),
        (lambda q, n: q.loc + q.scale * rk.randn(*n, 4, 60, seed=1), "another generator that advances"),
        (lambda q, n: q.loc + q.scale * torch.randn(*n, 4, 60).mul(next(SIGNS)), "samples of ours that a seed does"),
    ],
    ids=["variance", "generator", "repeat"],
)
def test_a_wrong_sample_of_ours_is_found(draw, said):
    assert [line for line in normal_differences(ours=drawn_wrongly(draw)) if line.startswith(f"rsample: {said}")]


SIGNS = itertools.cycle([1, -1])


class PlainPosterior:
    """What diffusers' posterior computes, for mean and logvar of four dims."""

    def __init__(self, parameters, deterministic=False):
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = parameters.chunk(2, 1)
        self.logvar = logvar.clamp(-30, 20)
        self.std, self.var = (self.logvar / 2).exp(), self.logvar.exp()
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def sample(self, generator=None):
        if isinstance(generator, list):
            noise = torch.cat([torch.randn(1, *self.mean.shape[1:], generator=g) for g in generator])
        else:
            noise = torch.randn(self.mean.shape, generator=generator)
        return self.mean + self.std * noise

    def kl(self, other=None):
        if self.deterministic:
            return torch.zeros(1)
        mean_p, std_p = (0.0, 1.0) if other is None else (other.mean, other.std)
        return divergence(self.mean, self.std, mean_p, std_p).sum((1, 2, 3)).float()

    def nll(self, sample, dims=(1, 2, 3)):
        if self.deterministic:
            return torch.zeros(1)
        return -torch.distributions.Normal(self.mean, self.std).log_prob(sample).sum(dims)

    def mode(self):
        return self.mean


def posterior_differences(theirs, noise="torch", fix_upstream_bugs=False):
    ours = diffusers.with_options(DiagonalGaussianDistribution, noise, fix_upstream_bugs)
    compared = diffusers.behaviours(DiagonalGaussianDistribution, noise, fix_upstream_bugs)
    return [line for b in compared for line in patching.differences(theirs, ours, b)]


@pytest.mark.parametrize("noise", ["torch", "philox"])
@pytest.mark.parametrize("fix_upstream_bugs", [False, True])
def test_the_posterior_behaves_as_a_plain_one(noise, fix_upstream_bugs):
    assert posterior_differences(PlainPosterior, noise, fix_upstream_bugs) == []


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"kl": lambda self, other=None: PlainPosterior.kl(self, other) * 2}, "kl: values that differ by"),
        ({"sample": lambda self, generator=None: self.mean + torch.randn(3, 4, 12, 12)}, "sample: values that differ"),
        ({"nll": lambda self, sample, dims=(2, 3): PlainPosterior.nll(self, sample, dims)}, "nll: theirs ((3, 4)"),
    ],
    ids=["kl", "sample", "nll"],
)
def test_a_change_of_the_posterior_is_found(members, said):
    (line, *_) = posterior_differences(changed(PlainPosterior, **members))
    assert line.startswith(said)


def test_a_difference_refuses_the_patch_and_leaves_the_random_state():
    theirs = changed(torch.distributions.Normal, crop=lambda self: self)
    before = torch.get_rng_state()
    said = r"integrations\.toy\.patch: Normal of torch 2\S+ must behave as the adapter does; got a call of crop"
    with pytest.raises(RuntimeError, match=said):
        patching.check_behaviour("toy", "torch", theirs, rk.distributions.Normal, patching.normals(theirs))
    assert torch.equal(torch.get_rng_state(), before)
