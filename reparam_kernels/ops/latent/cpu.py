"""The CPU launch of the latent op: allocates the outputs and calls csrc/ops/latent.cpp."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ... import _C
from ...core.cpu import empty, explain
from ...core.dtypes import compute_dtype
from .arguments import Arguments, empty_prior_gradient, expanded_prior, unpacked


@lru_cache(maxsize=256)
def _options(param: str, min_std: float, clamp: tuple[float, float] | None) -> _C.Options:
    low, high = clamp or (0.0, 0.0)
    return _C.Options(getattr(_C.Param, param), min_std, clamp is not None, low, high)


def _empty_kl(mu: Tensor, event_ndim: int) -> Tensor:
    shape, dtype = mu.shape[: mu.dim() - event_ndim], compute_dtype(mu.dtype)
    return mu.new_empty(shape) if mu.dtype is dtype else mu.new_empty(shape, dtype=dtype)  # the keyword costs a us


def forward(arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    config, seed, eps = arguments.config, arguments.seed, arguments.eps
    mu, x = (arguments.mu, arguments.x) if arguments.x is not None else unpacked(arguments)
    mu_p, x_p = (None, None) if arguments.mu_p is None else expanded_prior(arguments, mu.shape)
    z = kl = None
    if config.z:
        z = mu.new_empty(config.sample_shape + mu.shape) if config.sample_shape else empty(mu)
    if config.kl:
        kl = _empty_kl(mu, config.event_ndim)
    options = _options(config.param, config.min_std, config.clamp)
    try:
        _C.latent_forward(options, torch.get_num_threads(), mu, x, mu_p, x_p, seed, eps, z, kl)
    except _C.InvalidArgument as refusal:
        tensors = {"mu": mu, "x": x, "mu_p": mu_p, "x_p": x_p, "seed": seed, "eps": eps, "z": z, "kl": kl}
        raise explain(refusal, tensors) from None
    return z, kl


def backward(
    arguments: Arguments, grads: tuple[Tensor | None, ...], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients to mu, x, mu_p and x_p, the prior's in the shape of mu; packed: to the moments, None, mu_p, x_p."""
    config, (dz, dkl) = arguments.config, grads
    mu, x = (arguments.mu, arguments.x) if arguments.x is not None else unpacked(arguments)
    mu_p, x_p = (None, None) if arguments.mu_p is None else expanded_prior(arguments, mu.shape)
    packed = dmu = dx = dmu_p = dx_p = None
    if arguments.x is not None:
        dmu = empty(mu) if wanted[0] else None
        dx = empty(mu) if wanted[1] else None
    elif wanted[0]:
        packed = empty(arguments.mu)
        dmu, dx = packed.chunk(2, config.packed or 0)
    if dkl is not None:
        dmu_p = empty_prior_gradient(arguments.mu_p, mu) if wanted[2] else None
        dx_p = empty_prior_gradient(arguments.x_p, mu) if wanted[3] else None
    seed, eps = (None, None) if dz is None else (arguments.seed, arguments.eps)
    options = _options(config.param, config.min_std, config.clamp)
    try:
        _C.latent_backward(options, torch.get_num_threads(), mu, x, mu_p, x_p, seed, eps, dz, dkl, dmu, dx, dmu_p, dx_p)
    except _C.InvalidArgument as refusal:
        tensors = {"mu": mu, "x": x, "mu_p": mu_p, "x_p": x_p, "seed": seed, "eps": eps, "dz": dz, "dkl": dkl}
        raise explain(refusal, tensors) from None
    return (dmu, dx, dmu_p, dx_p) if arguments.x is not None else (packed, None, dmu_p, dx_p)
