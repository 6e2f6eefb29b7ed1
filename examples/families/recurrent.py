"""python -m examples.families.recurrent: a recurrent state-space model like Dreamer's, over the rows of an image."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import softplus

import reparam_kernels as rk

from .common import Terms, main, mlp, nll

Pair = tuple[Tensor, Tensor]  # mu and x, with sigma = softplus(x) + 0.1
Latent = Callable[[Pair, Pair], tuple[Tensor, Tensor, Tensor]]  # z, the KL, the balanced KL
TO_PRIOR, TO_POSTERIOR = 4.0, 1.0  # DreamerV2's 0.8 to 0.2, scaled so that the posterior's gradient is the ELBO's


def before(q: Pair, prior: Pair) -> tuple[Tensor, Tensor, Tensor]:
    (mu, x), (mu_p, x_p) = q, prior
    sigma, sigma_p = softplus(x) + 0.1, softplus(x_p) + 0.1
    z = mu + sigma * torch.randn_like(mu)
    prior_side = kl_divergence(Normal(mu.detach(), sigma.detach()), Normal(mu_p, sigma_p)).sum(-1)
    posterior_side = kl_divergence(Normal(mu, sigma), Normal(mu_p.detach(), sigma_p.detach())).sum(-1)
    return z, posterior_side, TO_PRIOR * prior_side + TO_POSTERIOR * posterior_side


def after(q: Pair, prior: Pair) -> tuple[Tensor, Tensor, Tensor]:
    scale = {"param": "softplus", "min_std": 0.1}
    z, kl = rk.reparameterize_kl(*q, prior=prior, **scale)
    return z, kl, rk.losses.balanced_kl(*q, prior, to_prior=TO_PRIOR, to_posterior=TO_POSTERIOR, **scale)


class RSSM(nn.Module):
    """Four steps of two rows each. A step's prior depends on the previous steps, its posterior also on the step."""

    def __init__(self, latent: Latent, pixels: int = 16, dims: int = 4, state: int = 64):
        super().__init__()
        self.latent, self.pixels, self.dims = latent, pixels, dims
        self.past, self.prior = nn.GRUCell(dims, state), nn.Linear(state, 2 * dims)
        self.posterior, self.decoder = mlp(state + pixels, 2 * dims), mlp(state + dims, pixels)

    def forward(self, x: Tensor) -> Terms:
        z, h = x.new_zeros(len(x), self.dims), None
        steps = []
        for rows in x.split(self.pixels, 1):
            h = self.past(z, h)
            q = self.posterior(torch.cat([h, rows], 1)).chunk(2, 1)
            z, kl, balanced = self.latent(q, self.prior(h).chunk(2, 1))
            steps.append(torch.stack([nll(self.decoder(torch.cat([h, z], 1)), rows), kl, balanced]))
        error, kl, balanced = torch.stack(steps).sum(0).mean(1)
        return Terms(error + balanced, -(error + kl))


if __name__ == "__main__":
    main(RSSM, before=before, after=after)
