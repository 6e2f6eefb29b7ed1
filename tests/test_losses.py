"""rk.losses against loops over Python numbers; gradients exist exactly where the papers say."""

import itertools
import math

import pytest
import torch

import reparam_kernels as rk
from reparam_kernels import losses

pytestmark = pytest.mark.usefixtures("says_where")

MU = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LOGVAR = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
MU_P = torch.randn(4, generator=torch.Generator().manual_seed(2))
LOGVAR_P = torch.randn(4, generator=torch.Generator().manual_seed(3))


def exact(mu, logvar, mu_p=0.0, logvar_p=0.0):
    return 0.5 * ((mu - mu_p) ** 2 / math.exp(logvar_p) + math.exp(logvar - logvar_p) - 1 - logvar + logvar_p)


KL = [[exact(MU[b, j].item(), LOGVAR[b, j].item()) for j in range(4)] for b in range(6)]


@pytest.mark.parametrize("floor", [0.0, 0.7, 1.2, 50.0])
def test_free_bits_are_where_their_name_says(floor):
    kl = rk.kl_divergence(MU, LOGVAR, event_ndim=0)
    columns = [sum(row[j] for row in KL) / 6 for j in range(4)]
    rows = [sum(row) for row in KL]
    close(losses.free_bits_per_dimension(kl, floor), sum(max(floor, c) for c in columns))
    close(losses.free_bits_per_sample(kl.sum(1), 4 * floor), sum(max(4 * floor, r) for r in rows) / 6)
    close(losses.free_bits_after_mean(kl.sum(1), 4 * floor), max(4 * floor, sum(rows) / 6))


def test_the_three_free_bits_differ():
    kl = torch.tensor([[0.1, 2.0], [0.3, 4.0]])
    assert losses.free_bits_per_dimension(kl, 2.5).item() == pytest.approx(2.5 + 3.0)
    assert losses.free_bits_per_sample(kl.sum(1), 2.5).item() == pytest.approx((2.5 + 4.3) / 2)
    assert losses.free_bits_after_mean(kl.sum(1), 2.5).item() == pytest.approx(3.2)


def test_free_bits_stop_the_gradient_of_what_is_below_the_floor():
    def grad(free_bits, floor, event_ndim):
        mu = MU.clone().requires_grad_()
        free_bits(rk.kl_divergence(mu, LOGVAR, event_ndim=event_ndim), floor).backward()
        return mu.grad != 0

    columns = torch.tensor(KL).mean(0)
    floor = columns.sort().values[1:3].mean().item()
    assert torch.equal(grad(losses.free_bits_per_dimension, floor, 0), (columns > floor).expand(6, 4))
    rows = torch.tensor(KL).sum(1)
    floor = rows.sort().values[2:4].mean().item()
    assert torch.equal(grad(losses.free_bits_per_sample, floor, 1), (rows > floor)[:, None].expand(6, 4))
    assert not grad(losses.free_bits_after_mean, rows.mean().item() + 0.1, 1).any()
    assert grad(losses.free_bits_after_mean, rows.mean().item() - 0.1, 1).all()


