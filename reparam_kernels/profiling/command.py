"""The options of `python -m reparam_kernels profile`, and what it prints and writes."""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # hides messages of torch's profiler

import torch
from torch.profiler import ProfilerActivity, profile

import reparam_kernels as rk

from ..core import backends
from . import case as cases
from . import measure, module, picture, report
from .processor import processor
from .providers import Case, ours

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
OPS = ("reparameterize_kl", "reparameterize", "kl_divergence")
DESCRIPTION = """Measure an op on your shapes, beside plain torch, torch.distributions and
torch.compile, and beside the limits of the device. Or, with --module, measure a
training step of your own."""
EXAMPLES = """examples:
  python -m reparam_kernels profile --shape 64x4x32x32 --packed --dtype bfloat16
  python -m reparam_kernels profile --module mypackage.model:make --trace step.json
where mypackage/model.py has
  def make():
      model, x = VAE(), torch.rand(64, 784)
      return lambda: model.loss(x)"""


def shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split("x"))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be positive numbers with x between them, as 512x128; got {text!r}")
    return sizes


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number; got {text!r}")
    return int(text)


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `profile` to the commands of `python -m reparam_kernels`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "profile",
        help="measure an op on your shapes, or your own training step",
        usage="python -m reparam_kernels profile [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", type=shape, default=(512, 128), help="of mu, batch first, as 64x4x32x32 (512x128)")
    parser.add_argument("--op", choices=OPS, metavar="OP", default=OPS[0], help=f"{', '.join(OPS)} (the first)")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        metavar="DTYPE",
        help=f"of the inputs: {', '.join(DTYPES)} (the first)",
    )
    parser.add_argument("--param", choices=("logvar", "logstd", "std", "softplus"), default="logvar", metavar="NAME",
                        help="what the encoder gives: logvar, logstd, std or softplus (%(default)s)")  # fmt: skip
    parser.add_argument(
        "--min-std", type=float, metavar="S", default=0.0, help="added to sigma; for std and softplus (0)"
    )
    parser.add_argument("--samples", type=positive, default=None, metavar="K", help="sample_shape=(K,)")
    parser.add_argument("--prior", action="store_true", help="KL against a learned Gaussian, not N(0, I)")
    parser.add_argument("--packed", action="store_true", help="mu and logvar are halves of one tensor, along dim 1")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of ours and of plain torch")
    parser.add_argument("--module", metavar="M:F", help="profile a step of yours: F() in module M returns a function "
                        "that computes the loss; the options above do not apply")  # fmt: skip
    parser.add_argument(
        "--device", metavar="D", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)"
    )
    parser.add_argument("--threads", metavar="N", type=positive, default=1, help="of torch on the CPU (1)")
    parser.add_argument(
        "--rounds", metavar="N", type=positive, default=40, help="interleaved measurements of each provider (40)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the profile; needs matplotlib")
    parser.add_argument("--trace", type=Path, metavar="FILE.json", help="write a Chrome trace of torch.profiler of one "
                        "forward and backward; our ranges begin with reparam_kernels")  # fmt: skip
    return parser


def conditions(device: torch.device, threads: int) -> dict[str, Any]:
    backend = backends.backend_name(device.type)
    if device.type != "cpu":
        name = torch.cuda.get_device_name(device)
    elif backend == "cpu":
        from .. import _C

        name, backend = processor(), f"C++, {_C.isa()}"
    else:
        name = processor()
    return {
        "device": f"{device}, {name}",
        "backend": f"{backend}; {threads} thread{'s' * (threads > 1)}",
        "versions": f"torch {torch.__version__}, noise version {rk.NOISE_VERSION}",
    }


def checked_case(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Case:
    """Return the case, or end with a message if the options contradict each other."""
    if args.min_std and args.param not in ("std", "softplus"):
        parser.error(f"--min-std needs --param std or softplus; got --param {args.param}")
    if args.prior and args.op == "reparameterize":
        parser.error("--prior needs an op with a KL; got --op reparameterize")
    if args.samples and args.op == "kl_divergence":
        parser.error("--samples needs an op that samples; got --op kl_divergence")
    if args.packed and len(args.shape) < 2:
        parser.error(f"--packed needs a shape of two or more dims; got {args.shape[0]}")
    return Case(
        args.op,
        args.shape,
        DTYPES[args.dtype],
        torch.device(args.device),
        args.param,
        args.min_std,
        args.samples,
        args.prior,
        args.packed,
    )


def check_matplotlib(parser: argparse.ArgumentParser) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib, which is not installed; pip install matplotlib, or leave it out")


def write_trace(case: Case, path: Path) -> None:
    call = measure.passes(ours(case), case.leaves())["forward+backward"]
    call()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if case.device.type != "cpu" else [])]
    with profile(activities=activities) as recorded:
        call()
    recorded.export_chrome_trace(str(path))


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    why = backends.unusable(args.device)
    if why is not None:
        parser.error(f"--device: must be a device that torch can use here; got {args.device!r}: {why}")
    device = torch.device(args.device)
    if args.picture is not None:
        check_matplotlib(parser)
    torch.set_num_threads(args.threads)
    known = conditions(device, args.threads)
    if args.module is not None:
        for name in ("shape", "op", "dtype", "param", "min_std", "samples", "prior", "packed", "compile", "picture"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for a shape; leave it out with --module")
        p = module.profile(module.load(args.module), device.type, args.rounds, args.trace)
        shown = json.dumps(module.as_dict(p, args.module, known), indent=2) if args.json else None
        print(shown or module.text(p, args.module, known))
    else:
        case = checked_case(args, parser)
        found = cases.profile(case, args.compile, args.rounds)
        print(json.dumps(report.as_dict(found, known), indent=2) if args.json else report.text(found, known))
        if args.picture is not None:
            picture.draw(found, ", ".join(known.values()), args.picture)
        if args.trace is not None:
            write_trace(case, args.trace)
    for path in (args.picture, args.trace):
        if path is not None:
            print(path, file=sys.stderr)
    return 0
