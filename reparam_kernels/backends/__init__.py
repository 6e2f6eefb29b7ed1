"""The table from device to backend. A backend is a module with randn, forward and backward."""

import contextlib
import importlib
import importlib.util
import os
import struct
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import modes


def cut_off(library: Path) -> bool:
    """An ELF file that ends before its table of sections, which comes last: to load it would kill the process."""
    with library.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return False  # for the loader to say
    (table,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return bool(library.stat().st_size < table + size * count)


_spec = importlib.util.find_spec("reparam_kernels._C")
_CUT_OFF = _spec is not None and _spec.origin is not None and cut_off(Path(_spec.origin))
if _CUT_OFF:
    sys.modules["reparam_kernels._C"] = None  # type: ignore[assignment]  # importing it is an ImportError from here on
with contextlib.suppress(ImportError):  # cpu_missing says why
    from .. import _C  # noqa: F401  # now, since it must see every fork: csrc/core/dispatch.cpp

NAMES = ("cpu", "triton", "reference")
FORCED = os.environ.get("REPARAM_BACKEND")
if FORCED is not None and FORCED not in NAMES:
    raise ValueError(f"REPARAM_BACKEND: must be one of {', '.join(NAMES)}; got {FORCED!r}. Correct it, or unset it.")


def cpu_missing() -> str | None:
    """Why there is no CPU kernel, or None where there is one."""
    if _CUT_OFF:
        return "the extension's file is cut off: install the package again"
    try:
        from . import cpu  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "No module named 'triton'"


def interpreting() -> bool:
    """Triton's interpreter runs its kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def name_of(device_type: str) -> str:
    """The backend for a type of device; the first fallback of each warns."""
    if FORCED == "reference" or device_type == "meta":
        return "reference"
    if FORCED == "triton" or (FORCED is None and device_type in ("cuda", "xpu")):
        name, takes, why = "triton", device_type in ("cuda", "xpu") or interpreting(), triton_missing()
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
def of(device: torch.device) -> ModuleType | None:
    """The backend's module, imported when first needed; None: no kernels, so the reference."""
    name = name_of(device.type)
    return None if name == "reference" else importlib.import_module(f".{name}", __name__)


@modes.constant_to_the_compiler
def has_kernels(device_type: str) -> bool:
    return name_of(device_type) != "reference"


def backend_for(tensor: Tensor) -> str:
    """Name the backend that a tensor's device gets: "cpu", "triton" or "reference".

    Args:
        tensor: any tensor.

    Raises:
        RuntimeError: REPARAM_BACKEND forces a backend that cannot take the tensor.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.backend_for(torch.zeros(3))
        'cpu'
    """
    return name_of(tensor.device.type)
