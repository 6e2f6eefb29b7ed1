"""python -m examples.families.packed: a convolutional autoencoder, mean and logvar packed as in latent diffusion."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import reparam_kernels as rk
from reparam_kernels.integrations.diffusers import DiagonalGaussianDistribution  # needs no diffusers

from .common import Terms, main, nll


def before(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    return z, 0.5 * (mean**2 + logvar.exp() - 1.0 - logvar).sum((1, 2, 3))


def adapter(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Use the adapter of diffusers' class, with torch's noise and the z of `before` to the bit."""
    posterior = DiagonalGaussianDistribution(moments)
    return posterior.sample(), posterior.kl()


def after(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Sample and compute the KL in one pass that reads the moments in place."""
    return rk.DiagonalGaussian.from_moments(moments, clamp=(-30.0, 20.0)).rsample_kl()


class VAE(nn.Module):
    def __init__(self, latent: Callable[[Tensor], tuple[Tensor, Tensor]], channels: int = 4, width: int = 16):
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * channels, 1),  # (B, 2 * channels, 2, 2)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 2 * width, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> Terms:
        z, kl = self.latent(self.encoder(x.view(-1, 1, 8, 8)))
        elbo = -(nll(self.decoder(z).flatten(1), x) + kl).mean()
        return Terms(-elbo, elbo)


if __name__ == "__main__":
    main(VAE, before=before, adapter=adapter, after=after)