def test_free_bits_per_layer_and_per_group():
    """For layers of a hierarchy or channels, the elements of a group are summed before the floor."""
    layers = [torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    got = sum(losses.free_bits_after_mean(kl.sum((1, 2, 3)), 16.5) for kl in layers)
    close(got, sum(max(16.5, sum(kl.flatten().tolist()) / 3) for kl in layers))
    got = losses.free_bits_per_dimension(layers[0].sum((2, 3)), 8.2)
    close(got, sum(max(8.2, sum(layers[0][:, c].flatten().tolist()) / 3) for c in range(2)))


@pytest.mark.parametrize("options", [{}, {"to_prior": 0.5, "to_posterior": 0.1, "floor": 2.0}], ids=str)
def test_balancing_splits_the_gradient(options):
    def leaves():
        return [t.clone().requires_grad_() for t in (MU, LOGVAR, MU_P, LOGVAR_P)]

    mu, logvar, mu_p, logvar_p = ours = leaves()
    kl = losses.balanced_kl(mu, logvar, (mu_p, logvar_p), **options)
    kl.sum().backward()
    mu, logvar, mu_p, logvar_p = plain = leaves()
    whole = rk.kl_divergence(mu, logvar, prior=(mu_p, logvar_p))
    floor = options.get("floor", 0.0)
    to_prior, to_posterior = options.get("to_prior", 0.8), options.get("to_posterior", 0.2)
    rows = [
        sum(exact(*v) for v in zip(*(t.tolist() for t in (MU[b], LOGVAR[b], MU_P, LOGVAR_P)), strict=True))
        for b in range(6)
    ]
    for got, row in zip(kl.tolist(), rows, strict=True):
        assert got == pytest.approx((to_prior + to_posterior) * max(floor, row), rel=1e-5)
    assert floor == 0 or min(rows) < floor < max(rows)
    whole.clamp(min=floor).sum().backward()
    for o, p, weight in zip(ours, plain, [to_posterior, to_posterior, to_prior, to_prior], strict=True):
        assert o.grad is not None
        torch.testing.assert_close(o.grad, weight * p.grad, rtol=1e-5, atol=1e-6)


def test_the_parts_of_a_balanced_kl_are_its_terms_each_with_one_gradient():
    mu, logvar, mu_p, logvar_p = leaves = [t.clone().requires_grad_() for t in (MU, LOGVAR, MU_P, LOGVAR_P)]
    options = {"to_prior": 0.5, "to_posterior": 0.1, "floor": 2.0}
    parts = losses.balanced_kl(mu, logvar, (mu_p, logvar_p), return_parts=True, **options)
    normals = [
        torch.distributions.Normal(m.double(), (x.double() / 2).exp()) for m, x in ((MU, LOGVAR), (MU_P, LOGVAR_P))
    ]
    want = torch.distributions.kl_divergence(*normals).sum(-1)
    torch.testing.assert_close(parts.value.double(), want, rtol=1e-5, atol=0.0)
    assert not parts.value.requires_grad
    for part in (parts.dyn, parts.rep):
        torch.testing.assert_close(part.double(), want.clamp(min=2.0), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(parts.loss, 0.5 * parts.dyn + 0.1 * parts.rep)
    assert torch.equal(parts.loss, losses.balanced_kl(*leaves[:2], tuple(leaves[2:]), **options))
    for part, own in ((parts.dyn, {2, 3}), (parts.rep, {0, 1})):
        grads = torch.autograd.grad(part.sum(), leaves, allow_unused=True)
        assert {i for i, g in enumerate(grads) if g is not None and g.abs().sum() > 0} == own


def test_linear_beta_and_capacity():
    assert [losses.linear_beta(t, 10, 4.0) for t in (0, 5, 10, 1000)] == [0.0, 2.0, 4.0, 4.0]
    assert [losses.capacity(t, 10, 25.0) for t in (0, 4, 10, 1000)] == [0.0, 10.0, 25.0, 25.0]


def test_cyclical_beta_starts_again_each_cycle():
    steps, cycles, ratio = 1000, 5, 0.4
    weights = [losses.cyclical_beta(t, steps, cycles, ratio, beta=3.0) for t in range(steps)]
    for t, w in enumerate(weights):
        assert w == pytest.approx(3 * min(1.0, (t % 200) / 80))
    assert losses.cyclical_beta(steps, steps) == losses.cyclical_beta(5 * steps, steps) == 1.0
    uneven = [losses.cyclical_beta(t, 10, 3, 1.0) for t in range(10)]
    assert [t for t in range(1, 10) if uneven[t] < uneven[t - 1]] == [4, 7]


def test_a_rise_of_length_zero_is_over():
    for step in (0, 3):
        assert losses.linear_beta(step, 0, 4.0) == losses.cyclical_beta(step, 0, beta=4.0) == 4.0
        assert losses.cyclical_beta(step, 10, ratio=0.0, beta=4.0) == losses.capacity(step, 0, 4.0) == 4.0


def test_capacity_loss_takes_the_mean_first():
    kl = torch.tensor([1.0, 9.0], requires_grad=True)
    loss = losses.capacity_loss(kl, 6.0, gamma=10.0)
    loss.backward()
    assert loss.item() == 10.0  # |5 - 6|, not the mean of |1 - 6| and |9 - 6|
    assert kl.grad.tolist() == [-5.0, -5.0]


def test_masked_mean_divides_by_the_sum_of_the_mask():
    lengths, kl = [3, 5], torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[t < length for t in range(5)] for length in lengths])[:, None]
    want = sum(kl[b, c, t].item() for b in range(2) for c in range(7) for t in range(lengths[b])) / sum(lengths)
    for m in (mask, mask.float(), mask.long()):
        close(losses.masked_mean(kl, m), want)
    kl[0, :, 4] = math.nan
    kl.requires_grad_()
    loss = losses.masked_mean(kl, mask.float())
    close(loss, want)
    loss.backward()
    torch.testing.assert_close(kl.grad, mask.expand(2, 7, 5).float() / 8)
    close(losses.masked_mean(kl.detach()[1:], torch.full((1, 1, 5), 0.25)), kl[1].sum().item() / 5)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_masked_positions_reach_neither_the_value_nor_a_gradient(poison):
    kl = torch.tensor([[1.0, poison], [3.0, poison]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0], [0.5, 0.0]], requires_grad=True)
    loss = losses.masked_mean(kl, mask)
    close(loss, 2.5 / 1.5)
    to_kl, to_mask = torch.autograd.grad(loss, (kl, mask))
    torch.testing.assert_close(to_kl, mask.detach() / 1.5)
    torch.testing.assert_close(to_mask[:, 0], (torch.tensor([1.0, 3.0]) - 2.5 / 1.5) / 1.5)
    assert to_mask.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_mean_of_an_empty_mask_is_zero(dtype):
    for kl in (torch.ones(2, 1, 3), torch.full((2, 1, 3), math.nan), torch.ones(0, 1, 3)):
        kl.requires_grad_()
        loss = losses.masked_mean(kl, torch.zeros(kl.shape, dtype=dtype))
        close(loss, 0.0)
        assert (torch.autograd.grad(loss, kl)[0] == 0).all()


