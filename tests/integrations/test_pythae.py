"""The recipe of docs/drop_in.md for pythae, on pythae itself."""

import pytest
import torch
from pythae.models import VAE, BetaVAE, BetaVAEConfig, VAEConfig

import reparam_kernels as rk

pytestmark = pytest.mark.integrations


class Fused:
    """Their two methods over the ops; `_sample_gauss` gives eps too, as theirs."""

    def _sample_gauss(self, mu, std):
        eps = torch.randn_like(std)
        return rk.reparameterize(mu, std, eps=eps, param="std"), eps


class FusedVAE(Fused, VAE):
    def loss_function(self, recon_x, x, mu, log_var, z):
        _, recon, _ = super().loss_function(recon_x, x, mu, log_var.detach(), z)
        kl = rk.kl_divergence(mu, log_var).mean()
        return recon + kl, recon, kl


class FusedBetaVAE(Fused, BetaVAE):
    pass


@pytest.mark.parametrize(
    ("mine", "theirs", "config"),
    [(FusedVAE, VAE, VAEConfig), (FusedBetaVAE, BetaVAE, BetaVAEConfig)],
    ids=["vae", "beta"],
)
def test_losses_and_gradients_are_theirs(mine, theirs, config):
    results = []
    for cls in (mine, theirs):
        torch.manual_seed(0)
        model = cls(config(input_dim=(1, 6, 6), latent_dim=4))
        out = model({"data": torch.rand(5, 1, 6, 6)})
        out.loss.backward()
        results.append([out.loss, out.reg_loss, out.z, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
