"""torch.compile, export, registration and modes give the numbers of eager in one graph, without recompilation."""

import io
import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import reparam_kernels as rk
from reparam_kernels.core import backends
from reparam_kernels.distributions import Normal
from reparam_kernels.ops.latent.arguments import make_arguments
from reparam_kernels.ops.latent.op import LATENT
from tests.conftest import forget

AS_EAGER = {"backend": "aot_eager", "fullgraph": True}  # inductor's own code generation has a test of its own
CASES = {
    "randn": lambda mu, x: rk.randn(*mu.shape),
    "z": lambda mu, x: rk.reparameterize(mu, x),
    "kl": lambda mu, x: rk.kl_divergence(mu, x),
    "both": lambda mu, x: rk.reparameterize_kl(mu, x),
    "prior": lambda mu, x: rk.reparameterize_kl(mu, x, prior=(x[:1], 0.5)),
    "softplus": lambda mu, x: rk.reparameterize_kl(mu, x, param="softplus", min_std=0.1, clamp=(-1.0, 1.0)),
    "samples": lambda mu, x: rk.reparameterize(mu, x, sample_shape=(2,)),
    "eps": lambda mu, x: rk.reparameterize(mu, x, eps=x),
    "window": lambda mu, x: rk.reparameterize_kl(mu, x, window=((9, 8), (3, 1))),
    "elementwise": lambda mu, x: rk.kl_divergence(mu, x, event_ndim=0),
    "packed": lambda mu, x: rk.DiagonalGaussian.from_moments(torch.cat([mu, x], 1)).rsample_kl(),
}
ops = pytest.mark.parametrize("op", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs(*shape, requires_grad=True):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).requires_grad_(requires_grad) for _ in "ab"]


def results(f, leaves):
    """Compute outputs and gradients under one manual_seed."""
    torch.manual_seed(3)
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    learned = [y for y in out if y.requires_grad]
    grads = torch.autograd.grad([y.sum() for y in learned], leaves, allow_unused=True) if learned else ()
    return [*out, *(g for g in grads if g is not None)]


def assert_same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


# ---- torch.compile


@ops
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_graph_matches_eager(op, dynamic):
    leaves = inputs(4, 6)
    assert_same(results(torch.compile(op, dynamic=dynamic, **AS_EAGER), leaves), results(op, leaves))


def test_inductor_draws_what_eager_draws():
    leaves = inputs(4, 6)
    for case in ("both", "window"):
        assert_same(results(torch.compile(CASES[case], fullgraph=True), leaves), results(CASES[case], leaves))


def other_of(mu, x, mu_p, x_p):
    z, kl = rk.DiagonalGaussian(mu, x).rsample_kl(rk.DiagonalGaussian(mu_p, x_p), seed=7)
    return z + kl.detach()[:, None, None, None]


def kl_detached(mu, x, mu_p, x_p):
    z, kl = rk.reparameterize_kl(mu, x, prior=(mu_p, x_p), seed=7)
    return z + kl.detach()[:, None, None, None]


def from_channels_last(mu, x, mu_p, x_p):
    convolved = torch.nn.functional.conv2d(torch.cat([mu_p, x_p], 1), torch.ones(4, 4, 1, 1))
    prior = convolved.to(memory_format=torch.channels_last).chunk(2, 1)
    return rk.reparameterize_kl(mu, x, prior=prior, seed=7)[0]


# Gradients that are zero because there is no path must have the layout that the fake promises, for any input layout.
UNUSED = {
    "z alone": lambda mu, x, mu_p, x_p: rk.reparameterize_kl(mu, x, prior=(mu_p, x_p), seed=7)[0],
    "kl detached": kl_detached,
    "rsample_kl": other_of,
    "channels_last": from_channels_last,
    "kl alone": lambda mu, x, mu_p, x_p: rk.reparameterize_kl(mu, x, prior=(mu_p, x_p), seed=7)[1],
}


