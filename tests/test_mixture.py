"""rk.mixture_log_prob against float64, closed forms, torch's MixtureSameFamily and mpmath, on both backends."""

import math

import mpmath
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import reparam_kernels as rk
from reparam_kernels import _C
from reparam_kernels.core import backends
from reparam_kernels.ops.mixture.arguments import make_arguments
from reparam_kernels.ops.mixture.op import MIXTURE
from tests.cases import sigma_of

pytestmark = pytest.mark.usefixtures("says_where")

kinds = pytest.mark.parametrize("of", ["joint", "dims", "both"])


def make(size, weights="none", dtype=torch.float32, spread=0.5):
    b, n, d = size
    g = torch.Generator().manual_seed(b + n + d)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    tensors = [normal(b, d), normal(n, d), spread * normal(n, d)]
    if weights != "none":
        tensors.append(normal(*{"number": (), "component": (n,), "item": (b, n)}[weights]))
    return tensors


def call(tensors, **options):
    z, mu, logvar, *rest = tensors
    out = rk.mixture_log_prob(z, mu, logvar, log_weights=rest[0] if rest else None, **options)
    return out if isinstance(out, tuple) else (out,)


def dense(tensors, of="both", **_):
    """The outputs by torch's logsumexp over all terms."""
    z, mu, logvar, *rest = tensors
    n = mu.shape[0]
    w = rest[0].expand(n) if rest and rest[0].dim() == 0 else rest[0] if rest else mu.new_full((n,), -math.log(n))
    terms = Normal(mu, torch.exp(logvar / 2)).log_prob(z.unsqueeze(1))
    joint, dims = torch.logsumexp(w + terms.sum(-1), -1), torch.logsumexp(w.unsqueeze(-1) + terms, -2)
    return {"joint": (joint,), "dims": (dims,), "both": (joint, dims)}[of]


def with_gradients(f, tensors, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = f(leaves, **options)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype) for y in out]
    return out, torch.autograd.grad(out, leaves, grads)


def assert_near(got, want, limit):
    """Compare gradients relative to the root mean square of the tensor."""
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= limit * b.pow(2).mean().sqrt()


