"""The latent op in plain torch. The kernels are tested against it, and it runs if there are none.

The arithmetic is in float64 if the device has it, so the textbook formulas are accurate enough as they are.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ...core.dtypes import compute_dtype
from ..noise.formula import reference_noise
from .arguments import Arguments, unpacked


def log_sigma(x: Tensor, param: str, min_std: float) -> Tensor:
    if param == "logvar":
        return x / 2
    if param == "logstd":
        return x
    if param == "softplus" and min_std == 0:
        exponential = x < -40  # softplus(x) is then exp(x), which may underflow
        return torch.where(exponential, x, torch.log(sigma_of(torch.where(exponential, 0, x), param, min_std)))
    return torch.log(sigma_of(x, param, min_std))


def sigma_of(x: Tensor, param: str, min_std: float) -> Tensor:
    if param in ("logvar", "logstd"):
        return torch.exp(log_sigma(x, param, min_std))
    return x if param == "std" else softplus(x, threshold=40.0) + min_std


def bounded_exp(x: Tensor) -> Tensor:
    """Compute exp(x), kept from underflow and overflow, with itself as its derivative."""
    limit = math.log(torch.finfo(x.dtype).max) - 1
    return torch.exp(x.clamp(-limit, limit).detach() + (x - x.detach()).nan_to_num())


def formula(arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    """Compute z and kl, differentiable to any order."""
    config, dtype = arguments.config, arguments.mu.dtype
    mu, x = unpacked(arguments)
    shape = config.sample_shape + tuple(mu.shape)
    mu, x = widen(mu), widen(x)
    if config.clamp is not None:
        x = x.clamp(*config.clamp)
    z = kl = None
    if config.z:
        if arguments.eps is not None:
            eps = widen(arguments.eps)
        else:
            assert arguments.seed is not None  # drawn by make_arguments
            eps = reference_noise(arguments.seed, shape, math.prod(config.sample_shape)).to(mu.dtype)
        z = (mu + sigma_of(x, config.param, config.min_std) * eps).to(dtype).contiguous()
    if config.kl:
        delta, d = mu, 2 * log_sigma(x, config.param, config.min_std)
        if arguments.mu_p is not None and arguments.x_p is not None:
            log_sigma_p = log_sigma(widen(arguments.x_p), config.param, config.min_std)
            d = d - 2 * log_sigma_p
            delta = (mu - widen(arguments.mu_p)) * bounded_exp(-log_sigma_p)
        kl = (delta**2 + torch.expm1(d) - d) / 2
        if config.event_ndim:
            kl = kl.sum(dim=tuple(range(-config.event_ndim, 0)))
        kl = kl.to(compute_dtype(dtype)).contiguous()
    return z, kl


def widen(t: Tensor) -> Tensor:
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)
