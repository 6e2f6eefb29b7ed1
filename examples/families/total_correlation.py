"""python -m examples.families.total_correlation: a beta-TCVAE, with all pairs of points and posteriors in one tensor
(--before) and with one op.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Normal

import reparam_kernels as rk

from .common import Terms, main, mlp, nll

BETA, N_DATA = 4.0, 1438  # the weight of the total correlation; the images of the training set

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def before(mu: Tensor, logvar: Tensor) -> Parts:
    std = torch.exp(0.5 * logvar)
    z = mu + std * torch.randn_like(mu)
    others = len(mu) - 1
    weights = torch.full((len(mu), len(mu)), 1 / others, dtype=mu.dtype)
    weights.fill_diagonal_(1 / N_DATA)
    weights[torch.arange(len(mu)), (torch.arange(len(mu)) + 1) % len(mu)] = (N_DATA - others) / (N_DATA * others)
    pairs = Normal(mu, std).log_prob(z.unsqueeze(1))  # B x B x D
    log_qz = torch.logsumexp(weights.log() + pairs.sum(2), 1)
    log_qz_product = torch.logsumexp(weights.log().unsqueeze(2) + pairs, 1).sum(1)
    log_qzx = Normal(mu, std).log_prob(z).sum(1)
    log_pz = (-(z**2) / 2 - math.log(2 * math.pi) / 2).sum(1)
    return z, log_qzx - log_qz, log_qz - log_qz_product, log_qz_product - log_pz


def after(mu: Tensor, logvar: Tensor) -> Parts:
    q = rk.DiagonalGaussian(mu, logvar)
    z = q.rsample()
    weights = rk.losses.stratified_log_weights(len(mu), N_DATA).to(mu.dtype)
    log_qz, log_qz_dims = rk.mixture_log_prob(z, mu, logvar, log_weights=weights, of="both")
    log_pz = (-(z**2) / 2 - math.log(2 * math.pi) / 2).sum(1)
    return z, *rk.losses.total_correlation(q.log_prob(z), log_qz, log_qz_dims, log_pz)


class VAE(nn.Module):
    def __init__(self, latent: Callable[[Tensor, Tensor], Parts], pixels: int = 64, dims: int = 8):
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(pixels, 128), nn.ReLU())
        self.mu, self.logvar = nn.Linear(128, dims), nn.Linear(128, dims)
        self.decoder = mlp(dims, pixels)

    def forward(self, x: Tensor) -> Terms:
        h = self.encoder(x)
        z, mi, tc, dwkl = self.latent(self.mu(h), self.logvar(h))
        reconstruction = nll(self.decoder(z), x)
        loss = (reconstruction + mi + BETA * tc + dwkl).mean()
        return Terms(loss, -(reconstruction + mi + tc + dwkl).mean())


if __name__ == "__main__":
    main(VAE, before=before, after=after)