@kinds
@pytest.mark.parametrize("weights", ["none", "number", "component", "item"])
def test_values_and_gradients_match_float64(backend, of, weights):
    # more than one block of points and components, in the slow interpreter once
    size = (33, 40, 10) if backend == "cpu" or (of, weights) == ("both", "item") else (5, 3, 2)
    tensors = make(size, weights)
    want, want_grads = with_gradients(dense, tensors, torch.float64, of=of)
    got, grads = with_gradients(call, tensors, torch.float32, of=of)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert ((a - b).abs() <= 2e-7 * (size[2] + b.abs()) + 2e-6).all()
    assert_near(grads, want_grads, 3e-5)
    got, grads = with_gradients(call, tensors, torch.float64, of=of)
    for a, b in zip((*got, *grads), (*want, *want_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("param", ["logstd", "std", "softplus"])
def test_every_param_and_clamp(backend, param):
    z, mu, x = make((9, 20, 3), dtype=torch.float64)
    x = x.exp() if param == "std" else x
    min_std = 0.1 if param == "softplus" else 0.0
    bounds = (0.6, 1.3) if param == "std" else (-0.4, 0.3)

    def expected(leaves):
        y = leaves[2].clamp(*bounds)
        return dense([*leaves[:2], 2 * sigma_of(y, param, min_std).log()])

    def actual(leaves):
        return call(leaves, of="both", param=param, min_std=min_std, clamp=bounds)

    for dtype, limit in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        want, want_grads = with_gradients(expected, [z, mu, x], torch.float64)
        got, grads = with_gradients(actual, [z, mu, x], dtype)
        assert_near((*got, *grads), (*want, *want_grads), limit)


@pytest.mark.parametrize("dim", [64, 512])
def test_gradients_are_nearer_than_those_of_eager_where_posteriors_overlap(dim):
    g = torch.Generator().manual_seed(0)
    n = 64 if dim == 512 else 128
    mu, logvar = 0.1 * torch.randn(n, dim, generator=g), 0.3 * torch.randn(n, dim, generator=g)
    z = mu + torch.exp(logvar / 2) * torch.randn(n, dim, generator=g)
    want, want_grads = with_gradients(dense, [z, mu, logvar], torch.float64, of="joint")
    _, eager = with_gradients(dense, [z, mu, logvar], torch.float32, of="joint")
    got, grads = with_gradients(call, [z, mu, logvar], torch.float32, of="joint")
    assert ((got[0] - want[0]).abs() <= 2e-7 * (dim + want[0].abs()) + 2e-6).all()
    assert_near(grads, want_grads, 3e-5)
    exact, exact_grads = with_gradients(call, [z, mu, logvar], torch.float64, of="joint")
    assert ((exact[0] - want[0]).abs() <= 5e-15 * (dim + want[0].abs())).all()
    assert_near(exact_grads, want_grads, 1e-11)
    for ours, theirs, truth in zip(grads, eager, want_grads, strict=True):
        assert 5 * (ours - truth).pow(2).mean().sqrt() <= (theirs - truth).pow(2).mean().sqrt()


def test_means_far_from_zero_lose_no_digits(backend):
    z, mu, logvar = make((20, 33, 4), spread=0.1)
    shifted = [10 + 0.03 * z, 10 + 0.03 * mu, logvar - 7.0]
    for of in ("joint", "dims"):
        want, want_grads = with_gradients(dense, shifted, torch.float64, of=of)
        got, grads = with_gradients(call, shifted, torch.float32, of=of)
        assert ((got[0] - want[0]).abs() <= 2e-7 * (4 + want[0].abs()) + 2e-6).all()
        assert_near(grads, want_grads, 3e-5)


def test_small_cases_match_mpmath():
    z, mu, logvar, w = make((2, 3, 2), "component", torch.float64)
    mpmath.mp.dps = 40

    def term(b, n, d):
        sigma = mpmath.exp(mpmath.mpf(logvar[n, d].item()) / 2)
        e = (mpmath.mpf(z[b, d].item()) - mpmath.mpf(mu[n, d].item())) / sigma
        return -(e**2) / 2 - mpmath.log(sigma) - mpmath.log(2 * mpmath.pi) / 2

    joint, dims = rk.mixture_log_prob(z, mu, logvar, log_weights=w, of="both")
    for b in range(2):
        whole = mpmath.log(sum(mpmath.exp(w[n].item() + term(b, n, 0) + term(b, n, 1)) for n in range(3)))
        assert abs(joint[b].item() - whole) < 1e-14
        for d in range(2):
            alone = mpmath.log(sum(mpmath.exp(w[n].item() + term(b, n, d)) for n in range(3)))
            assert abs(dims[b, d].item() - alone) < 1e-14


def test_it_is_mixture_same_family():
    z, mu, logvar, w = make((6, 5, 3), "component", torch.float64)
    normal, log_z = Normal(mu, torch.exp(logvar / 2)), torch.logsumexp(w, 0)
    joint, dims = rk.mixture_log_prob(z, mu, logvar, log_weights=w, of="both")
    whole = MixtureSameFamily(Categorical(logits=w), Independent(normal, 1))
    torch.testing.assert_close(joint - log_z, whole.log_prob(z), rtol=1e-12, atol=1e-12)
    by_dim = MixtureSameFamily(Categorical(logits=w.expand(3, 5)), Normal(normal.loc.t(), normal.scale.t()))
    torch.testing.assert_close(dims - log_z, by_dim.log_prob(z), rtol=1e-12, atol=1e-12)


def test_relations(backend):
    z, mu, logvar, w = make((7, 20, 1), "component", torch.float64)
    joint, dims = rk.mixture_log_prob(z, mu, logvar, log_weights=w, of="both")
    torch.testing.assert_close(dims.squeeze(-1), joint, rtol=1e-13, atol=1e-13)
    scalar = rk.mixture_log_prob(z[:, 0], mu[:, 0], logvar[:, 0], log_weights=w)
    torch.testing.assert_close(scalar, joint, rtol=1e-13, atol=1e-13)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    permuted = rk.mixture_log_prob(z, mu[order], logvar[order], log_weights=w[order])
    torch.testing.assert_close(permuted, joint, rtol=1e-13, atol=1e-13)
    z, mu, logvar = make((7, 1, 5), dtype=torch.float64)
    one = rk.mixture_log_prob(z, mu, logvar)
    torch.testing.assert_close(one, Normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(-1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(rk.mixture_log_prob(z, mu, logvar, log_weights=2.0), one + 2, rtol=1e-13, atol=1e-13)


def test_excluded_components_have_no_effect(backend):
    z, mu, logvar, w = make((6, 20, 3), "component")
    w[::2] = -math.inf
    want, want_grads = with_gradients(call, [z, mu[1::2], logvar[1::2], w[1::2]], torch.float32, of="both")
    got, grads = with_gradients(call, [z, mu, logvar, w], torch.float32, of="both")
    torch.testing.assert_close(got, want)
    for grad, kept in zip(grads[1:], want_grads[1:], strict=True):
        torch.testing.assert_close(grad[1::2], kept)
        assert (grad[::2] == 0).all()
    items = torch.full((6, 20), -math.inf)
    for weights in (torch.full_like(w, -math.inf), items):
        got, grads = with_gradients(call, [z, mu, logvar, weights], torch.float32, of="both")
        assert all((y == -math.inf).all() for y in got)
        assert all((g == 0).all() for g in grads)


def test_points_far_from_every_component_and_nan(backend):
    z, mu, logvar = make((20, 18, 3))
    far = z.clone()
    far[3] = 1e6
    (value,), grads = with_gradients(call, [far, mu, logvar], torch.float32, of="joint")
    (want,), want_grads = with_gradients(dense, [far, mu, logvar], torch.float64, of="joint")
    assert torch.isfinite(value).all()
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-5)
    assert_near(grads, want_grads, 1e-4)
    z[5] = math.nan
    (joint, dims), grads = with_gradients(call, [z, mu, logvar], torch.float32, of="both")
    clean = torch.arange(20) != 5
    assert joint[clean].isfinite().all()
    assert dims[clean].isfinite().all()
    assert grads[0][clean].isfinite().all()
    assert joint[5].isnan()
    assert dims[5].isnan().all()
    assert grads[0][5].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_computes_in_float32(backend, dtype):
    tensors = make((9, 18, 3), "component", dtype)
    out, grads = with_gradients(call, tensors, dtype, of="both")
    want, want_grads = with_gradients(dense, tensors, torch.float64)
    assert all(y.dtype == torch.float32 for y in out)
    assert all(g.dtype == dtype for g in grads)
    assert_near(out, want, 1e-5)
    assert_near(grads, want_grads, 0.05)  # Triton's interpreter truncates to bfloat16


def test_any_layout(backend):
    tensors = make((9, 18, 6), "item", torch.float64)
    want, want_grads = with_gradients(call, tensors, torch.float64, of="both")

    def strided(leaves):
        z, mu, logvar, w = leaves
        layouts = [z.t().contiguous().t(), torch.cat([mu, mu], 1)[:, :6], logvar.repeat_interleave(2, 1)[:, ::2]]
        joint, dims = call([*layouts, w.t().contiguous().t()], of="both")
        return joint, dims

    def shaped(leaves):
        z, mu, logvar, w = leaves
        shapes = (3, 3, 2, 3), (18, 2, 3), (18, 2, 3), (3, 3, 18)
        joint, dims = call([t.reshape(s) for t, s in zip((z, mu, logvar, w), shapes, strict=True)], of="both")
        assert joint.shape == (3, 3)
        assert dims.shape == (3, 3, 2, 3)
        return joint.flatten(), dims.reshape(9, 6)

    for f in (strided, shaped):
        got, grads = with_gradients(f, tensors, torch.float64)
        torch.testing.assert_close((*got, *grads), (*want, *want_grads), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(0, 3, 2), (4, 3, 0)], ids=["no points", "no dims"])
def test_empty(backend, size):
    tensors = make(size, "component", torch.float64)
    want, want_grads = with_gradients(dense, tensors, torch.float64)
    got, grads = with_gradients(call, tensors, torch.float64, of="both")
    torch.testing.assert_close((*got, *grads), (*want, *want_grads))


def test_the_same_bits_for_any_threads_and_instruction_set():
    results = []
    tensors = make((300, 150, 20), "item")
    for isa in _C.available_isas():
        _C.set_isa(isa)
        for threads in (1, 2) if isa == _C.available_isas()[0] else (2,):
            torch.set_num_threads(threads)
            out, grads = with_gradients(call, tensors, torch.float32, of="both")
            results.append((*out, *grads))
    _C.set_isa(_C.available_isas()[0])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_rows_do_not_depend_on_the_batch():
    z, mu, logvar = make((200, 150, 20))
    whole = call([z, mu, logvar], of="both")
    part = call([z[77:140], mu, logvar], of="both")
    assert all(torch.equal(a[77:140], b) for a, b in zip(whole, part, strict=True))


@kinds
@pytest.mark.parametrize("weights", ["none", "number", "component", "item"])
def test_gradcheck(of, weights):
    leaves = [t.requires_grad_() for t in make((3, 4, 2), weights, torch.float64)]

    def f(*tensors):
        return call(tensors, of=of)

    assert gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, leaves)


def test_gradients_of_one_output_and_of_some_inputs(backend):
    z, mu, logvar = (t.requires_grad_() for t in make((3, 5, 2), dtype=torch.float64))
    joint, dims = rk.mixture_log_prob(z, mu, logvar, of="both")
    for output, of in ((joint, "joint"), (dims, "dims")):
        alone = rk.mixture_log_prob(z, mu, logvar, of=of)
        for leaf in (z, mu, logvar):
            (got,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
            (want,) = torch.autograd.grad(alone.sum(), leaf, retain_graph=True)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_only_the_inputs_and_two_numbers_for_each_output_are_saved():
    z, mu, logvar = (t.requires_grad_() for t in make((8, 100, 3)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rk.mixture_log_prob(z, mu, logvar, of="both")
    assert sorted(tuple(t.shape) for t in saved) == sorted([(8, 3), (100, 3), (100, 3), (2, 8), (2, 8, 3)])


@kinds
def test_vmap_and_torch_func(of):
    z, mu, logvar = make((6, 4, 3), dtype=torch.float64)
    batched = torch.vmap(lambda row: call([row, mu, logvar], of=of))(z)
    torch.testing.assert_close(batched, call([z, mu, logvar], of=of))
    grads = torch.func.grad(lambda m: sum(y.sum() for y in call([z, m, logvar], of=of)))(mu)
    m = mu.requires_grad_()
    (want,) = torch.autograd.grad(sum(y.sum() for y in call([z, m, logvar], of=of)), m)
    torch.testing.assert_close(grads, want)


@pytest.mark.parametrize("weights", ["none", "item"])
def test_opcheck(weights):
    z, mu, logvar, *rest = (t.requires_grad_() for t in make((4, 5, 3), weights))
    for of in ("joint", "both"):
        arguments = make_arguments("test", z, mu, logvar, log_weights=rest[0] if rest else None, of=of)
        torch.library.opcheck(torch.ops.reparam_kernels.mixture.default, MIXTURE.flatten(arguments))
        _, saved = MIXTURE.forward_saving(arguments)
        arguments = arguments._replace(joint_sums=saved[0], dims_sums=saved[1])
        grads = (torch.ones(4), torch.ones(4, 3) if of == "both" else None)
        flat = (*MIXTURE.flatten(arguments), *grads, [True, True, True, bool(rest)])
        torch.library.opcheck(torch.ops.reparam_kernels.mixture_backward.default, flat)


def test_compile_gives_the_bits_of_eager():
    tensors = make((9, 20, 3), "component")
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want = with_gradients(call, tensors, torch.float32, of="both")
    got = with_gradients(compiled, tensors, torch.float32, of="both")
    assert all(torch.equal(a, b) for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True))
    torch.compiler.reset()


def test_inductor_gives_the_bits_of_eager():
    tensors = make((9, 20, 3), "item")
    torch.compiler.reset()
    want = with_gradients(call, tensors, torch.float32, of="both")
    got = with_gradients(torch.compile(call, fullgraph=True), tensors, torch.float32, of="both")
    assert all(torch.equal(a, b) for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True))
    torch.compiler.reset()


class Prior(torch.nn.Module):
    def forward(self, z, mu, logvar, log_weights):
        return rk.mixture_log_prob(z, mu, logvar, log_weights=log_weights, of="both")


def test_an_exported_program_takes_any_batch():
    z, mu, logvar, weights = make((9, 20, 3), "component")
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(Prior(), (z, mu, logvar, weights), dynamic_shapes=({0: batch}, None, None, None))
    assert "reparam_kernels.mixture" in str(program.graph)
    for points in (z, make((5, 20, 3))[0]):
        got = program.module()(points, mu, logvar, weights)
        assert all(torch.equal(a, b) for a, b in zip(got, call([points, mu, logvar, weights], of="both"), strict=True))


def test_fake_tensors_and_the_reference(monkeypatch):
    with FakeTensorMode():
        joint, dims = rk.mixture_log_prob(torch.empty(4, 2, 3), torch.empty(5, 3), torch.empty(5, 3), of="both")
        assert joint.shape == (4, 2)
        assert dims.shape == (4, 2, 3)
    tensors = make((4, 5, 3), "component")
    want = call(tensors, of="both")
    torch.testing.assert_close(rk.reference.mixture_log_prob(*tensors[:3], log_weights=tensors[3], of="both"), want)
    monkeypatch.setattr(backends, "FORCED", "reference")
    backends.backend_name.cache_clear()
    backends.kernels.cache_clear()
    torch.testing.assert_close(call(tensors, of="both"), want)
    monkeypatch.undo()
    backends.backend_name.cache_clear()
    backends.kernels.cache_clear()


Z, MU = torch.zeros(4, 3), torch.zeros(5, 3)
ERRORS = {
    "event": (
        {"z": torch.zeros(4, 2)},
        ValueError,
        "z must end with the event of mu, (3,); got z (4, 2), mu (5, 3). "
        "Reshape one of them to (*batch, *event) and (N, *event).",
    ),
    "no component": (
        {"mu": MU[:0], "logvar": MU[:0]},
        ValueError,
        "mu must have a leading dim of at least one component; got shape (0, 3). Pass mu of shape (N, *event).",
    ),
    "shape": (
        {"logvar": MU[:1]},
        ValueError,
        "logvar must have the shape of mu; got mu (5, 3), logvar (1, 3). "
        "Check the encoder's last layer, or expand logvar before the call.",
    ),
    "dtype": (
        {"z": Z.double()},
        TypeError,
        "z must have the dtype of mu; got mu float32, z float64. "
        "Convert one of them with .to(), or call inside torch.autocast, where they promote to the widest.",
    ),
    "device": (
        {"z": Z.to("meta")},
        ValueError,
        "z must be on the device of mu; got mu cpu, z meta. Move one of them with .to().",
    ),
    "of": (
        {"of": "all"},
        ValueError,
        "of must be one of joint, dims, both; got 'all'. "
        "It says whether the density is that of a whole event, of each of its dims, or both.",
    ),
    "event_ndim": (
        {"event_ndim": 2},
        ValueError,
        "event_ndim must be 1, the dims of mu after the first; got 2. Leave it out, or give mu the shape (N, *event).",
    ),
    "weights": (
        {"log_weights": torch.zeros(4)},
        ValueError,
        "log_weights must have shape (5,) or (4, 5), one for each component; got (4,). "
        "Expand or transpose them before the call.",
    ),
    "weights of another dtype": (
        {"log_weights": torch.zeros(5).double()},
        TypeError,
        "log_weights must be float32, as mu or as the result; got float64. Convert them with .to().",
    ),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_errors(case):
    changes, kind, message = case
    options = {"z": Z, "mu": MU, "logvar": MU} | changes
    with pytest.raises(kind) as error:
        rk.mixture_log_prob(**options)
    assert str(error.value) == f"mixture_log_prob: {message}"
