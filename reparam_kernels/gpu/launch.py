"""Launches a Triton kernel under the device of its tensors."""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from .plan import Strides
from .tiles import Operand


def compiler() -> str:
    """Return who compiles the kernels: "cuda", "hip" or "other"; "" if they are interpreted."""
    if triton.knobs.runtime.interpret:
        return ""
    return "hip" if torch.version.hip else "cuda" if torch.version.cuda else "other"


def device_guard(device: torch.device) -> Any:
    """Make the tensor's device the current one, as a launch needs."""
    return torch.get_device_module(device).device(device) if device.type != "cpu" else contextlib.nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel. Every launch of the package goes through here."""
    with device_guard(device):
        kernel[grid](*arguments, **constants)


def operand(t: Tensor | None, strides: Strides | None) -> Operand | None:
    if t is None or strides is None:
        return None
    return Operand(t.contiguous() if strides.copied else t, strides.outer, strides.row, strides.col)
