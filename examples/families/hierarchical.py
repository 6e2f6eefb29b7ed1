"""python -m examples.families.hierarchical: two stochastic layers, a learned prior in each, free bits for each."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import reparam_kernels as rk

from .common import Terms, main, mlp, nll

FREE = 0.5  # nats for each layer
Pair = tuple[Tensor, Tensor]  # mu and log sigma
Latent = Callable[[Pair, Pair], tuple[Tensor, Tensor, Tensor]]  # z, the KL, its part in the loss


def before(q: Pair, prior: Pair) -> tuple[Tensor, Tensor, Tensor]:
    (mu, logstd), (mu_p, logstd_p) = q, prior
    z = mu + logstd.exp() * torch.randn_like(mu)
    kl = logstd_p - logstd - 0.5 + 0.5 * (logstd.exp() ** 2 + (mu - mu_p) ** 2) / logstd_p.exp() ** 2
    kl = kl.sum(1)
    return z, kl, torch.clamp(kl.mean(), min=FREE)


def after(q: Pair, prior: Pair) -> tuple[Tensor, Tensor, Tensor]:
    z, kl = rk.reparameterize_kl(*q, prior=prior, param="logstd")
    return z, kl, rk.losses.free_bits_after_mean(kl, FREE)


class VAE(nn.Module):
    """A VAE that draws z2 from x, then z1 from x and z2. The generator draws z2 from its prior, then z1."""

    def __init__(self, latent: Latent, pixels: int = 64, dims: int = 8):
        super().__init__()
        self.latent = latent
        self.q2, self.q1 = mlp(pixels, 2 * dims), mlp(pixels + dims, 2 * dims)
        self.p2, self.p1 = nn.Parameter(torch.zeros(2 * dims)), mlp(dims, 2 * dims)
        self.decoder = mlp(2 * dims, pixels)

    def forward(self, x: Tensor) -> Terms:
        z2, kl2, free2 = self.latent(self.q2(x).chunk(2, 1), self.p2.chunk(2))
        z1, kl1, free1 = self.latent(self.q1(torch.cat([x, z2], 1)).chunk(2, 1), self.p1(z2).chunk(2, 1))
        error = nll(self.decoder(torch.cat([z1, z2], 1)), x)
        return Terms(error.mean() + free1 + free2, -(error + kl1 + kl2).mean())


if __name__ == "__main__":
    main(VAE, before=before, after=after)
