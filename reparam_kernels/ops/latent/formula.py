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


def formula(arguments: Arguments) -> tuple[Tensor | None, ...]:
    """Compute z, kl and log_q, differentiable to any order."""
    config, dtype = arguments.config, arguments.mu.dtype
    mu, x = unpacked(arguments)
    shape = config.sample_shape + tuple(mu.shape)
    mu, x = widen(mu), widen(x)
    if config.clamp is not None:
        x = x.clamp(*config.clamp)
    sigma, log_std = sigma_of(x, config.param, config.min_std), log_sigma(x, config.param, config.min_std)
    mu_p, log_std_p = torch.zeros_like(mu), torch.zeros_like(mu)
    if arguments.mu_p is not None and arguments.x_p is not None:
        mu_p, log_std_p = widen(arguments.mu_p), log_sigma(widen(arguments.x_p), config.param, config.min_std)
    z = kl = log_q = None
    if config.z:
        if arguments.eps is not None:
            eps = widen(arguments.eps)
        else:
            assert arguments.seed is not None  # drawn by make_arguments
            eps = reference_noise(arguments.seed, shape, math.prod(config.sample_shape)).to(mu.dtype)
        u = mu + sigma * eps
        z = (torch.tanh(u) if config.tanh else u).to(dtype).contiguous()
    if config.kl:
        delta, d = (mu - mu_p) * bounded_exp(-log_std_p), 2 * (log_std - log_std_p)
        kl = sum_events((delta**2 + torch.expm1(d) - d) / 2, arguments)
    if config.log_q:
        if config.path_derivative:  # the density's own parameters are constants; the value of eps stays exact
            eps, log_std = eps + (u - u.detach()) / sigma.detach(), log_std.detach()
        terms = -(eps**2) / 2 - log_std
        if config.minus_log_p:
            terms = terms + ((u - mu_p) * bounded_exp(-log_std_p)) ** 2 / 2 + log_std_p
        else:
            terms = terms - math.log(2 * math.pi) / 2
        if config.tanh:
            terms = terms - 2 * (math.log(2) - u - softplus(-2 * u))  # log of the derivative of tanh
        log_q = sum_events(terms, arguments)
    return z, kl, log_q


def sum_events(terms: Tensor, arguments: Arguments) -> Tensor:
    """Sum over the event dims, in the dtype of the results."""
    event_ndim = arguments.config.event_ndim
    total = terms.sum(dim=tuple(range(-event_ndim, 0))) if event_ndim else terms
    return total.to(compute_dtype(arguments.mu.dtype)).contiguous()


def widen(t: Tensor) -> Tensor:
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)
