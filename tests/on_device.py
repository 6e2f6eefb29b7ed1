"""Runs the kernels on another device for tests whose tensors are on the CPU: TEST_DEVICE=cuda python -m pytest tests.

Every test that takes the fixture `backend` then checks the compiled Triton kernels of that device, not the interpreter.
"""

from typing import Any

import torch
from torch import Tensor


def moved(value: Any, device: torch.device | str) -> Any:
    """Copy all tensors in nested tuples to a device, each with the layout and the alignment that it has."""
    if isinstance(value, Tensor):
        last = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
        start = value.data_ptr() % 16 // value.element_size()
        memory = torch.empty(start + last + 1 if value.numel() else start, dtype=value.dtype, device=device)
        if value.numel():
            memory[start:].copy_(torch.as_strided(value.detach(), (last + 1,), (1,)))
        return memory.as_strided(value.shape, value.stride(), start)
    if isinstance(value, tuple):
        parts = [moved(v, device) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class Kernels:
    """An op's kernels, each of which copies its tensors to the device, runs there, and copies the results back."""

    def __init__(self, module: Any, device: str) -> None:
        self.module, self.device = module, device

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self.module, name)
        return lambda *arguments: moved(kernel(*moved(arguments, self.device)), "cpu")

    def fill_eps(self, out: Tensor, seeds: Tensor) -> None:
        there = moved(out, self.device)
        self.module.fill_eps(there, seeds.to(self.device))
        out.copy_(there)
