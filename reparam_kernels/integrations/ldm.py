"""The posterior and the KL of the original latent-diffusion code, and of what was built on it."""

import torch
from torch import Tensor

from ..distributions import arithmetic_dtype, to_common
from ..ops.latent import kl_divergence
from . import diffusers

__all__ = ["DiagonalGaussianDistribution", "normal_kl"]


class DiagonalGaussianDistribution(diffusers.DiagonalGaussianDistribution):
    """The adapter of diffusers, except that the "torch" noise is float32, drawn on the CPU and then moved.

        z = mean + std * torch.randn(mean.shape).to(device)

    Args:
        parameters, deterministic, chunk_dim, noise, fix_upstream_bugs: as for diffusers' adapter. With the "torch"
            noise, z is float32 for the half dtypes, as the original's is.

    Raises:
        TypeError, ValueError, IndexError: as diffusers' adapter.

    Source:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022.

    Example:
        >>> import torch
        >>> from reparam_kernels.integrations.ldm import DiagonalGaussianDistribution
        >>> DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4)).sample().shape
        torch.Size([2, 4, 4, 4])
    """

    def _torch_noise(self, generator: diffusers.Generators) -> Tensor:
        noise = diffusers.randn(self.mean.shape, generator, torch.device("cpu"), torch.get_default_dtype())
        return noise.to(self.mean.device)


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Compute KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) elementwise; tensors and numbers broadcast.

    Args:
        mean1, logvar1, mean2, logvar2: tensors or numbers, at least one a tensor.

    Returns:
        kl in nats, float32 (float64 for float64), of the broadcast shape; gradients to every tensor.

    Raises:
        TypeError: if none of the four is a float tensor.

    Source:
        Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, whose code brought this signature.

    Example:
        >>> import torch
        >>> from reparam_kernels.integrations.ldm import normal_kl
        >>> normal_kl(torch.ones(2, 1), torch.zeros(3), 0.0, 0.0)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """
    given = (mean1, logvar1, mean2, logvar2)
    like = next((t for t in given if isinstance(t, Tensor) and t.is_floating_point()), None)
    if like is None:
        raise TypeError("normal_kl: at least one argument must be a float tensor; got none. Wrap one.")
    tensors = [t if isinstance(t, Tensor) else torch.full((), t, dtype=like.dtype, device=like.device) for t in given]
    mu, logvar, mu_p, logvar_p = to_common(arithmetic_dtype(*tensors), *tensors)
    shape = torch.broadcast_shapes(*(t.shape for t in (mu, logvar, mu_p, logvar_p)))  # type: ignore[no-untyped-call]
    return kl_divergence(mu.expand(shape), logvar.expand(shape), prior=(mu_p, logvar_p), event_ndim=0)
