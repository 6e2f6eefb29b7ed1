"""The table from device to backend, and from backend to the module that holds an op's kernels."""

import importlib
import os
import re
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import extension, torch_modes

NAMES = ("cpu", "triton", "reference")
OLDEST_CAPABILITY = (7, 0)
AMD_ARCHITECTURES = re.compile(r"gfx(90[68a]|942|950|1[1-9]..)")  # for which Triton compiles the kernels
FORCED = os.environ.get("REPARAM_BACKEND")
if FORCED is not None and FORCED not in NAMES:
    raise ValueError(f"REPARAM_BACKEND: must be one of {', '.join(NAMES)}; got {FORCED!r}. Correct it, or unset it.")


def cpu_missing() -> str | None:
    """Return why the C++ kernels cannot run, or None if they can."""
    if torch_modes.MISSING is not None:
        return torch_modes.MISSING
    if isinstance(extension.LOADED, str):
        return extension.LOADED
    try:
        from . import cpu  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def triton_missing() -> str | None:
    """Return why the Triton kernels cannot run, or None if they can."""
    if torch_modes.MISSING is not None:
        return torch_modes.MISSING
    try:
        import triton
    except ImportError as error:
        return str(error)
    found = triton.__version__
    if tuple(map(int, found.split(".")[:2])) < (3, 6):
        return f"triton {found} is installed, and the kernels need 3.6 or later"
    return None


def architecture(device_type: str) -> str:
    """Name what a GPU's code is compiled for: the compute capability, or the name that AMD and Intel give."""
    if device_type == "xpu":
        return f"architecture {torch.xpu.get_device_properties().architecture}"
    if torch.version.hip:
        return f"architecture {torch.cuda.get_device_properties().gcnArchName}"
    return "compute capability {}.{}".format(*torch.cuda.get_device_capability())


def too_old(device_type: str) -> str | None:
    """Return why Triton cannot compile for a GPU, or None if it can, or if there is none."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        known = AMD_ARCHITECTURES.match(torch.cuda.get_device_properties().gcnArchName)
        takes = None if known else "compiles for gfx906, gfx908, gfx90a, gfx942, gfx950, and from gfx11 on"
    else:
        takes = None if torch.cuda.get_device_capability() >= OLDEST_CAPABILITY else "needs 7.0 or later"
    return takes and f"{torch.cuda.get_device_name()} has {architecture('cuda')}, and Triton {takes}"


def unusable(device: str) -> str | None:
    """Return torch's reason why a device cannot be used, or None if it can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        return str(error).partition("\n")[0]
    return None


def interpreting() -> bool:
    """Return True if Triton's interpreter runs the kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def backend_name(device_type: str) -> str:
    """Return the backend for a device type. The first fallback to the reference warns."""
    if FORCED == "reference" or device_type == "meta":
        return "reference"
    if FORCED == "triton" or (FORCED is None and device_type in ("cuda", "xpu")):
        name, takes, why = "triton", device_type in ("cuda", "xpu") or interpreting(), triton_missing()
        why = why or too_old(device_type)
    else:
        name, takes, why = "cpu", device_type == "cpu", cpu_missing() if device_type == "cpu" else None
    if takes and why is None:
        return name
    if FORCED is not None:
        got = why or f"a tensor on {device_type}"
        raise RuntimeError(
            f"REPARAM_BACKEND={FORCED}: every tensor must be one that this backend takes; got {got}. "
            "Unset REPARAM_BACKEND, or set TRITON_INTERPRET=1 to run the Triton kernels on CPU tensors."
        )
    why = why or f"no kernels for {device_type}"
    warnings.warn(f"reparam_kernels: runs in plain torch on {device_type}, slower: {why}.", stacklevel=2)
    return "reference"


@cache
def kernels(package: str, device: torch.device) -> ModuleType | None:
    """Return a package's kernels for a device, imported when first needed, or None if the reference runs."""
    name = backend_name(device.type)
    return None if name == "reference" else importlib.import_module(f"{package}.{name}")


@torch_modes.constant_to_the_compiler
def has_kernels(device_type: str) -> bool:
    return backend_name(device_type) != "reference"


def backend_for(tensor: Tensor) -> str:
    """Name the backend that a tensor's device gets: "cpu", "triton" or "reference".

    Args:
        tensor: any tensor.

    Raises:
        TypeError: if it is not a tensor.
        RuntimeError: REPARAM_BACKEND forces a backend that cannot take the tensor.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.backend_for(torch.zeros(3))
        'cpu'
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"backend_for: tensor must be a torch.Tensor; got {type(tensor).__name__}. "
            "Pass a tensor on the device in question."
        )
    return backend_name(tensor.device.type)
