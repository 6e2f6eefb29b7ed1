"""The adapter inside scvi-tools itself: a small SCVI on synthetic counts."""

import pytest
import scvi
import torch
from torch import distributions as td

import reparam_kernels as rk
from reparam_kernels.integrations import scvi as ours

pytestmark = pytest.mark.integrations


@pytest.fixture(scope="module")
def counts():
    scvi.settings.seed = 0
    adata = scvi.data.synthetic_iid(batch_size=64, n_genes=20)
    scvi.model.SCVI.setup_anndata(adata)
    return adata


def model_of(adata):
    scvi.settings.seed = 0
    return scvi.model.SCVI(adata, n_latent=5, n_hidden=16)


def batch_of(model):
    return next(iter(model._make_data_loader(model.adata, batch_size=32)))


def test_posteriors_are_ours_and_their_loss_matches_scvi(counts):
    model = model_of(counts)
    model.module.eval()  # dropout would draw from the same stream
    batch = batch_of(model)
    with ours.patch():
        torch.manual_seed(0)
        inference, generative, loss = model.module(batch)
    qz, z = inference["qz"], inference["z"]
    assert type(qz) is rk.distributions.Normal
    torch.manual_seed(0)
    assert torch.equal(rk.distributions.Normal(qz.loc, qz.scale).rsample(), z)
    eps = (z - qz.loc) / qz.scale
    assert abs(eps.mean()) < 0.3
    assert 0.8 < eps.std() < 1.2
    plain = td.kl_divergence(td.Normal(qz.loc, qz.scale), td.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(loss.kl_local["kl_divergence_z"], plain, rtol=1e-5, atol=1e-5)
    inference["qz"] = td.Normal(qz.loc, qz.scale)
    again = model.module.loss(batch, inference, generative)
    torch.testing.assert_close(loss.loss, again.loss, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(v.loss, qz.scale, retain_graph=True)[0] for v in (loss, again)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def elbo(counts):
    model = model_of(counts)
    model.train(max_epochs=12, batch_size=32, accelerator="cpu", enable_progress_bar=False, logger=False)
    with torch.no_grad():
        losses = [model.module(batch)[2].loss.item() for batch in model._make_data_loader(counts, batch_size=32)]
    return sum(losses) / len(losses)


def test_training_matches_scvi(counts):
    untrained = model_of(counts)
    before = untrained.module(batch_of(untrained))[2].loss.item()
    plain = elbo(counts)
    with ours.patch():
        fused = elbo(counts)
    assert plain < 0.95 * before
    assert abs(fused / plain - 1) < 0.02


def test_patch_restores_scvi():
    with ours.patch() as patch:
        assert scvi.nn._base_components.Normal is rk.distributions.Normal
        assert "scvi.nn._base_components.Normal" in patch.rebound
    assert scvi.nn._base_components.Normal is td.Normal
