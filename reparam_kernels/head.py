"""The latent layer as a module: mu and logvar, two parallel linear layers, then the fused op."""

from typing import Any

import torch
from torch import Tensor, nn

from .core import checks
from .core import window as windows
from .core.formats import format_of, in_format
from .core.window import Window
from .ops.latent import Prior, kl_divergence, reparameterize_kl
from .ops.latent.arguments import check_options

torch.fx.wrap("reparameterize_kl")  # torch.fx.symbolic_trace records the call as it is

OPTIONS = ("event_ndim", "param", "min_std", "clamp")  # of reparameterize_kl, fixed for the layer


class GaussianHead(nn.Module):
    """Map features to (z, kl): mu and logvar by two parallel linear layers, then reparameterize_kl.

        mu = W_mu h + b_mu,  logvar = W_logvar h + b_logvar,  z = mu + sigma * eps,  kl = KL(N(mu, sigma^2) || N(0, I))

    Args:
        in_features: size of the last dim of h.
        latent_features: size of the last dim of z.
        mean_in_eval: in eval mode, return z = mu instead of a sample, with the same kl.
        event_ndim, param, min_std, clamp: as for reparameterize_kl; `param` says how to read the output of the
            layer `logvar`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: as reparameterize_kl; at once for param, min_std and clamp.

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
        event_ndim: int | None = None,
        param: str = "logvar",
        min_std: float = 0.0,
        clamp: tuple[float, float] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options("GaussianHead", event_ndim, param, min_std, clamp)
        self.mu = nn.Linear(in_features, latent_features, device=device, dtype=dtype)
        self.logvar = nn.Linear(in_features, latent_features, device=device, dtype=dtype)
        self.mean_in_eval = mean_in_eval
        self.event_ndim, self.param, self.min_std, self.clamp = event_ndim, param, min_std, clamp

    def forward(
        self,
        h: Tensor,
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
        window: Window | None = None,
        sample_shape: tuple[int, ...] = (),
        prior: Prior | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map h (..., in_features) to z (..., latent_features) and kl; the keywords are those of reparameterize_kl."""
        mu, x = self.mu(h), self.logvar(h)
        options = {name: getattr(self, name) for name in OPTIONS}
        if self.mean_in_eval and not self.training:
            checks.one_source("GaussianHead", seed, generator, eps)
            sample_shape = checks.sizes("GaussianHead", "sample_shape", sample_shape)
            if window is not None:
                windows.no_eps("GaussianHead", window, eps)
                windows.check("GaussianHead", window, tuple(mu.shape), sample_shape)
            mean = mu.expand(*sample_shape, *mu.shape)
            z = in_format(mean.clone(), format_of(mean))  # a copy: z may change in place, and backward of kl needs mu
            return z, kl_divergence(mu, x, prior=prior, **options)
        return reparameterize_kl(
            mu,
            x,
            seed=seed,
            generator=generator,
            eps=eps,
            window=window,
            sample_shape=sample_shape,
            prior=prior,
            **options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in ("mean_in_eval", *OPTIONS))
