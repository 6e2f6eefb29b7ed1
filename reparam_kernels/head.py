"""The latent layer as a module: mu and logvar, two parallel linear layers, then the fused op."""

from typing import Any

import torch
from torch import Tensor, nn

from .api import kl_divergence, reparameterize_kl


class GaussianHead(nn.Module):
    """Map features to (z, kl): mu and logvar by two parallel linear layers, then reparameterize_kl.

        mu = W_mu h + b_mu,  logvar = W_logvar h + b_logvar,  z = mu + sigma * eps,  kl = KL(N(mu, sigma^2) || N(0, I))

    Args:
        in_features: size of the last dim of h.
        latent_features: size of the last dim of z.
        mean_in_eval: in eval mode give z = mu instead of a sample; kl stays.
        param, min_std, clamp: as for reparameterize_kl; the layer `logvar` gives what `param` says.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: as reparameterize_kl, at the first call.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, appendix C.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> z, kl = rk.GaussianHead(400, 20)(torch.zeros(8, 400))
        >>> z.shape, kl.shape
        (torch.Size([8, 20]), torch.Size([8]))
    """

    def __init__(
        self,
        in_features: int,
        latent_features: int,
        mean_in_eval: bool = False,
        *,
        param: str = "logvar",
        min_std: float = 0.0,
        clamp: tuple[float, float] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.mu = nn.Linear(in_features, latent_features, device=device, dtype=dtype)
        self.logvar = nn.Linear(in_features, latent_features, device=device, dtype=dtype)
        self.mean_in_eval = mean_in_eval
        self.param, self.min_std, self.clamp = param, min_std, clamp

    def forward(
        self,
        h: Tensor,
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
        sample_shape: tuple[int, ...] = (),
        prior: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """h (..., in_features) to z (..., latent_features) and kl; the keywords are those of reparameterize_kl."""
        mu, x = self.mu(h), self.logvar(h)
        scale: dict[str, Any] = {"param": self.param, "min_std": self.min_std, "clamp": self.clamp}
        if self.mean_in_eval and not self.training:
            return mu.expand(*sample_shape, *mu.shape), kl_divergence(mu, x, prior=prior, **scale)
        return reparameterize_kl(
            mu, x, seed=seed, generator=generator, eps=eps, sample_shape=sample_shape, prior=prior, **scale
        )

    def extra_repr(self) -> str:
        return f"mean_in_eval={self.mean_in_eval}, param={self.param!r}, min_std={self.min_std}, clamp={self.clamp}"
