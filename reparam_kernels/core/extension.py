"""Finds and loads the C++ extension, reparam_kernels._C, or says why it cannot be loaded."""

import importlib
import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType


def is_truncated(library: Path) -> bool:
    """Return True for an ELF file that ends before its section table, which comes last. Loading it would crash."""
    with library.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return False  # the loader reports what is wrong with it
    (table,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return bool(library.stat().st_size < table + size * count)


def load() -> ModuleType | str:
    """Return the extension, or why it cannot be loaded."""
    spec = importlib.util.find_spec("reparam_kernels._C")
    if spec is not None and spec.origin is not None and is_truncated(Path(spec.origin)):
        sys.modules["reparam_kernels._C"] = None  # type: ignore[assignment]  # no later import may load it
        return "the extension's file is truncated: install the package again"
    try:
        return importlib.import_module("reparam_kernels._C")
    except ImportError as error:
        return str(error)


LOADED = load()  # at import, so that it sees every fork (csrc/core/dispatch.cpp)
