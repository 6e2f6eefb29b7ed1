"""The latent op in plain torch. The kernels are tested against it, and it runs if there are none.

The arithmetic is in float64 if the device has it, so the textbook formulas are accurate enough as they are.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ...core.dtypes import compute_dtype, has_float64
from ..noise.formula import reference_noise
from .arguments import Arguments, Config, unpacked


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


class Inputs(NamedTuple):
    """The tensors of a call in the dtype of the formula, x clamped. Without a prior, mu_p and x_p are None."""

    mu: Tensor
    x: Tensor
    mu_p: Tensor | None
    x_p: Tensor | None
    eps: Tensor | None


def widened_inputs(arguments: Arguments) -> Inputs:
    config = arguments.config
    mu, x = map(widen, unpacked(arguments))
    if config.clamp is not None:
        x = x.clamp(*config.clamp)
    mu_p, x_p = (None if t is None else widen(t) for t in (arguments.mu_p, arguments.x_p))
    eps = None
    if config.z and arguments.eps is not None:
        eps = widen(arguments.eps)
    elif config.z:
        assert arguments.seed is not None  # drawn by make_arguments
        shape = config.sample_shape + tuple(mu.shape)
        eps = reference_noise(arguments.seed, shape, math.prod(config.sample_shape)).to(mu.dtype)
    return Inputs(mu, x, mu_p, x_p, eps)


def elementwise_kl(config: Config, mu: Tensor, x: Tensor, mu_p: Tensor | None, x_p: Tensor | None) -> Tensor:
    delta, d = mu, 2 * log_sigma(x, config.param, config.min_std)
    if mu_p is not None and x_p is not None:
        log_sigma_p = log_sigma(x_p, config.param, config.min_std)
        d = d - 2 * log_sigma_p
        delta = (mu - mu_p) * bounded_exp(-log_sigma_p)
    return (delta**2 + torch.expm1(d) - d) / 2


def outputs(arguments: Arguments, for_z: Inputs, for_kl: Inputs) -> tuple[Tensor | None, Tensor | None]:
    config, dtype = arguments.config, arguments.mu.dtype
    z = kl = None
    if for_z.eps is not None:
        sigma = sigma_of(for_z.x, config.param, config.min_std)
        z = (for_z.mu + sigma * for_z.eps).to(dtype).contiguous()
    if config.kl:
        kl = elementwise_kl(config, *for_kl[:4])
        if config.event_ndim:
            kl = kl.sum(dim=tuple(range(-config.event_ndim, 0)))
        kl = kl.to(compute_dtype(dtype)).contiguous()
    return z, kl


def formula(arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    """Compute z and kl, differentiable to any order."""
    inputs = widened_inputs(arguments)
    return outputs(arguments, inputs, inputs)


def gradient_formula(arguments: Arguments, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Compute z and kl, from which autograd computes the gradients of the kernels.

    Where the incoming gradient is 0 and a slope is infinite or NaN, the inputs are replaced by constants: autograd
    would multiply the two.
    """
    inputs, (dz, dkl) = widened_inputs(arguments), grads
    for_z = inputs if dz is None or inputs.eps is None else hold_for_z(arguments.config, inputs, dz)
    for_kl = inputs if dkl is None else hold_for_kl(arguments.config, inputs, dkl)
    return outputs(arguments, for_z, for_kl)


def hold_for_z(config: Config, inputs: Inputs, dz: Tensor) -> Inputs:
    with torch.no_grad():
        assert inputs.eps is not None
        eps = torch.where((dz == 0) & ~inputs.eps.isfinite(), 0, inputs.eps)
        dsigma = (dz * eps).sum(dim=tuple(range(len(config.sample_shape)))) if config.sample_shape else dz * eps
        held = (dsigma == 0) & ~sigma_has_finite_slope(inputs.x, config.param)
    return inputs._replace(x=torch.where(held, 1, inputs.x), eps=eps)


def hold_for_kl(config: Config, inputs: Inputs, dkl: Tensor) -> Inputs:
    shape = inputs.mu.shape
    dkl = dkl.reshape(*dkl.shape, *[1] * config.event_ndim)
    mu, x = inputs.mu, inputs.x
    mu_p, x_p = (None if t is None else t.expand(shape) for t in (inputs.mu_p, inputs.x_p))
    variables = [t for t in (mu, x, mu_p, x_p) if t is not None and t.requires_grad]
    slopes = torch.autograd.grad(elementwise_kl(config, mu, x, mu_p, x_p).sum(), variables)
    held = (dkl == 0) & ~reduce(torch.logical_and, (slope.isfinite() for slope in slopes))
    mu_p = None if mu_p is None else torch.where(held, 0, mu_p)
    x_p = None if x_p is None else torch.where(held, 1, x_p)
    return inputs._replace(mu=torch.where(held, 0, mu), x=torch.where(held, 1, x), mu_p=mu_p, x_p=x_p)


def sigma_has_finite_slope(x: Tensor, param: str) -> Tensor:
    if param == "std":
        return torch.ones_like(x, dtype=torch.bool)
    return ~x.isnan() if param == "softplus" else torch.exp(log_sigma(x, param, 0.0)).isfinite()


def widen(t: Tensor) -> Tensor:
    return t.to(torch.float64 if has_float64(t.device) else torch.float32)
