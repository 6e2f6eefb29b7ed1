"""The CPU launch of the mixture op: allocates the outputs and calls csrc/ops/mixture.cpp."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ... import _C
from ...core.cpu import empty, explain
from ...core.dtypes import compute_dtype
from .arguments import Arguments, Config, empty_outputs, weights_by_component


@lru_cache(maxsize=256)
def _options(config: Config) -> _C.Options:
    low, high = config.clamp or (0.0, 0.0)
    return _C.Options(getattr(_C.Param, config.param), config.min_std, config.clamp is not None, low, high)


def forward(arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    return _forward(arguments, saving=False)[:2]


def forward_saving(
    arguments: Arguments,
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]:
    joint, dims, joint_sums, dims_sums = _forward(arguments, saving=True)
    return (joint, dims), (joint_sums, dims_sums)


def _forward(arguments: Arguments, saving: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    z, mu, x, log_weights = arguments.z, arguments.mu, arguments.x, weights_by_component(arguments)
    joint, dims, joint_sums, dims_sums = empty_outputs(arguments, saving)
    options, threads = _options(arguments.config), torch.get_num_threads()
    try:
        _C.mixture_forward(options, threads, z, mu, x, log_weights, joint, dims, joint_sums, dims_sums)
    except _C.InvalidArgument as refusal:
        tensors = {"z": z, "mu": mu, "x": x, "log_weights": log_weights}
        raise explain(refusal, tensors) from None
    return joint, dims, joint_sums, dims_sums


def backward(
    arguments: Arguments, grads: tuple[Tensor | None, ...], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients to z, mu, x and log_weights; that of one weight for all comes in the shape of the components."""
    z, mu, x, log_weights = arguments.z, arguments.mu, arguments.x, weights_by_component(arguments)
    djoint, ddims = grads
    if djoint is None and ddims is None:
        return None, None, None, None
    joint_sums = None if djoint is None else arguments.joint_sums
    dims_sums = None if ddims is None else arguments.dims_sums
    dz, dmu, dx = (empty(t) if want else None for t, want in zip((z, mu, x), wanted, strict=False))
    dlog_weights = None
    if wanted[3] and log_weights is not None:
        dlog_weights = log_weights.new_empty(log_weights.shape, dtype=compute_dtype(z.dtype))
    options, threads = _options(arguments.config), torch.get_num_threads()
    sums, outputs = (joint_sums, dims_sums), (dz, dmu, dx, dlog_weights)
    try:
        _C.mixture_backward(options, threads, z, mu, x, log_weights, djoint, ddims, *sums, *outputs)
    except _C.InvalidArgument as refusal:
        tensors = {"z": z, "mu": mu, "x": x, "log_weights": log_weights, "djoint": djoint, "ddims": ddims}
        tensors |= {"joint_sums": joint_sums, "dims_sums": dims_sums}
        raise explain(refusal, tensors) from None
    return dz, dmu, dx, None if dlog_weights is None or log_weights is None else dlog_weights.to(log_weights.dtype)
