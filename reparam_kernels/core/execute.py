"""Chooses the execution path of a call: the kernels, the registered op, or the formula in plain torch."""

from typing import Any

import torch
from torch import Tensor

from . import backends, dtensor, torch_modes
from .op import Op, Outputs, any_requires_grad

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def execute(op: Op[Any], arguments: Any) -> Outputs:
    """Return the outputs of an op, None for each that is not asked for."""
    if torch.compiler.is_compiling():
        return _compile(op, arguments)
    kernels = op.kernels(arguments[0].device)
    if kernels is None:
        return _run_sharded(op, arguments) if _any_dtensor(arguments) else op.in_place_of_kernels(arguments)
    tensors = arguments[:-1]
    if torch_modes.watched() or not _PLAIN.issuperset(map(type, tensors)):
        return _run_watched(op, arguments)
    if torch.is_grad_enabled():
        if any_requires_grad(tensors[op.n_inputs :]):  # the kernels give the noise no gradient
            return op.by_formula(arguments)
        if any_requires_grad(tensors[: op.n_inputs]):
            return op.eager(arguments)
    return kernels.forward(arguments)  # type: ignore[no-any-return]


def _compile(op: Op[Any], arguments: Any) -> Outputs:
    """Run the op where torch.compile traces it."""
    if _any_dtensor(arguments):
        raise TypeError(
            "reparam_kernels: compiled code must call on tensors of this process; got DTensor. "
            "Call on t.to_local() with window=, or outside the compiled code."
        )
    if not backends.has_kernels(arguments[0].device.type):
        return op.in_place_of_kernels(arguments)
    in_formula = _wants_noise_grad(op, arguments) or torch_modes.compiling_a_transform()
    return op.by_formula(arguments) if in_formula else op.registered(arguments)


def _run_watched(op: Op[Any], arguments: Any) -> Outputs:
    """Run the op in a transform, in a mode that sees the ops, or on a tensor of a subclass."""
    if _any_dtensor(arguments):
        return _run_sharded(op, arguments)
    if _wants_noise_grad(op, arguments) or torch_modes.in_transform():
        return op.by_formula(arguments)
    return op.registered(arguments)


def _any_dtensor(arguments: Any) -> bool:
    return any(dtensor.is_dtensor(t) for t in arguments[:-1])


def _run_sharded(op: Op[Any], arguments: Any) -> Outputs:
    """Run the op on this process's part of DTensors."""
    if op.shard is None:
        raise TypeError(
            f"reparam_kernels: the op {op.name} must get tensors of this process; got DTensor. Call on t.to_local()."
        )
    part, join = op.shard(arguments)
    return join(execute(op, part))


def _wants_noise_grad(op: Op[Any], arguments: Any) -> bool:
    return torch.is_grad_enabled() and any_requires_grad(arguments[op.n_inputs : -1])
