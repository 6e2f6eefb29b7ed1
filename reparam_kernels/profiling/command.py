"""The options of `python -m reparam_kernels profile`, and what it prints and writes."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.profiler

from . import breakdown, measure, module, options, picture, report
from .case import OPS, Case
from .launches import activities
from .providers import ours

DESCRIPTION = """Measure an op on your shapes, beside plain torch, torch.distributions and
torch.compile, and beside the limits of the device. Or, with --module, measure a
training step of your own."""
EXAMPLES = """examples:
  python -m reparam_kernels profile --shape 64x4x32x32 --packed --dtype bfloat16
  python -m reparam_kernels profile --module mypackage.model:make --trace step.json
  python -m reparam_kernels profile --module new.model:make --before old.model:make
where mypackage/model.py has
  def make():
      model, x = VAE(), torch.rand(64, 784)
      return lambda: model.loss(x)"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `profile` to the commands of `python -m reparam_kernels`."""
    short = "measure an op on your shapes, or your own training step"
    parser = options.add_command(commands, "profile", help=short, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--shape", type=options.shape, metavar="SHAPE", default=(512, 128), help="of mu, batch first, "
                        "as 64x4x32x32; of a mixture, points x components x dims (512x128)")  # fmt: skip
    parser.add_argument("--op", choices=OPS, metavar="OP", default=OPS[0], help=f"{', '.join(OPS)} (the first)")
    options.add_case_options(parser)
    parser.add_argument("--min-std", type=float, metavar="S", default=0.0, help="added to sigma; for softplus (0)")
    parser.add_argument("--samples", type=options.positive, default=None, metavar="K", help="sample_shape=(K,)")
    parser.add_argument("--prior", action="store_true", help="KL against a learned Gaussian, not N(0, I)")
    parser.add_argument("--packed", action="store_true", help="mu and logvar are halves of one tensor, along dim 1")
    parser.add_argument("--channels-last", action="store_true", help="mu and logvar lie in channels_last")
    parser.add_argument("--squash", action="store_true", help="tanh of the sample; for reparameterize_log_prob")
    parser.add_argument("--of", choices=("joint", "dims", "both"), default="joint", metavar="OF",
                        help="what mixture_log_prob gives: joint, dims or both (the first)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of ours and of plain torch")
    parser.add_argument("--module", metavar="M:F", help="profile a step of yours: F() in module M returns a function "
                        "that computes the loss; the options above do not apply")  # fmt: skip
    parser.add_argument("--before", metavar="M:F", help="with --module: another step, such as yours before a change, "
                        "which is measured in turns with it")  # fmt: skip
    options.add_device_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the tables")
    parser.add_argument("--picture", type=options.file(".png"), metavar="FILE.png", help="draw it; needs matplotlib")
    parser.add_argument("--trace", type=options.file(".json"), metavar="FILE.json", help="write a Chrome trace of "
                        "torch.profiler of a forward and backward; our ranges begin with reparam_kernels")  # fmt: skip
    return parser


def checked_case(args: argparse.Namespace, device: torch.device, parser: argparse.ArgumentParser) -> Case:
    """Return the case, or end with a message if the options contradict each other."""
    asked = {name: getattr(args, name) for name in Case._fields}
    case = Case(**asked | {"dtype": options.DTYPES[args.dtype], "device": device})
    why = case.refusal()
    if why is not None:
        parser.error(why)
    return case


def write_trace(case: Case, path: Path) -> None:
    call = measure.passes(ours(case), case.leaves())["forward+backward"]
    call()
    with torch.profiler.profile(activities=activities(case.device), acc_events=True) as recorded:
        call()
    recorded.export_chrome_trace(str(path))


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if args.picture is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib, which is not installed; pip install matplotlib, or leave it out")
    if args.module is not None:
        for name in (*(name for name in Case._fields if name != "device"), "compile", "picture"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is for a shape; leave it out with --module")
    elif args.before is not None:
        parser.error("--before needs --module, the step to compare with")
    device = options.device(args, parser)
    case = checked_case(args, device, parser)
    options.start(parser.prog, device, args.threads)
    known = options.conditions(device, args.threads)
    command = sys.argv[1:]  # for Nsight Compute to repeat
    if args.module is not None:
        before = None if args.before is None else module.load("--before", args.before)
        p = module.profile(module.load("--module", args.module), before, device, args.rounds, args.trace)
        shown = json.dumps(module.as_dict(p, args.module, known), indent=2) if args.json else None
        print(shown or module.text(p, args.module, known, command))
    else:
        found = breakdown.profile(case, args.compile, args.rounds)
        print(json.dumps(report.as_dict(found, known), indent=2) if args.json else report.text(found, known, command))
        if args.picture is not None:
            picture.draw(found, options.caption(known), args.picture)
        if args.trace is not None:
            write_trace(case, args.trace)
    for path in (args.picture, args.trace):
        if path is not None:
            print(path, file=sys.stderr)
    return 0
