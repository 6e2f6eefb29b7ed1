"""The bounds of rk.losses: values of plain torch, and the gradients of each estimator."""

import itertools

import pytest
import torch
from torch.distributions import Normal

import reparam_kernels as rk

pytestmark = pytest.mark.usefixtures("says_where")


class Decoder(torch.nn.Linear):
    """log p(x, z) of a Gaussian with unit variance, and N(0, I) as the prior; the encoder is a row for each x."""

    def log_joint(self, x, z):
        return -((x - self(z)) ** 2).sum(-1) / 2 - (z**2).sum(-1) / 2


def test_the_bound_tightens_with_the_samples_and_is_that_of_plain_torch():
    torch.manual_seed(0)
    decoder, x = Decoder(2, 3).double(), torch.randn(50, 3, dtype=torch.float64)
    mu, logvar = torch.zeros(50, 2, dtype=torch.float64), torch.ones(50, 2, dtype=torch.float64)
    losses = []
    for k in (1, 8, 64):
        z, log_q = rk.reparameterize_log_prob(mu, logvar, sample_shape=(k,), seed=1)
        log_w = decoder.log_joint(x, z) - log_q
        plain = Normal(mu, (logvar / 2).exp()).log_prob(z).sum(-1)
        want = -torch.log(torch.exp(decoder.log_joint(x, z) - plain).mean(0)).mean()
        torch.testing.assert_close(rk.losses.iwae(log_w), want)
        losses.append(rk.losses.iwae(log_w).item())
    assert losses[0] > losses[1] > losses[2]


def test_dreg_has_the_squared_weights_for_the_encoder_and_those_of_iwae_for_the_decoder():
    torch.manual_seed(0)
    decoder, x = Decoder(2, 3).double(), torch.randn(5, 3, dtype=torch.float64)
    mu, logvar = (torch.randn(5, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z, log_q = rk.reparameterize_log_prob(mu, logvar, sample_shape=(4,), seed=1, path_derivative=True)
    log_w = decoder.log_joint(x, z) - log_q
    rk.losses.dreg(log_w, z, log_q).backward()
    got = mu.grad, logvar.grad, decoder.weight.grad

    eps = rk.randn(4, 5, 2, seed=1).double()
    m, v = (t.detach().clone().requires_grad_() for t in (mu, logvar))
    u = m + (v / 2).exp() * eps
    density = Normal(m.detach(), (v.detach() / 2).exp()).log_prob(u).sum(-1)
    log_weights = decoder.log_joint(x, u) - density
    w = log_weights.detach().softmax(0)
    encoder = torch.autograd.grad(-(w**2 * log_weights).sum(0).mean(), (m, v), retain_graph=True)
    (of_decoder,) = torch.autograd.grad(-(w * log_weights).sum(0).mean(), (decoder.weight,))
    for a, b in zip(got, (*encoder, of_decoder), strict=True):
        torch.testing.assert_close(a, b)


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


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: rk.losses.iwae(torch.tensor(1.0)), "iwae: log_w must have the samples in its first dim, 1 or more;"),
        (lambda: rk.losses.vimco(torch.zeros(1, 3), torch.zeros(1, 3)), "vimco: log_w must have the .* 2 or more;"),
        (lambda: rk.losses.vimco(torch.zeros(4, 3), torch.zeros(4)), "vimco: log_q must have the shape of log_w;"),
        (
            lambda: rk.losses.dreg(torch.ones(3, 4), torch.ones(3, 4, 2), torch.ones(4)),
            r"dreg: log_q must have the shape of log_w; got log_q \(4,\), log_w \(3, 4\)",
        ),
        (
            lambda: rk.losses.dreg(torch.ones(3, 4), torch.ones(4, 3, 2), torch.ones(3, 4)),
            "dreg: z without its event dims must have the shape of log_w;",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        call()
