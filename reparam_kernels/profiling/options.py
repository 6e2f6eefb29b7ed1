"""The options that `profile` and `bench` share, and the conditions of a measurement."""

import argparse
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # hides messages of torch's profiler

import torch

import reparam_kernels as rk

from ..core import backends
from ..ops.latent.arguments import PARAMS
from .processor import processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def shape(text: str) -> tuple[int, ...]:
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be positive numbers with x between them, as 512x128; got {text!r}")
    return tuple(sizes)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number; got {text!r}")
    return int(text)


def add_command(commands: Any, name: str, **texts: str) -> argparse.ArgumentParser:
    """Add a command of `python -m reparam_kernels`. texts: its help, its description and its epilog."""
    usage = f"python -m reparam_kernels {name} [options]"
    as_written = argparse.RawDescriptionHelpFormatter
    parser: argparse.ArgumentParser = commands.add_parser(name, usage=usage, formatter_class=as_written, **texts)
    return parser


def add_case_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add --dtype and --param. several: --dtype takes a list."""
    many = {"nargs": "+", "default": ["float32"]} if several else {"default": "float32"}
    parser.add_argument("--dtype", choices=list(DTYPES), metavar="T", **many,
                        help=f"of the inputs: {', '.join(DTYPES)} (the first)")  # fmt: skip
    parser.add_argument("--param", choices=PARAMS, default=PARAMS[0], metavar="NAME",
                        help=f"what the encoder gives: {', '.join(PARAMS)} (the first)")  # fmt: skip


def add_device_options(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", metavar="D", default=default, help="as torch names it (%(default)s)")
    parser.add_argument("--threads", metavar="N", type=positive, default=1, help="of torch on the CPU (1)")
    parser.add_argument(
        "--rounds", metavar="N", type=positive, default=40, help="in which the providers take turns (40)"
    )


def file(ending: str) -> Callable[[str], Path]:
    """Return the type of an option that names a file to write, which is refused before anything is measured."""

    def checked(text: str) -> Path:
        path = Path(text)
        if path.suffix != ending or not path.parent.is_dir() or path.is_dir():
            raise argparse.ArgumentTypeError(f"must be a {ending} file in a folder that exists; got {text!r}")
        return path

    return checked


def device(args: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    why = backends.unusable(args.device)
    if why is not None:
        parser.error(f"--device: must be a device that torch can use here; got {args.device!r}: {why}")
    return torch.device(args.device)


def start(where: str, device: torch.device, threads: int) -> None:
    """Make the device current and set the threads, or end with a message if the kernels do not run there."""
    kernels(where, device)
    if device.type != "cpu" and device.index is not None:  # events and memory counters are of the current device
        torch.get_device_module(device).set_device(device)
    torch.set_num_threads(threads)


def kernels(where: str, device: torch.device) -> str:
    """Return the backend of a device, or end with a message: without kernels there is nothing of ours to measure."""
    name = backends.backend_name(device.type)  # if it falls back, a warning says why
    if name == "reference":
        raise SystemExit(
            f"{where}: the kernels must run on {device}; got plain torch. `python -m reparam_kernels` says why."
        )
    return name


def conditions(device: torch.device, threads: int) -> dict[str, Any]:
    backend, isa = backends.backend_name(device.type), ""
    if backend == "cpu":
        from .. import _C

        isa = _C.isa()
    return {
        "machine": processor() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device),
        "device": str(device),
        "backend": backend,
        "isa": isa,
        "threads": threads,
        "torch": torch.__version__,
        "commit": commit(),
        "noise_version": rk.NOISE_VERSION,
    }


def commit() -> str:
    """Return the commit of a source tree, and the version of an installed package or where there is no git."""
    tree = Path(rk.__file__).parent.parent
    if (tree / "csrc").is_dir():
        try:
            done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=tree, capture_output=True, text=True)
        except OSError:
            return rk.__version__
        return done.stdout.strip() or rk.__version__
    return rk.__version__


def lines(known: dict[str, Any]) -> list[str]:
    kernels = "Triton" if known["backend"] == "triton" else f"C++, {known['isa']}"
    return [
        f"device: {known['device']}, {known['machine']}",
        f"kernels: {kernels}; torch's threads: {known['threads']}",
        f"versions: torch {known['torch']}, reparam_kernels {known['commit']}, noise {known['noise_version']}",
    ]


def text(known: dict[str, Any]) -> str:
    """Format the conditions in 80 columns."""
    return "\n".join(line if len(line) <= 80 else f"{line[:77]}..." for line in lines(known))


def caption(known: dict[str, Any]) -> str:
    return "; ".join(lines(known))
