"""The rows of the table in docs/drop_in.md that no other test covers."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import distributions as td

import reparam_kernels as rk

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "drop_in.md").read_text()
MU = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
LOGVAR = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
KL = td.kl_divergence(td.Normal(MU.double(), LOGVAR.double().div(2).exp()), td.Normal(0.0, 1.0))


def close(got, want, **tolerance):
    torch.testing.assert_close(got.double(), want.double(), **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


def test_every_row_of_the_table_names_tests_that_exist():
    rows = re.findall(r"^\| (\d+) \|(.*)$", PAGE, flags=re.M)
    assert [int(n) for n, _ in rows] == list(range(1, 26))
    for number, row in rows:
        names = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
        assert names, number
        for file, test in names:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_every_reduction_in_use():
    elementwise = rk.kl_divergence(MU, LOGVAR, event_ndim=0)
    rows = rk.kl_divergence(MU, LOGVAR)
    places = rk.kl_divergence(MU, LOGVAR, event_ndim=1)
    for got, want in [
        (elementwise, KL),
        (rows.sum(), KL.sum()),
        (rows.mean(), KL.sum() / 6),
        (rows.sum() / 6, KL.sum() / 6),
        (elementwise.mean(), KL.mean()),
        (places, KL.sum(-1)),
        (places.mean(1), KL.sum(-1).mean(1)),
        (elementwise.mean(0), KL.mean(0)),
        (elementwise.mean((1, 2)), KL.mean((1, 2))),
        (rows / (4 * 5), KL.mean((1, 2))),
    ]:
        close(got, want)


def test_monte_carlo_kl_has_the_closed_form_as_mean():
    torch.manual_seed(0)
    q, p = rk.DiagonalGaussian(MU, LOGVAR), rk.DiagonalGaussian(torch.zeros_like(MU), torch.zeros_like(MU))
    z = q.rsample((4000,))
    log_ratio = q.log_prob(z) - p.log_prob(z)
    error = (log_ratio.mean(0) - KL.sum((1, 2))) / (log_ratio.std(0) / 4000**0.5)
    assert error.abs().max() < 5
    true = td.Normal(MU.double(), LOGVAR.double().div(2).exp())
    close(q.log_prob(z), true.log_prob(z.double()).sum((-1, -2)), atol=1e-4)


def test_temperature_scales_the_noise():
    z = rk.reparameterize(MU, LOGVAR + math.log(0.7), param="logstd", seed=3)
    close(z, MU + 0.7 * LOGVAR.exp() * rk.randn(6, 4, 5, seed=3))


def test_eps_can_be_reproduced():
    z = rk.reparameterize(MU, LOGVAR, seed=3)
    close((z - MU) / LOGVAR.div(2).exp(), rk.randn(6, 4, 5, seed=3), atol=1e-5)
    eps = torch.randn_like(MU)
    close(rk.reparameterize(MU, LOGVAR, eps=eps), MU + LOGVAR.div(2).exp() * eps)


def test_a_learned_weight_gets_its_gradient():
    beta, mu = torch.tensor(0.5, requires_grad=True), MU.clone().requires_grad_()
    (beta * rk.kl_divergence(mu, LOGVAR).mean()).backward()
    close(beta.grad, KL.sum() / 6)
    close(mu.grad, 0.5 * MU / 6)


def test_pairwise_densities():
    mu, logvar, z = MU[:, 0], LOGVAR[:, 0], rk.reparameterize(MU[:, 1], LOGVAR[:, 1], seed=0)
    pairs = rk.DiagonalGaussian(mu[None], logvar[None], event_ndim=0).log_prob(z[:, None])
    want = torch.stack(
        [torch.stack([td.Normal(m, (v / 2).exp()).log_prob(a) for m, v in zip(mu, logvar, strict=True)]) for a in z]
    )
    close(pairs, want, atol=1e-4)
    mixture = rk.DiagonalGaussian(mu, logvar).log_prob(z[:, None]).logsumexp(1) - math.log(6)
    parts = td.Independent(td.Normal(mu, (logvar / 2).exp()), 1)
    close(mixture, td.MixtureSameFamily(td.Categorical(torch.ones(6)), parts).log_prob(z), atol=1e-4)


def test_sticking_the_landing_has_no_score():
    """At q = p the path gradient of log q(z) - log p(z) is zero for every z (Roeder et al., 2017)."""
    mu, logvar = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    z = rk.reparameterize(mu, logvar, seed=0)
    log_q = rk.DiagonalGaussian(mu.detach(), logvar.detach()).log_prob(z)
    log_p = td.Normal(0.0, 1.0).log_prob(z).sum(-1)
    for g in torch.autograd.grad((log_q - log_p).sum(), (mu, logvar)):
        close(g, torch.zeros(3, 4))


def test_interleaved_halves_are_read_in_place():
    packed = torch.randn(6, 10, 2, generator=torch.Generator().manual_seed(4)).requires_grad_()
    z, kl = rk.reparameterize_kl(packed[..., 0], packed[..., 1], param="logstd", seed=1)
    mu, logstd = packed.detach().double().unbind(-1)
    close(z, mu + logstd.exp() * rk.randn(6, 10, seed=1))
    close(kl, td.kl_divergence(td.Normal(mu, logstd.exp()), td.Normal(0.0, 1.0)).sum(1))
    (z.sum() + kl.sum()).backward()
    close(packed.grad[..., 0], 1 + mu)


@pytest.mark.parametrize("name", ["diffusers", "pyro-ppl", "scvi-tools", "pythae"])
def test_the_page_names_the_versions_that_the_integration_tests_pin(name):
    pins = re.search(r"^integrations = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.M).group(1)
    version = re.search(rf'"{name}==([\d.]+)"', pins).group(1)
    assert f"{name} {version}" in PAGE
