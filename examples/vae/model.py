"""A VAE as in the paper: one hidden layer each way, mu and logvar from two parallel layers."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import reparam_kernels as rk

IMPLS = ("kernels", "reference", "plain")


class Terms(NamedTuple):
    nll: Tensor  # -log p(x | z) of each image, nats
    kl: Tensor  # KL(q(z | x) || N(0, I)) of each image, nats


class VAE(nn.Module):
    """impl: the fused ops, the same functions in plain torch with the same noise, or the tutorial's torch.randn."""

    def __init__(
        self, pixels: int, latent: int = 2, hidden: int = 256, likelihood: str = "bernoulli", impl: str = "kernels"
    ):
        super().__init__()
        self.likelihood, self.impl = likelihood, impl
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh())
        self.head = rk.GaussianHead(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, pixels))
        self.log_scale = nn.Parameter(torch.tensor(-1.0), requires_grad=likelihood == "gaussian")

    def latent(self, x: Tensor, seed: int, samples: tuple[int, ...] = (), window: Any = None) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        if self.impl == "kernels":
            return self.head(h, seed=seed, sample_shape=samples, window=window)
        mu, logvar = self.head.mu(h), self.head.logvar(h)
        if self.impl == "reference":
            return rk.reference.reparameterize_kl(mu, logvar, seed=seed, sample_shape=samples, window=window)
        eps = torch.randn(*samples, *mu.shape, dtype=mu.dtype, device=mu.device)
        return mu + torch.exp(0.5 * logvar) * eps, -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean pixels."""
        out = self.decoder(z)
        return torch.sigmoid(out) if self.likelihood == "bernoulli" else out

    def nll(self, z: Tensor, x: Tensor) -> Tensor:
        out, x = torch.broadcast_tensors(self.decoder(z), x)
        if self.likelihood == "bernoulli":
            return binary_cross_entropy_with_logits(out, x, reduction="none").sum(-1)
        square = ((x - out) * torch.exp(-self.log_scale)) ** 2
        return (square / 2 + self.log_scale + math.log(2 * math.pi) / 2).sum(-1)

    def forward(self, x: Tensor, seed: int, samples: tuple[int, ...] = (), window: Any = None) -> Terms:
        """window: of the rows of x in the batch, as for rk.reparameterize."""
        z, kl = self.latent(x, seed, samples, window)
        return Terms(self.nll(z, x), kl)
