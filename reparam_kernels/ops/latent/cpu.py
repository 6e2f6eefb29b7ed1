"""The CPU launch of the latent op: allocates the outputs and calls csrc/ops/latent.cpp."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ... import _C
from ...core.cpu import explain
from ...core.dtypes import compute_dtype
from ...core.formats import empty_like, format_of
from .arguments import Arguments, Config, empty_prior_gradient, expanded_prior, unpacked


def _options(config: Config) -> _C.Options:
    return _make_options(config) if config.whole else _kept_options(config)


def _make_options(config: Config) -> _C.Options:
    low, high = config.clamp or (0.0, 0.0)
    density = config.event_ndim, config.minus_log_p, config.tanh, config.path_derivative
    return _C.Options(
        getattr(_C.Param, config.param), config.min_std, config.clamp is not None, low, high, *density, *config.window
    )


_kept_options = lru_cache(maxsize=256)(_make_options)


def _empty_kl(mu: Tensor, event_ndim: int) -> Tensor:
    dtype = compute_dtype(mu.dtype)
    if event_ndim == 0:
        return torch.empty_like(mu, dtype=dtype, memory_format=format_of(mu))
    sizes = mu.shape[: mu.dim() - event_ndim]
    if len(sizes) == 1 and mu.dtype is dtype:
        return mu.new_empty(sizes[0])  # half the time of a tuple and of a keyword
    return mu.new_empty(sizes, dtype=dtype)


def _empty_log_q(mu: Tensor, config: Config) -> Tensor:
    if not config.sample_shape:
        return _empty_kl(mu, config.event_ndim)
    rows = mu.shape[: mu.dim() - config.event_ndim]
    return mu.new_empty(config.sample_shape + rows, dtype=compute_dtype(mu.dtype))


def forward(arguments: Arguments) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    mu, x, mu_p, x_p, seed, eps, config = arguments
    if x is None:
        mu, x = unpacked(arguments)
    if mu_p is not None:
        mu_p, x_p = expanded_prior(arguments, mu.shape)
    z = kl = log_q = None
    if config.z:
        z = mu.new_empty(config.sample_shape + mu.shape) if config.sample_shape else empty_like(mu)
    if config.kl:
        kl = _empty_kl(mu, config.event_ndim)
    if config.log_q:
        log_q = _empty_log_q(mu, config)
    try:
        _C.latent_forward(_options(config), torch.get_num_threads(), mu, x, mu_p, x_p, seed, eps, z, kl, log_q)
    except _C.InvalidArgument as refusal:
        tensors = {"mu": mu, "x": x, "mu_p": mu_p, "x_p": x_p, "seed": seed, "eps": eps, "z": z, "kl": kl}
        raise explain(refusal, tensors | {"log_q": log_q}) from None
    return z, kl, log_q


def backward(
    arguments: Arguments, grads: tuple[Tensor | None, ...], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients to mu, x, mu_p and x_p, the prior's in the shape of mu; packed: to the moments, None, mu_p, x_p."""
    mu, x, mu_p, x_p, seed, eps, config = arguments
    dz, dkl, dlog_q = grads
    packed = dmu = dx = dmu_p = dx_p = None
    if x is not None:
        dmu = empty_like(mu) if wanted[0] else None
        dx = empty_like(x) if wanted[1] else None
    else:
        mu, x = unpacked(arguments)
        if wanted[0]:
            packed = empty_like(arguments.mu)
            dmu, dx = packed.chunk(2, config.packed or 0)
    if mu_p is not None:
        mu_p, x_p = expanded_prior(arguments, mu.shape)
        if dkl is not None or dlog_q is not None:
            dmu_p = empty_prior_gradient(arguments.mu_p, mu) if wanted[2] else None
            dx_p = empty_prior_gradient(arguments.x_p, mu) if wanted[3] else None
    if dz is None and dlog_q is None:
        seed = eps = None
    inputs, incoming, results = (mu, x, mu_p, x_p, seed, eps), (dz, dkl, dlog_q), (dmu, dx, dmu_p, dx_p)
    try:
        _C.latent_backward(_options(config), torch.get_num_threads(), *inputs, *incoming, *results)
    except _C.InvalidArgument as refusal:
        tensors = {"mu": mu, "x": x, "mu_p": mu_p, "x_p": x_p, "seed": seed, "eps": eps, "dz": dz, "dkl": dkl}
        raise explain(refusal, tensors | {"dlog_q": dlog_q}) from None
    return (packed, None, dmu_p, dx_p) if arguments.x is None else (dmu, dx, dmu_p, dx_p)
