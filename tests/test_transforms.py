"""Higher derivatives and torch.func match autograd of the same formula in plain torch."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import reparam_kernels as rk

pytestmark = pytest.mark.usefixtures("says_where")

SEED = 7
CASES = {
    "z": lambda mu, x: rk.reparameterize(mu, x, seed=SEED),
    "kl": lambda mu, x: rk.kl_divergence(mu, x),
    "both": lambda mu, x: sum_of(rk.reparameterize_kl(mu, x, seed=SEED)),
    "prior": lambda mu, x: sum_of(rk.reparameterize_kl(mu, x, seed=SEED, prior=(x, mu))),
    "residual": lambda mu, x: sum_of(rk.reparameterize_kl(mu + x, x * 0.5, seed=SEED, prior=(mu, x))),
    "softplus": lambda mu, x: sum_of(rk.reparameterize_kl(mu, x, seed=SEED, param="softplus", min_std=0.1)),
    "samples": lambda mu, x: rk.reparameterize(mu, x, seed=SEED, sample_shape=(2,)).sum(0),
    "clamp": lambda mu, x: sum_of(rk.reparameterize_kl(mu, x, seed=SEED, clamp=(-0.5, 0.5))),
    "window": lambda mu, x: sum_of(rk.reparameterize_kl(mu, x, seed=SEED, window=((5, 7), (2, 3)))),
    "packed": lambda mu, x: sum_of(rk.DiagonalGaussian.from_moments(torch.cat([mu, x], 1)).rsample_kl(seed=SEED)),
}
ops = pytest.mark.parametrize("op", CASES.values(), ids=CASES)


def sum_of(pair):
    z, kl = pair
    return z.square().sum(-1) + kl


def eps_of(shape):
    return rk.randn(shape, seed=SEED).double()


def truth(mu, x):
    """Compute CASES["both"] in plain torch."""
    z = mu + torch.exp(x / 2) * eps_of(mu.shape).to(mu.dtype)
    return z.square().sum(-1) + (mu**2 + torch.expm1(x) - x).sum(-1) / 2


def inputs(*shape, dtype=torch.float64, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for _ in "ab"]


# ---- autograd


@ops
def test_first_and_second_derivatives_pass_gradcheck(op):
    leaves = inputs(2, 3, requires_grad=True)
    assert gradcheck(op, leaves, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(op, leaves, check_fwd_over_rev=True, check_batched_grad=True)


def test_third_order():
    def third(f):
        mu, x = inputs(2, 3, requires_grad=True)
        (g,) = torch.autograd.grad(f(mu, x).sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gg.sum(), (mu, x))

    for got, want in zip(third(CASES["both"]), third(truth), strict=True):
        torch.testing.assert_close(got, want)


@ops
def test_forward_mode(op):
    mu, x = inputs(3, 4)
    tangents = inputs(4, 3)[0].T, inputs(3, 4)[1]
    with forward_ad.dual_level():
        out = op(forward_ad.make_dual(mu, tangents[0]), forward_ad.make_dual(x, tangents[1]))
        got = forward_ad.unpack_dual(out).tangent
    step = 1e-6
    a, b = (op(mu + s * tangents[0], x + s * tangents[1]) for s in (step, -step))
    torch.testing.assert_close(got, (a - b) / (2 * step), rtol=1e-6, atol=1e-6)


def test_many_gradients_at_once():
    mu, x = inputs(3, 4, requires_grad=True)
    z, kl = rk.reparameterize_kl(mu, x, seed=SEED)
    dz, dkl = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    batch = torch.autograd.grad((z, kl), (mu, x), (dz, dkl), is_grads_batched=True, retain_graph=True)
    for i in range(5):
        one = torch.autograd.grad((z, kl), (mu, x), (dz[i], dkl[i]), retain_graph=True)
        for got, want in zip(batch, one, strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_to_one_input_only(which):
    leaves = inputs(3, 4)
    leaves[which].requires_grad_()
    (got,) = torch.autograd.grad(CASES["both"](*leaves).sum(), leaves[which])
    (want,) = torch.autograd.grad(truth(*leaves).sum(), leaves[which])
    torch.testing.assert_close(got, want)


def test_unused_outputs_get_no_zero_gradient(monkeypatch):
    from reparam_kernels.ops.latent import cpu

    seen = []
    real = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda call, grads, w: seen.append(grads) or real(call, grads, w))
    mu, x = inputs(3, 4, requires_grad=True)
    z, kl = rk.reparameterize_kl(mu, x, seed=SEED)
    z.sum().backward(retain_graph=True)
    kl.sum().backward()
    assert [(dz is None, dkl is None) for dz, dkl, _ in seen] == [(False, True), (True, False)]


def test_z_may_be_changed_in_place_afterwards():
    mu, x = inputs(3, 4, requires_grad=True)
    z, kl = rk.reparameterize_kl(mu, x, seed=SEED)
    z.mul_(3)
    got = torch.autograd.grad(z.sum() + kl.sum(), (mu, x))
    plain = mu + torch.exp(x / 2) * eps_of((3, 4))
    want = torch.autograd.grad(3 * plain.sum() + (mu**2 + torch.expm1(x) - x).sum() / 2, (mu, x))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_saved_tensors_may_be_packed_and_moved():
    def double_it(t):
        return t.clone()

    mu, x = inputs(3, 4, requires_grad=True)
    want = torch.autograd.grad(CASES["both"](mu, x).sum(), (mu, x))
    for context in (torch.autograd.graph.saved_tensors_hooks(double_it, double_it), torch.autograd.graph.save_on_cpu()):
        with context:
            out = CASES["both"](mu, x).sum()
        for got, w in zip(torch.autograd.grad(out, (mu, x)), want, strict=True):
            assert torch.equal(got, w)


# ---- torch.func


@ops
def test_vmap_is_a_loop(op):
    mu, x = inputs(4, 2, 3)
    torch.testing.assert_close(vmap(op)(mu, x), torch.stack([op(m, v) for m, v in zip(mu, x, strict=True)]))


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (-1, 2), (0, None), (None, 1)])
def test_vmap_over_any_dim(in_dims):
    def sized(dim):
        return inputs(2, 3)[0] if dim is None else torch.stack(inputs(2, 3) * 2, dim)

    def at(t, dim, i):
        return t if dim is None else t.select(dim, i)

    mu, x = (sized(d) for d in in_dims)
    got = vmap(CASES["both"], in_dims)(mu, x)
    want = torch.stack([CASES["both"](at(mu, in_dims[0], i), at(x, in_dims[1], i)) for i in range(4)])
    torch.testing.assert_close(got, want)


def test_nested_vmap():
    mu, x = inputs(2, 3, 2, 4)
    want = torch.stack(
        [torch.stack([CASES["both"](a, b) for a, b in zip(m, v, strict=True)]) for m, v in zip(mu, x, strict=True)]
    )
    torch.testing.assert_close(vmap(vmap(CASES["both"]))(mu, x), want)


def test_vmap_randomness():
    mu = torch.zeros(3, 2, 500)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(rk.reparameterize)(mu, mu)
    same = vmap(rk.reparameterize, randomness="same")(mu, mu)
    assert torch.equal(same[0], same[1])
    different = vmap(rk.reparameterize, randomness="different")(mu, mu)
    assert different.flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.15
    nested = vmap(vmap(rk.reparameterize, randomness="different"), randomness="different")(mu, mu)
    assert nested.flatten(0, 1).corrcoef().fill_diagonal_(0).abs().max() < 0.25


def test_vmap_over_seeds():
    seeds = torch.tensor([3, 1 << 40, 5])
    mu, x = inputs(2, 6, dtype=torch.float32)
    got = vmap(lambda s: rk.reparameterize(mu, x, seed=s, sample_shape=(2,)))(seeds)
    for i, seed in enumerate(seeds.tolist()):
        torch.testing.assert_close(got[i], rk.reparameterize(mu, x, seed=seed, sample_shape=(2,)))


def test_vmap_over_per_item_seeds():
    seeds = torch.arange(6).reshape(3, 2)
    mu, x = inputs(2, 6, dtype=torch.float32)
    got = vmap(lambda s: rk.reparameterize(mu, x, seed=s, sample_shape=(3,)))(seeds)
    for i in range(3):
        torch.testing.assert_close(got[i], rk.reparameterize(mu, x, seed=seeds[i], sample_shape=(3,)))


def test_vmap_of_randn():
    got = vmap(lambda s: rk.randn(2, 3, seed=s))(torch.arange(4))
    assert torch.equal(got, torch.stack([rk.randn(2, 3, seed=i) for i in range(4)]))


@ops
def test_reverse_and_forward_transforms_agree_with_autograd(op):
    mu, x = inputs(2, 3)
    leaves = [t.clone().requires_grad_() for t in (mu, x)]
    want = torch.autograd.grad(op(*leaves).sum(), leaves)
    for got, w in zip(grad(lambda m, v: op(m, v).sum(), (0, 1))(mu, x), want, strict=True):
        torch.testing.assert_close(got, w)
    out, pull = vjp(op, mu, x)
    for got, w in zip(pull(torch.ones_like(out)), want, strict=True):
        torch.testing.assert_close(got, w)
    along = sum((w * d).sum() for w, d in zip(want, (mu, x), strict=True))
    torch.testing.assert_close(jvp(op, (mu, x), (mu, x))[1].sum(), along)
    for got, w in zip(jacrev(op, (0, 1))(mu, x), jacfwd(op, (0, 1))(mu, x), strict=True):
        torch.testing.assert_close(got, w)


def test_hessian():
    mu, x = inputs(2, 3)
    got = hessian(lambda m, v: CASES["both"](m, v).sum(), (0, 1))(mu, x)
    want = hessian(lambda m, v: truth(m, v).sum(), (0, 1))(mu, x)
    for row, other in zip(got, want, strict=True):
        for g, w in zip(row, other, strict=True):
            torch.testing.assert_close(g, w)


def test_per_sample_gradients_of_a_module():
    head = rk.GaussianHead(5, 3)
    h = torch.randn(4, 5)
    params = dict(head.named_parameters())

    def loss(p, item):
        z, kl = functional_call(head, p, (item[None],), {"seed": SEED})
        return (z.square().sum(-1) + kl).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))({k: v.detach() for k, v in params.items()}, h)
    for i in range(4):
        want = torch.autograd.grad(loss(params, h[i]), list(params.values()))
        for name, w in zip(params, want, strict=True):
            torch.testing.assert_close(per_sample[name][i], w)
