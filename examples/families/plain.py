"""python -m examples.families.plain: a plain VAE, with the tutorial's two lines (--before) and with one op."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import reparam_kernels as rk

from .common import Terms, main, mlp, nll


def before(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)
    return z, kl


def after(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return rk.reparameterize_kl(mu, logvar)


class VAE(nn.Module):
    def __init__(
        self,
        latent: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        pixels: int = 64,
        hidden: int = 128,
        dims: int = 8,
    ):
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU())
        self.mu, self.logvar = nn.Linear(hidden, dims), nn.Linear(hidden, dims)
        self.decoder = mlp(dims, pixels)

    def forward(self, x: Tensor) -> Terms:
        h = self.encoder(x)
        z, kl = self.latent(self.mu(h), self.logvar(h))
        elbo = -(nll(self.decoder(z), x) + kl).mean()
        return Terms(-elbo, elbo)


if __name__ == "__main__":
    main(VAE, before=before, after=after)
