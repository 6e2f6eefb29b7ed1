"""Chooses the execution path of a call: the kernels, the registered op, or the formula in plain torch."""

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, torch_modes
from .op import Op, Outputs, any_requires_grad

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def execute(op: Op[Any], arguments: Any) -> Outputs:
    """Return the outputs of an op, None for each that is not asked for."""
    tensors, device = arguments[:-1], arguments[0].device
    grad_enabled = torch.is_grad_enabled()
    wants_noise_grad = grad_enabled and any_requires_grad(tensors[op.n_inputs :])  # the kernels give it no gradient
    if torch.compiler.is_compiling():
        if not backends.has_kernels(device.type):
            return op.in_place_of_kernels(arguments)
        in_formula = wants_noise_grad or torch_modes.compiling_a_transform()
        return op.by_formula(arguments) if in_formula else op.registered(arguments)
    kernels = op.kernels(device)
    if kernels is None:
        return op.in_place_of_kernels(arguments)
    if wants_noise_grad or torch_modes.in_transform():
        return op.by_formula(arguments)
    if torch_modes.in_dispatch_mode() or not _PLAIN.issuperset(map(type, tensors)):
        checks.local(tensors)
        return op.registered(arguments)
    if grad_enabled and any_requires_grad(tensors[: op.n_inputs]):
        return op.eager(arguments)
    return kernels.forward(arguments)  # type: ignore[no-any-return]
