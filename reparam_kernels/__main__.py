"""`python -m reparam_kernels` reports what this installation runs; `selftest` checks that its kernels work."""

import argparse
import os
import platform
import sys
import textwrap
from importlib import metadata

import torch

from . import NOISE_VERSION, __version__
from .core import backends
from .profiling import bench, command


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_line() -> str:
    why = backends.cpu_missing()
    if why is not None:
        return f"missing: {why}"
    from . import _C

    threads = f"OpenMP, {torch.get_num_threads()} threads" if _C.has_openmp() else "serial: built without OpenMP"
    forced = os.environ.get("REPARAM_CPU_ISA")
    why = f"forced by REPARAM_CPU_ISA={forced}" if forced else "the best that this CPU has"
    return f"C++, {_C.isa()}: {why}, of {', '.join(_C.available_isas())} ({threads})"


def triton_line() -> str:
    why = backends.triton_missing()
    if why is not None:
        return f"missing: {why}"
    for gpu in (torch.cuda, torch.xpu):
        if gpu.is_available():
            return f"on {gpu.get_device_name()}, {backends.architecture(gpu.__name__.rpartition('.')[2])}"
    if backends.interpreting():
        return "in the interpreter, on CPU tensors with REPARAM_BACKEND=triton"
    return "installed; torch sees no GPU"


def report() -> None:
    rows = {
        "reparam_kernels": f"{__version__}, noise version {NOISE_VERSION}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": version("triton"),
        "numpy": version("numpy"),
        "cpu backend": cpu_line(),
        "triton backend": triton_line(),
        "REPARAM_BACKEND": backends.FORCED or "not set",
    }
    for name, value in rows.items():
        print(textwrap.fill(f"{name:16} {value}", 80, subsequent_indent=" " * 17, break_on_hyphens=False))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reparam_kernels", description="What this installation runs.")
    commands = parser.add_subparsers(dest="command")
    check = commands.add_parser("selftest", help="check the kernels of a device: bits, gradients, launches")
    check.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measuring = {
        "profile": (command.main, command.add_command(commands)),
        "bench": (bench.main, bench.add_command(commands)),
    }
    args = parser.parse_args()
    if args.command == "selftest":
        from . import selftest

        why = backends.unusable(args.device)
        if why is not None:
            check.error(f"--device: must be a device that torch can use here; got {args.device!r}: {why}")
        return selftest.main(args.device)
    if args.command in measuring:
        run, own = measuring[args.command]
        return run(args, own)
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
