"""Finds and loads the C++ extension, reparam_kernels._C, or says why it cannot be loaded."""

import importlib
import importlib.util
import struct
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]


def is_truncated(library: Path) -> bool:
    """Return True for an ELF file that ends before its section table, which comes last. Loading it would crash."""
    with library.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return False  # the loader reports what is wrong with it
    (table,), (size, count) = struct.unpack_from("<Q", head, 40), struct.unpack_from("<HH", head, 58)
    return bool(library.stat().st_size < table + size * count)


def absent() -> str:
    """Return why the package has no extension for this Python, and what to do."""
    others = sorted(path.name for path in PACKAGE.glob("_C.*") if path.suffix in (".so", ".pyd"))
    built = f" for this Python, but has {', '.join(others)}" if others else ""
    if not (PACKAGE.parent / "csrc").is_dir():
        return (
            f"{PACKAGE} has no extension{built}. Install the package again: `pip install -v` shows why its C++ does "
            "not compile"
        )
    installed = [Path(entry).resolve() / PACKAGE.name for entry in sys.path]
    hidden = [folder for folder in installed if folder != PACKAGE and any(map(Path.is_file, extensions(folder)))]
    remedy = "Build in place with `pip install -e .`"
    if hidden:
        remedy = f"It hides the installed package, {hidden[0]}: start Python in another folder, or b{remedy[1:]}"
    return f"{PACKAGE} is the source tree and has no extension{built}. {remedy}"


def extensions(folder: Path) -> list[Path]:
    """Return the names that this Python would load the extension by."""
    return [folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]


def load() -> ModuleType | str:
    """Return the extension, or why it cannot be loaded."""
    spec = importlib.util.find_spec("reparam_kernels._C")
    if spec is None and not any(map(Path.is_file, extensions(PACKAGE))):
        return absent()
    if spec is not None and spec.origin is not None and is_truncated(Path(spec.origin)):
        sys.modules["reparam_kernels._C"] = None  # type: ignore[assignment]  # no later import may load it
        return "the extension's file is truncated: install the package again"
    try:
        return importlib.import_module("reparam_kernels._C")
    except ImportError as error:
        return str(error)


LOADED = load()  # at import, so that it sees every fork (csrc/core/dispatch.cpp)
