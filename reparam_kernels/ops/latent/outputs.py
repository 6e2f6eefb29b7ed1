"""The outputs and the gradients of the latent op: their shapes, and their memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.dtypes import compute_dtype
from ...core.formats import empty_like, format_of
from ...core.op import Shape
from .arguments import Arguments, unpacked


def format_of_mu(arguments: Arguments) -> torch.memory_format:
    """Return the format of mu, which is that of the outputs in its shape."""
    if arguments.mu.is_contiguous():
        return torch.contiguous_format
    return format_of(unpacked(arguments)[0])


def shapes(arguments: Arguments) -> tuple[Shape | None, ...]:
    """Return the shapes, dtypes and formats of z, kl and log_q. What has mu's shape has mu's format."""
    config, mu = arguments.config, arguments.mu
    if config.kl and config.log_q:  # no public function asks for both, and no kernel computes them at once
        raise ValueError(
            "latent: at most one of kl and log_q must be asked for; got both. Call the op twice, with one seed."
        )
    dims = list(mu.shape)
    if config.packed is not None:
        dims[config.packed] //= 2
    whole, contiguous = format_of_mu(arguments), torch.contiguous_format
    of_kl = whole if config.event_ndim == 0 else contiguous
    z_format, of_log_q = (contiguous, contiguous) if config.sample_shape else (whole, of_kl)
    z = Shape((*config.sample_shape, *dims), mu.dtype, z_format) if config.z else None
    rows, dtype = tuple(dims[: len(dims) - config.event_ndim]), compute_dtype(mu.dtype)
    kl = Shape(rows, dtype, of_kl) if config.kl else None
    log_q = Shape((*config.sample_shape, *rows), dtype, of_log_q) if config.log_q else None
    return z, kl, log_q


def empty_outputs(arguments: Arguments, mu: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Allocate z, kl and log_q as shapes() says, without the time that describing them takes. mu: unpacked."""
    config = arguments.config
    z = kl = log_q = None
    if config.z:
        z = mu.new_empty(config.sample_shape + mu.shape) if config.sample_shape else empty_like(mu)
    if config.kl:
        kl = _empty_rows(mu, config.event_ndim)
    elif config.log_q and config.sample_shape:
        rows = mu.shape[: mu.dim() - config.event_ndim]
        log_q = mu.new_empty(config.sample_shape + rows, dtype=compute_dtype(mu.dtype))
    elif config.log_q:
        log_q = _empty_rows(mu, config.event_ndim)
    return z, kl, log_q


def _empty_rows(mu: Tensor, event_ndim: int) -> Tensor:
    dtype = compute_dtype(mu.dtype)
    if event_ndim == 0:
        return torch.empty_like(mu, dtype=dtype, memory_format=format_of(mu))
    sizes = mu.shape[: mu.dim() - event_ndim]
    if len(sizes) == 1 and mu.dtype is dtype:
        return mu.new_empty(sizes[0])  # half the time of a tuple and of a keyword
    return mu.new_empty(sizes, dtype=dtype)


def empty_gradients(
    arguments: Arguments, mu: Tensor, x: Tensor, wanted: Sequence[bool], with_prior: bool
) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]:
    """Allocate the gradient of packed moments, or None, and those of mu, x, mu_p and x_p. mu, x: unpacked.

    The gradients of mu and x are halves of the packed one. Those of the prior have the shape of mu.
    """
    packed = dmu = dx = dmu_p = dx_p = None
    if arguments.x is not None:
        dmu = empty_like(mu) if wanted[0] else None
        dx = empty_like(x) if wanted[1] else None
    elif wanted[0]:
        packed = empty_like(arguments.mu)
        dmu, dx = packed.chunk(2, arguments.config.packed or 0)
    if with_prior:
        dmu_p = _empty_prior_gradient(arguments.mu_p, mu) if wanted[2] else None
        dx_p = _empty_prior_gradient(arguments.x_p, mu) if wanted[3] else None
    return packed, (dmu, dx, dmu_p, dx_p)


def _empty_prior_gradient(like: Tensor | None, mu: Tensor) -> Tensor:
    """Allocate a gradient to a prior in the shape of mu, in the compute dtype if it is to be summed later."""
    if like is not None and like.shape == mu.shape and like.dtype == mu.dtype:
        return empty_like(like)
    return mu.new_empty(mu.shape, dtype=compute_dtype(mu.dtype))
