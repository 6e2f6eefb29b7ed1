"""Launches Triton kernels under the device of their tensors, and keeps the launches that calls have planned.

Triton finds the compiled kernel of a launch by specialising its arguments, which takes ten times as long as the launch.
A Launch does so once. Later it passes the arguments straight to the compiled kernel, as Triton would.
"""

import contextlib
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

# The versions of triton whose compiled kernels are called directly. With another, Triton launches each time.
KNOWN = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)


def compiler() -> str:
    """Return who compiles the kernels: "cuda", "hip" or "other"; "" if they are interpreted."""
    if triton.knobs.runtime.interpret:
        return ""
    return "hip" if torch.version.hip else "cuda" if torch.version.cuda else "other"


def device_guard(device: torch.device) -> Any:
    """Make the tensor's device the current one, as a launch needs."""
    return torch.get_device_module(device).device(device) if device.type != "cpu" else contextlib.nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> Any:
    """Launch a kernel by Triton, which returns what it has compiled, or None from the interpreter."""
    with device_guard(device):
        return kernel[grid](*arguments, **constants)


def is_hooked(kernel: Any) -> bool:
    """Return True if somebody, such as a profiler, has asked Triton to be called at each launch."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks)


class Launch:
    """A launch without its tensors, which are the kernel's first arguments.

    The tensors of each call must be those of the first in all that Triton specialises: dtype, None, and whether the
    address is a multiple of 16.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        self.kernel, self.device, self.grid, self.arguments, self.options = kernel, device, grid, arguments, options
        self._index = device.index or 0
        self._grid = (*grid, 1, 1)[:3]
        self._run: Any = None  # of the compiled kernel
        self._fixed: tuple[Any, ...] = ()  # its arguments between the stream and ours

    def __call__(self, *tensors: Tensor | None) -> None:
        if self._run is None or is_hooked(self.kernel):
            compiled = launch(self.kernel, self.grid, self.device, *tensors, *self.arguments, **self.options)
            if KNOWN and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend in ("cuda", "hip"):
                self._fixed = compiled.function, compiled.packed_metadata, None, None, None  # the last three are hooks'
                self._run = compiled.run
        elif driver.active.get_current_device() == self._index:
            stream = driver.active.get_current_stream(self._index)
            self._run(*self._grid, stream, *self._fixed, *tensors, *self.arguments)
        else:
            with device_guard(self.device):
                self(*tensors)


def signatures(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return all that a launch depends on of each tensor."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors])


@lru_cache(maxsize=1024)
def window_tensor(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the numbers of a window on the device. They are kept, since training meets the same few windows."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


class Plans(dict[Any, Any]):
    """What the ops have planned, keyed by everything that it depends on."""

    LIMIT = 1024

    def add(self, key: Any, plan: Any) -> Any:
        """Keep a plan. At the limit, the others are dropped first."""
        if len(self) >= self.LIMIT:
            self.clear()
        self[key] = plan
        return plan


PLANS = Plans()
