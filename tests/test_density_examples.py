"""examples/iwae.py, tc_vae.py and vampprior.py: their losses are those of plain torch, and they learn."""

import sys
from itertools import pairwise

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

import reparam_kernels as rk
from examples import iwae, tc_vae, vampprior
from examples.vae.data import load


@pytest.fixture(scope="module")
def images():
    digits = load()
    return digits._replace(train=digits.train[:256], test=digits.test[:64])


def test_the_iwae_has_the_gradients_of_its_twin_in_plain_torch_and_its_bound_rises_with_the_draws(images):
    pixels = images.train.shape[1]
    results = []
    for draw in (iwae.by_op, iwae.by_torch):
        torch.manual_seed(0)
        model = iwae.IWAE(pixels, draw).double()
        loss = rk.losses.iwae(model.log_weights(images.train[:64].double(), 5))
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    model, history = iwae.fit(images, draws=5, epochs=6)
    assert history[-1]["bound"] > history[0]["bound"]
    bounds = model.bounds(images.test)
    assert all(a < b for a, b in pairwise(bounds))  # of the same draws, by Jensen's inequality


def test_the_parts_of_the_tc_vae_add_up_and_their_mixture_is_that_of_torch(images):
    torch.manual_seed(0)
    model = tc_vae.TCVAE(64, beta=4.0, n_data=1000).double()
    x = images.train[:20].double()
    torch.manual_seed(1)
    z, (mi, tc, dwkl) = model.parts(x, None)
    mu, logvar = model.encode(x)
    q = Independent(Normal(mu, (logvar / 2).exp()), 1)
    log_qz = MixtureSameFamily(Categorical(torch.ones(20, dtype=torch.float64)), q).log_prob(z)
    torch.testing.assert_close(mi, q.log_prob(z) - log_qz)
    torch.testing.assert_close(mi + tc + dwkl, q.log_prob(z) - Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_a_large_beta_lowers_the_total_correlation(images):
    tcs = [tc_vae.fit(images, beta, epochs=40)[1][-1]["tc"] for beta in (1.0, 30.0)]
    assert tcs[1] < 0.5 * tcs[0]


def test_the_bound_of_the_vampprior_is_that_of_torch(images):
    torch.manual_seed(0)
    x = images.test.double()
    model = vampprior.VAE(64, vampprior.VampPrior(images.train[:10])).double()
    torch.manual_seed(1)
    got = model.bound(x, draws=3)
    torch.manual_seed(1)
    mu, logvar = model.encode(x)
    z = rk.reparameterize(mu, logvar, sample_shape=(3,))
    parts = [Independent(Normal(m, (v / 2).exp()), 1) for m, v in (model.encode(model.prior.inputs), (mu, logvar))]
    log_p = MixtureSameFamily(Categorical(torch.ones(10, dtype=torch.float64)), parts[0]).log_prob(z)
    torch.testing.assert_close(got, (log_p - parts[1].log_prob(z) - model.nll(z, x)).mean(0))
    standard = vampprior.VAE(64, vampprior.StandardPrior()).double()
    mu, logvar = standard.encode(x)
    z, kl = standard.prior.kl(standard, mu, logvar, 2)
    exact = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(kl, exact.expand(2, -1))


def test_training_raises_the_bound_with_either_prior(images):
    for components in (0, 40):
        _, history = vampprior.fit(images, components, epochs=5)
        assert history[-1]["held_out"] > history[0]["held_out"] + 1


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of torch, in matplotlib
@pytest.mark.parametrize(
    ("example", "pictures"),
    [
        (iwae, {"bounds"}),
        (tc_vae, {"total_correlation", "traversals"}),
        (vampprior, {"bounds", "components"}),
    ],
    ids=["iwae", "tc_vae", "vampprior"],
)
def test_the_command_draws_its_pictures(tmp_path, monkeypatch, capsys, example, pictures):
    monkeypatch.setattr(sys, "argv", ["example", "--epochs", "1", "--out", str(tmp_path)])
    example.main()
    out, err = capsys.readouterr()
    assert err == ""  # no progress without a terminal
    assert {path.stem for path in tmp_path.glob("*.png")} == pictures
    assert "nats an image" in out
