"""What a call launches on a GPU, as torch.profiler sees it, and the command that shows the kernels' counters."""

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COUNTED_BY_NCU = 10  # our first launches, a backward among them


def activities(device: torch.device) -> list[ProfilerActivity]:
    own = {"cuda": [ProfilerActivity.CUDA], "xpu": [ProfilerActivity.XPU]}
    return [ProfilerActivity.CPU, *own.get(device.type, [])]


def launches(call: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Count what one call launches, by name. On the CPU nothing is launched."""
    if device.type == "cpu":
        return Counter()
    call()
    with profile(activities=activities(device)) as recorded:
        call()
        torch.get_device_module(device).synchronize()
    return counted(recorded.events())


def counted(events: Iterable[Any]) -> Counter[str]:
    """Count the profiler's events on a device. Ranges of the host's code, which it repeats there, are no launches."""
    return Counter(e.name for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation)


def own_kernels() -> set[str]:
    """Return the names of the package's Triton kernels that are loaded."""
    modules = [module for name, module in sys.modules.items() if name.startswith("reparam_kernels.")]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and type(value).__module__.startswith("triton.")
    }


def ncu(names: Iterable[str], arguments: list[str]) -> str | None:
    """Return the command for Nsight Compute that shows the counters of our kernels, or None if none ran."""
    ours = sorted(own_kernels() & set(names))
    if not ours or torch.version.hip:
        return None
    command = ["python", "-m", "reparam_kernels", *arguments, "--rounds", "1"]
    return (
        f"ncu --set full --kernel-name 'regex:^({'|'.join(ours)})$' --launch-count {COUNTED_BY_NCU} \\\n"
        f"  {shlex.join(command)}"
    )