@pytest.mark.parametrize("op", UNUSED.values(), ids=UNUSED)
def test_inductor_takes_inputs_of_any_layout(op):
    leaves = [t.permute(3, 0, 2, 1)[:, :2].detach().requires_grad_() for t in inputs(4, 3, 2, 6) + inputs(4, 3, 2, 6)]

    def run(f):
        out = f(*leaves)
        return out, *torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)

    for got, want in zip(run(torch.compile(op, fullgraph=True)), run(op), strict=True):
        torch.testing.assert_close(got, want)


def test_inductor_around_a_transform_with_a_seed_for_each_item():
    def gradient(m, v):
        f = torch.func.grad(lambda m: rk.reparameterize(m, v, seed=torch.arange(4), sample_shape=(3,)).square().sum())
        return f(m)

    mu, x = (t.detach().t() for t in inputs(6, 4))
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True)(mu, x), gradient(mu, x))


def test_a_new_seed_or_batch_does_not_recompile():
    count = CompileCounter()
    f = torch.compile(lambda m, v, s: rk.reparameterize_kl(m, v, seed=s), backend=count, fullgraph=True, dynamic=True)
    for batch, seed in ((4, 7), (9, 8), (13, 1 << 40), (2, 0)):
        mu, x = inputs(batch, 6)
        assert torch.equal(f(mu, x, seed)[0], rk.reparameterize(mu, x, seed=seed))
    assert count.frame_count == 1


def test_a_new_window_does_not_recompile():
    """The first start of 0 and the first change of a number are compiled as always, then none is."""
    count = CompileCounter()
    f = torch.compile(
        lambda m, v, whole, start: rk.reparameterize_kl(m, v, seed=3, window=((whole, 9), (start, 2))),
        backend=count,
        fullgraph=True,
        dynamic=True,
    )
    mu, x = inputs(4, 6)
    for whole, start in ((20, 5), (21, 6), (1000, 77), (2**40, 2**39)):
        got = f(mu, x, whole, start)[0]
        assert torch.equal(got, rk.reparameterize(mu, x, seed=3, window=((whole, 9), (start, 2))))
    assert count.frame_count == 1


def test_a_seed_tensor_is_an_input():
    count = CompileCounter()
    f = torch.compile(lambda m, v, s: rk.reparameterize(m, v, seed=s), backend=count, fullgraph=True)
    mu, x = inputs(4, 6)
    for seed in (7, 8):
        assert torch.equal(f(mu, x, torch.tensor([seed])), rk.reparameterize(mu, x, seed=seed))
    per_item = torch.arange(4)
    assert torch.equal(f(mu, x, per_item), rk.reparameterize(mu, x, seed=per_item))
    assert count.frame_count == 2  # one for each shape of the seed


def test_the_noise_is_fresh_in_each_call_of_a_compiled_function():
    f = torch.compile(rk.reparameterize, **AS_EAGER)
    mu, x = inputs(4, 6)
    assert not torch.equal(f(mu, x), f(mu, x))


