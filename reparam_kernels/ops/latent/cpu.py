"""The CPU launch of the latent op: allocates the outputs and calls csrc/ops/latent.cpp."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ... import _C
from ...core.cpu import explain
from .arguments import Arguments, Config, expanded_prior, unpacked
from .outputs import empty_gradients, empty_outputs


def _options(config: Config) -> _C.Options:
    return _make_options(config) if config.whole else _kept_options(config)


def _make_options(config: Config) -> _C.Options:
    low, high = config.clamp or (0.0, 0.0)
    density = config.event_ndim, config.minus_log_p, config.tanh, config.path_derivative
    return _C.Options(
        getattr(_C.Param, config.param), config.min_std, config.clamp is not None, low, high, *density, *config.window
    )


_kept_options = lru_cache(maxsize=256)(_make_options)


def forward(arguments: Arguments) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    mu, x, mu_p, x_p, seed, eps, config = arguments
    if x is None:
        mu, x = unpacked(arguments)
    if mu_p is not None:
        mu_p, x_p = expanded_prior(arguments, mu.shape)
    z, kl, log_q = empty_outputs(arguments, mu)
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
    if x is None:
        mu, x = unpacked(arguments)
    with_prior = mu_p is not None and (dkl is not None or dlog_q is not None)
    packed, results = empty_gradients(arguments, mu, x, wanted, with_prior)
    if mu_p is not None:
        mu_p, x_p = expanded_prior(arguments, mu.shape)
    if dz is None and dlog_q is None:
        seed = eps = None
    inputs, incoming = (mu, x, mu_p, x_p, seed, eps), (dz, dkl, dlog_q)
    try:
        _C.latent_backward(_options(config), torch.get_num_threads(), *inputs, *incoming, *results)
    except _C.InvalidArgument as refusal:
        tensors = {"mu": mu, "x": x, "mu_p": mu_p, "x_p": x_p, "seed": seed, "eps": eps, "dz": dz, "dkl": dkl}
        raise explain(refusal, tensors | {"dlog_q": dlog_q}) from None
    return results if packed is None else (packed, None, *results[2:])
