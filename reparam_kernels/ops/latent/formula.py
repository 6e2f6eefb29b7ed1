"""The latent op in plain torch. The kernels are tested against it, and it runs if there are none.

The arithmetic is in float64 if the device has it, so the textbook formulas are accurate enough as they are.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ...core.dtypes import has_float64
from ...core.formats import in_format
from ..noise.formula import reference_noise
from .arguments import Arguments, Config, unpacked
from .outputs import shapes


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


def clamped(x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Clamp x. The gradient is kept at a bound, and 0 outside and for NaN. From torch 2.14 on, torch.clamp's is not."""
    if bounds is None:
        return x
    low, high = bounds
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


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
    x = clamped(x, config.clamp)
    mu_p, x_p = (None if t is None else widen(t) for t in (arguments.mu_p, arguments.x_p))
    eps = None
    if config.z and arguments.eps is not None:
        eps = widen(arguments.eps)
    elif config.z:
        assert arguments.seed is not None  # drawn by make_arguments
        shape = config.sample_shape + tuple(mu.shape)
        eps = reference_noise(arguments.seed, shape, math.prod(config.sample_shape), config.window).to(mu.dtype)
    return Inputs(mu, x, mu_p, x_p, eps)


def elementwise_kl(config: Config, mu: Tensor, x: Tensor, mu_p: Tensor | None, x_p: Tensor | None) -> Tensor:
    delta, d = mu, 2 * log_sigma(x, config.param, config.min_std)
    if mu_p is not None and x_p is not None:
        log_sigma_p = log_sigma(x_p, config.param, config.min_std)
        d = d - 2 * log_sigma_p
        delta = (mu - mu_p) * bounded_exp(-log_sigma_p)
    return (delta**2 + torch.expm1(d) - d) / 2


def elementwise_log_q(config: Config, inputs: Inputs) -> Tensor:
    """log q of each element of each sample, less log p if asked."""
    mu, x, mu_p, x_p, eps = inputs
    assert eps is not None
    sigma, log_std = sigma_of(x, config.param, config.min_std), log_sigma(x, config.param, config.min_std)
    u = mu + sigma * eps
    if config.path_derivative:  # the parameters of the density are constants; the value of eps stays exact
        eps, log_std = eps + (u - u.detach()) / sigma.detach(), log_std.detach()
    log_q = -(eps**2) / 2 - log_std
    if config.tanh:
        log_q = log_q - 2 * (
            math.log(2) - u - softplus(-2 * u, threshold=40.0)
        )  # the logarithm of the derivative of tanh
    if not config.minus_log_p:
        return log_q - math.log(2 * math.pi) / 2
    if mu_p is None or x_p is None:
        return log_q + u**2 / 2
    log_std_p = log_sigma(x_p, config.param, config.min_std)
    return log_q + ((u - mu_p) * bounded_exp(-log_std_p)) ** 2 / 2 + log_std_p


def outputs(arguments: Arguments, for_z: Inputs, for_kl: Inputs, for_log_q: Inputs) -> tuple[Tensor | None, ...]:
    config = arguments.config

    def summed(terms: Tensor) -> Tensor:
        return terms.sum(dim=tuple(range(-config.event_ndim, 0))) if config.event_ndim else terms

    z = kl = log_q = None
    if for_z.eps is not None:
        z = for_z.mu + sigma_of(for_z.x, config.param, config.min_std) * for_z.eps
        z = torch.tanh(z) if config.tanh else z
    if config.kl:
        kl = summed(elementwise_kl(config, *for_kl[:4]))
    if config.log_q:
        log_q = summed(elementwise_log_q(config, for_log_q))
    asked = zip((z, kl, log_q), shapes(arguments), strict=True)
    return tuple(
        None if t is None or shape is None else in_format(t.to(shape.dtype), shape.memory_format) for t, shape in asked
    )


def formula(arguments: Arguments) -> tuple[Tensor | None, ...]:
    """Compute z, kl and log_q, differentiable to any order."""
    inputs = widened_inputs(arguments)
    return outputs(arguments, inputs, inputs, inputs)


def gradient_formula(arguments: Arguments, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Compute the outputs from which autograd computes the gradients of the kernels.

    Where the incoming gradient is 0 and a slope is infinite or NaN, the inputs are replaced by constants: autograd
    would multiply the two.
    """
    inputs, (dz, dkl, dlog_q), config = widened_inputs(arguments), grads, arguments.config
    for_z = inputs if dz is None or inputs.eps is None else hold_for_z(config, inputs, dz)
    for_kl = (
        inputs if dkl is None else hold(config, inputs, dkl, inputs.mu.shape, lambda i: elementwise_kl(config, *i[:4]))
    )
    for_log_q = inputs
    if dlog_q is not None and inputs.eps is not None:
        for_log_q = hold(config, inputs, dlog_q, inputs.eps.shape, lambda i: elementwise_log_q(config, i))
    return outputs(arguments, for_z, for_kl, for_log_q)


def hold_for_z(config: Config, inputs: Inputs, dz: Tensor) -> Inputs:
    with torch.no_grad():
        assert inputs.eps is not None
        eps = torch.where((dz == 0) & ~inputs.eps.isfinite(), 0, inputs.eps)
        dsigma = (dz * eps).sum(dim=tuple(range(len(config.sample_shape)))) if config.sample_shape else dz * eps
        held = (dsigma == 0) & ~sigma_has_finite_slope(inputs.x, config.param)
    return inputs._replace(x=torch.where(held, 1, inputs.x), eps=eps)


def hold(config: Config, inputs: Inputs, grad: Tensor, shape: torch.Size, terms: Callable[[Inputs], Tensor]) -> Inputs:
    """Hold the inputs of the terms whose gradient is 0 and whose slopes are not finite."""
    grad = grad.reshape((*grad.shape, *[1] * config.event_ndim))
    mu, x = inputs.mu.expand(shape), inputs.x.expand(shape)
    mu_p, x_p = (None if t is None else t.expand(shape) for t in (inputs.mu_p, inputs.x_p))
    variables = [t for t in (mu, x, mu_p, x_p) if t is not None and t.requires_grad]
    total = terms(Inputs(mu, x, mu_p, x_p, inputs.eps)).sum()
    slopes = torch.autograd.grad(total, variables, allow_unused=True)
    finite = [slope.isfinite() for slope in slopes if slope is not None]
    held = (grad == 0) & ~reduce(torch.logical_and, finite, torch.ones_like(grad, dtype=torch.bool))
    mu_p = None if mu_p is None else torch.where(held, 0, mu_p)
    x_p = None if x_p is None else torch.where(held, 1, x_p)
    return inputs._replace(mu=torch.where(held, 0, mu), x=torch.where(held, 1, x), mu_p=mu_p, x_p=x_p)


def sigma_has_finite_slope(x: Tensor, param: str) -> Tensor:
    if param == "std":
        return torch.ones_like(x, dtype=torch.bool)
    return ~x.isnan() if param == "softplus" else torch.exp(log_sigma(x, param, 0.0)).isfinite()


def widen(t: Tensor) -> Tensor:
    return t.to(torch.float64 if has_float64(t.device) else torch.float32)