def test_inside_a_compiled_training_step():
    def step(model, optimizer):
        torch.manual_seed(1)
        x = torch.randn(8, 5)

        def loss(x):
            z, kl = model[1](torch.tanh(model[0](x)))
            return ((model[2](z) - x).square().sum(-1) + kl).mean()

        losses = []
        run = torch.compile(loss, **AS_EAGER) if optimizer == "compiled" else loss
        sgd = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            sgd.zero_grad()
            value = run(x)
            value.backward()
            sgd.step()
            losses.append(value.item())
        return losses

    def model():
        torch.manual_seed(0)
        return torch.nn.ModuleList([torch.nn.Linear(5, 7), rk.GaussianHead(7, 3), torch.nn.Linear(3, 5)])

    assert step(model(), "compiled") == step(model(), "eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # from torch
def test_compiled_autograd():
    def f():
        mu, x = inputs(4, 6)
        z, kl = rk.reparameterize_kl(mu, x, seed=7)
        (z.square().sum() + kl.sum()).backward()
        return mu.grad, x.grad

    want = f()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        got = f()
    assert_same(got, want)


def test_compile_around_transforms():
    """A function that torch.compile cannot trace must not get a zero gradient."""
    mu, x = inputs(4, 6, requires_grad=False)

    def loss(m, v):
        z, kl = rk.reparameterize_kl(m, v, seed=7)
        return z.square().sum() + kl

    for transformed in (
        torch.func.vmap(torch.func.grad(loss, (0, 1))),
        torch.func.vmap(loss),
        lambda m, v: torch.func.jvp(loss, (m[0], v[0]), (v[0], m[0])),
    ):
        for got, want in zip(torch.compile(transformed, **AS_EAGER)(mu, x), transformed(mu, x), strict=True):
            torch.testing.assert_close(got, want)


def test_no_host_sync_no_number_from_a_tensor():
    """The graph holds a draw and the op, and nothing that reads a value, as a CUDA graph requires."""
    graphs = []

    def keep(graph, example):
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op in ("call_function", "call_method")])
        return graph.forward

    torch.compile(lambda m, v: rk.reparameterize_kl(m, v), backend=keep, fullgraph=True)(*inputs(4, 6))
    assert len(graphs) == 1
    assert any("randint" in name for name in graphs[0])
    assert not {"item", "tolist", "aten._local_scalar_dense.default"} & set(graphs[0])