def close(got, want):
    assert got.shape == ()
    assert got.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: losses.free_bits_per_dimension(torch.ones(3), 1.0), "event_ndim=0"),
        (lambda: losses.linear_beta(1, -1), "steps must not be negative; got -1"),
        (lambda: losses.linear_beta(1, math.nan), "steps must not be negative; got nan"),
        (lambda: losses.capacity(1, -1, 2.0), "steps must not be negative; got -1"),
        (lambda: losses.cyclical_beta(1, 10, cycles=0), "cycles must be positive; got 0"),
        (lambda: losses.cyclical_beta(1, 10, ratio=-0.1), "ratio must not be negative; got -0.1"),
        (lambda: losses.masked_mean(torch.ones(2, 3, 4), torch.ones(2, 4)), r"kl \(2, 3, 4\), mask \(2, 4\)"),
        (lambda: losses.masked_mean(torch.ones(2, 3, 4), torch.ones(2, 3, 5)), "each of kl's size or 1"),
    ],
)
def test_errors_say_what_to_do(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_the_gradient_of_vimco_has_the_mean_of_the_bounds_gradient():
    """Over all draws of three codes by two samples: the gradient of the exact expectation of the bound."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    log_joint = torch.tensor([-1.0, -0.2, -2.5], dtype=torch.float64)
    draws = list(itertools.product(range(3), repeat=3))
    log_prob = logits.log_softmax(0)

    def terms(draw):
        log_q = log_prob[list(draw)].unsqueeze(1)
        return log_joint[list(draw)].unsqueeze(1) - log_q, log_q

    bound = sum(terms(d)[1].sum().exp() * -rk.losses.iwae(terms(d)[0]) for d in draws)
    (want,) = torch.autograd.grad(bound, logits, retain_graph=True)
    mean = torch.zeros(3, dtype=torch.float64)
    for draw in draws:
        log_w, log_q = terms(draw)
        loss = rk.losses.vimco(log_w, log_q)
        torch.testing.assert_close(loss, rk.losses.iwae(log_w))
        (grad,) = torch.autograd.grad(-loss, logits, retain_graph=True)
        mean += log_q.sum().exp().detach() * grad
    torch.testing.assert_close(mean, want)


def test_vimco_needs_two_samples_and_the_shape_of_log_w():
    for log_w, log_q in ((torch.zeros(1, 3), torch.zeros(1, 3)), (torch.zeros(4, 3), torch.zeros(4))):
        with pytest.raises(ValueError, match=r"^vimco: log_w must have at least two samples, and log_q its shape; got"):
            rk.losses.vimco(log_w, log_q)
