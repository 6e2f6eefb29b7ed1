"""The losses of a computed KL against loops over Python numbers; gradients exist exactly where the papers say."""

import math

import pytest
import torch

import reparam_kernels as rk
from reparam_kernels import losses

pytestmark = pytest.mark.usefixtures("says_where")

MU = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LOGVAR = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def exact(mu, logvar):
    return 0.5 * (mu**2 + math.exp(logvar) - 1 - logvar)


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
        (lambda: losses.masked_mean(torch.ones(2, 3, 4), torch.ones(2, 4)), r"kl \(2, 3, 4\), mask \(2, 4\)"),
        (lambda: losses.masked_mean(torch.ones(2, 3, 4), torch.ones(2, 3, 5)), "each of kl's size or 1"),
    ],
)
def test_errors_say_what_to_do(call, text):
    with pytest.raises(ValueError, match=text):
        call()