# ---- export


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = rk.GaussianHead(5, 3)

    def forward(self, h):
        return self.head(h)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_saves_loads_draws_and_trains(strict):
    layer, h = Layer(), torch.randn(4, 5)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (h,), dynamic_shapes={"h": {0: batch}}, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    h = torch.randn(9, 5)
    torch.manual_seed(3)
    z, kl = loaded(h)
    torch.manual_seed(3)
    for got, want in zip((z, kl), layer(h), strict=True):
        assert torch.equal(got, want)
    assert not torch.equal(loaded(h)[0], z)
    (z.square().sum() + kl.sum()).backward()
    torch.manual_seed(3)
    z, kl = layer(h)
    (z.square().sum() + kl.sum()).backward()
    for got, want in zip(loaded.parameters(), layer.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("strict", [True, False])
def test_a_sample_shape_of_a_dynamic_size_is_exported(strict):
    class Samples(torch.nn.Module):
        def forward(self, mu):
            z, kl = rk.reparameterize_kl(mu, mu, seed=7, sample_shape=(mu.shape[0],))
            return z, kl, Normal(mu, 1.0, validate_args=False).rsample((mu.shape[0],))

    shapes = {"mu": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(Samples(), (torch.zeros(4, 6),), dynamic_shapes=shapes, strict=strict).module()
    graph = make_fx(Samples(), tracing_mode="symbolic")(torch.zeros(4, 6))
    mu = torch.randn(7, 6)
    for f in (program, graph):
        z, kl, draw = f(mu)
        assert_same((z, kl), rk.reparameterize_kl(mu, mu, seed=7, sample_shape=(7,)))
        assert draw.shape == (7, 7, 6)


@pytest.mark.filterwarnings("ignore")  # from torch
def test_aot_inductor_package_runs_in_python(tmp_path):
    layer, h = Layer().eval(), torch.randn(4, 5)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            torch.export.export(layer, (h,)), package_path=str(tmp_path / "layer.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        torch.manual_seed(3)
        got = loaded(h)
        torch.manual_seed(3)
        assert_same(got, layer(h))
        assert not torch.equal(loaded(h)[0], got[0])


def test_jit_trace_records_the_op():
    mu, x = inputs(4, 6, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates jit.trace
        traced = torch.jit.trace(lambda m, v: rk.reparameterize_kl(m, v, seed=7), (mu, x), check_trace=False)
    other = inputs(4, 6, requires_grad=False)[::-1]
    assert_same(traced(*other), rk.reparameterize_kl(*other, seed=7))


# ---- registration and modes


def op_arguments(requires_grad, **options):
    mu, x = inputs(4, 6, requires_grad=requires_grad)
    if "prior" in options:
        options["prior"] = [t.detach()[:1].clone().requires_grad_(requires_grad) for t in (x, mu)]
    call = make_arguments("test", mu, x, z=True, kl=True, seed=7, **options)
    return LATENT.flatten(call)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prior": ()},
        {"param": "softplus", "min_std": 0.1, "clamp": (-1.0, 1.0)},
        {"sample_shape": (2,), "event_ndim": 0},
        {"window": ((9, 9), (3, 1))},
    ],
    ids=["plain", "prior", "softplus", "samples", "window"],
)
def test_opcheck(requires_grad, options):
    args = op_arguments(requires_grad, **options)
    torch.library.opcheck(torch.ops.reparam_kernels.latent.default, args)
    z, kl, _ = torch.ops.reparam_kernels.latent(*args)
    dz, dkl = (torch.ones_like(t).requires_grad_(requires_grad) for t in (z, kl))
    wanted = [t is not None for t in args[:4]]
    torch.library.opcheck(torch.ops.reparam_kernels.latent_backward.default, (*args, dz, dkl, None, wanted))
    torch.library.opcheck(torch.ops.reparam_kernels.noise.default, (torch.arange(3), [2, 6, 5], 2))
    torch.library.opcheck(torch.ops.reparam_kernels.noise.default, (torch.arange(1), [2, 6, 5], 2, [9, 9], [3, 1]))
    if not requires_grad:  # launches have no autograd
        torch.library.opcheck(torch.ops.reparam_kernels.latent_launch.default, LATENT.to_launch(args))
        launch = (*LATENT.to_launch(args, wanted), dz, dkl, None)
        torch.library.opcheck(torch.ops.reparam_kernels.latent_backward_launch.default, launch)


def test_the_backward_op_has_a_gradient_of_its_own():
    """The registered ops alone, without the eager path, give second and third order gradients."""
    mu, x = (t.double().detach().requires_grad_() for t in inputs(2, 3))

    def f(mu, x):
        call = make_arguments("test", mu, x, z=True, kl=True, seed=7, prior=(x, 0.5))
        z, kl, _ = LATENT.registered(call)
        return z.square().sum(-1) + kl

    assert torch.autograd.gradcheck(f, (mu, x))
    assert torch.autograd.gradgradcheck(f, (mu, x))
    (g,) = torch.autograd.grad(f(mu, x).sum(), x, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    assert torch.autograd.grad(gg.sum(), x)[0].abs().sum() > 0


def test_vmap_of_the_ops():
    mu, x = inputs(3, 2, 4, requires_grad=False)
    call = make_arguments("test", mu[0], x[0], z=True, kl=True, seed=7)
    rest, wanted = LATENT.flatten(call)[2:], [True, True, False, False]
    z, kl, _ = torch.vmap(lambda m, v: torch.ops.reparam_kernels.latent(m, v, *rest))(mu, x)
    dmu, dx, _, _ = torch.vmap(
        lambda m, v, g: torch.ops.reparam_kernels.latent_backward(m, v, *rest, g, None, None, wanted)
    )(mu, x, z)
    for i in range(3):
        one = torch.ops.reparam_kernels.latent(mu[i], x[i], *rest)
        back = torch.ops.reparam_kernels.latent_backward(mu[i], x[i], *rest, z[i], None, None, wanted)
        for got, want in zip((z[i], kl[i], dmu[i], dx[i]), (*one[:2], *back[:2]), strict=True):
            torch.testing.assert_close(got, want)


@ops
def test_fake_and_meta_tensors_have_the_shapes(op):
    real = op(*inputs(4, 6))
    with FakeTensorMode():
        fake = op(*(torch.empty(4, 6) for _ in "ab"))
    meta = op(*(torch.empty(4, 6, device="meta") for _ in "ab"))
    for outputs in (fake, meta):
        pairs = zip(real, outputs, strict=True) if isinstance(real, tuple) else [(real, outputs)]
        for r, f in pairs:
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


def test_make_fx_records_a_draw_and_an_op():
    mu, x = inputs(4, 6, requires_grad=False)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda m, v: rk.reparameterize_kl(m, v), tracing_mode=mode)(mu, x)
        names = " ".join(str(n.target) for n in graph.graph.nodes)
        assert "randint" in names
        assert "reparam_kernels.latent" in names
        torch.manual_seed(3)
        got = graph(mu, x)
        torch.manual_seed(3)
        assert_same(got, rk.reparameterize_kl(mu, x))


def test_a_dispatch_mode_sees_the_op():
    from torch.utils.flop_counter import FlopCounterMode

    mu, x = inputs(4, 6)
    want = results(CASES["both"], (mu, x))
    with FlopCounterMode(display=False):
        assert_same(results(CASES["both"], (mu, x)), want)


def test_a_subclass_goes_through_its_own_dispatch():
    from torch.testing._internal.two_tensor import TwoTensor

    mu, x = inputs(4, 6, requires_grad=False)
    out = rk.kl_divergence(TwoTensor(mu, x), TwoTensor(x, mu))
    assert torch.equal(out.a, rk.kl_divergence(mu, x))
    assert torch.equal(out.b, rk.kl_divergence(x, mu))


def test_a_plain_subclass_is_read_as_a_tensor():
    class Named(torch.Tensor):
        pass

    mu, x = inputs(4, 6, requires_grad=False)
    z = rk.reparameterize(mu.as_subclass(Named), x.as_subclass(Named), seed=7)
    assert torch.equal(z.as_subclass(torch.Tensor), rk.reparameterize(mu, x, seed=7))


def test_a_compiled_graph_holds_launches_which_run_no_python_for_autograd():
    graphs = []

    def keep(graph, example):
        graphs.append([str(n.target) for n in graph.graph.nodes if "reparam" in str(n.target)])
        return make_boxed_func(graph.forward)

    z, kl = torch.compile(CASES["both"], backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*inputs(4, 6))
    (z.sum() + kl.sum()).backward()
    assert graphs == [["reparam_kernels.latent_launch.default"], ["reparam_kernels.latent_backward_launch.default"]]


def test_no_graph_break_is_counted():
    torch.compile(CASES["both"], **AS_EAGER)(*inputs(4, 6))
    assert not counters["graph_break"]


def test_without_kernels_the_formula_is_compiled(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", "reference")
    forget()
    seen = []

    def keep(graph, example):
        seen.extend(str(n.target) for n in graph.graph.nodes)
        return graph.forward

    leaves = inputs(4, 6)
    got = torch.compile(lambda m, v: rk.reparameterize_kl(m, v, seed=7), backend=keep, fullgraph=True)(*leaves)
    forget()
    assert not any("reparam" in name for name in seen)
    for g, w in zip(got, rk.reference.reparameterize_kl(*leaves, seed=7), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("settings", [{"activation_memory_budget": 0.0}, {"aggressive_recomputation": True}], ids=str)
def test_a_seed_from_outside_survives_a_recomputed_forward(settings):
    """torch redraws a seed that is drawn inside, since randint is not in its list of random ops."""

    def loss(mu, x, seed):
        z = rk.reparameterize(mu.sin(), x, seed=seed)
        return z.sin() * z.cos()

    leaves, seed = inputs(8, 5), rk.draw_seed()
    want = torch.autograd.grad(loss(*leaves, seed).sum(), leaves)
    with torch._functorch.config.patch(**settings):
        compiled = torch.compile(loss, backend="aot_eager_decomp_partition", fullgraph=True)
        got = torch.autograd.grad(compiled(*leaves, seed).sum(), leaves)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_every_int_seed_compiles(seed):
    mu, x = inputs(4, 3, requires_grad=False)
    compiled = torch.compile(lambda mu, x, seed: rk.reparameterize(mu, x, seed=seed), backend="eager", fullgraph=True)
    assert torch.equal(compiled(mu, x, seed), rk.reparameterize(mu, x, seed=seed))
