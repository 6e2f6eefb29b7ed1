"""`python -m reparam_kernels bench`: the ops at several shapes, beside other ways to write them."""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import reparam_kernels as rk

from . import measure, options, truth
from .case import Case
from .providers import PROVIDERS, Function, noise_providers, providers
from .report import seconds

MIXTURE = {"op": "mixture_log_prob"}
OPS: dict[str, dict[str, Any]] = {  # what each name measures
    "latent": {"op": "reparameterize_kl"},
    "prior": {"op": "reparameterize_kl", "prior": True},
    "packed": {"op": "reparameterize_kl", "packed": True},
    "images": {"op": "reparameterize_kl", "packed": True, "channels_last": True},
    "sample": {"op": "reparameterize"},
    "kl": {"op": "kl_divergence"},
    "log_prob": {"op": "reparameterize_log_prob"},
    "tanh": {"op": "reparameterize_log_prob", "squash": True},
    "mc_kl": {"op": "reparameterize_mc_kl"},
    "joint": MIXTURE,
    "dims": MIXTURE | {"of": "dims"},
    "both": MIXTURE | {"of": "both"},
    "noise": {"op": "randn"},
}
SHAPES = {
    "packed": "16x4x64x64",
    "images": "16x4x64x64",
    "sample": "8x30 128x20",  # which real models call many times in a step
    "kl": "8x30 128x20",
    "tanh": "256x6 256x17 1024x1024",
    "joint": "128x500x40 1024x1024x10",
    "dims": "256x256x10 1024x1024x10",
    "both": "256x256x10 1024x1024x10",
}
USUAL = "8x30 128x20 512x128 256x1024 1024x1024 4096x1024"
QUICK = {"packed": "16x4x8x8", "images": "16x4x8x8", "joint": "64x64x10", "dims": "64x64x10", "both": "64x64x10"}
PASSES = ("forward", "forward with grad", "forward+backward")  # those of measure.passes
ROUNDS_IF_QUICK = 12
DESCRIPTION = """Time the ops of this package beside plain torch, torch.distributions and
torch.compile, which take turns on the same inputs. Each provider's results are
checked first, and a wrong one gets no number."""
EPILOG = f"""ops (--op) and their usual shapes:
  latent    z and KL                         usual
  prior     the same, with a learned prior   usual
  packed    the same, of packed moments      {SHAPES["packed"]}
  images    the same, in channels_last       {SHAPES["images"]}
  sample    z alone                          {SHAPES["sample"]}
  kl        KL alone                         {SHAPES["kl"]}
  log_prob  z and log q(z)                   usual
  tanh      the same, squashed by tanh       {SHAPES["tanh"]}
  mc_kl     z and log q(z) - log p(z)        usual
  joint     mixture_log_prob of whole events {SHAPES["joint"]}
  dims      mixture_log_prob of each dim     {SHAPES["dims"]}
  both      mixture_log_prob of both         {SHAPES["both"]}
  noise     rk.randn                         usual
usual: {USUAL}
A mixture has points x components x dims.

providers (--providers):
{chr(10).join(f"  {name:23} {text}" for name, text in PROVIDERS.items())}

examples:
  python -m reparam_kernels bench --quick
  python -m reparam_kernels bench --op latent kl --shape 512x128 --csv mine.csv
  python -m reparam_kernels bench --op tanh --shape 256x6 --providers ours eager"""
FOOTNOTE = """
ours: the median time of a call. Each other line: a time divided by ours.
"ours again" shows the noise of the measurement. "a copy of its bytes" and "its
noise alone" are the least times that the memory and rk.randn allow; 1 is best."""
Row = dict[str, Any]


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add `bench` to the commands of `python -m reparam_kernels`."""
    short = "time the ops beside plain torch, torch.distributions and torch.compile"
    parser = options.add_command(commands, "bench", help=short, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--op", nargs="+", choices=list(OPS), metavar="OP", default=list(OPS), help="see below (all)")
    parser.add_argument("--shape", nargs="+", type=options.shape, metavar="S", help="of mu, batch first, as 512x128 "
                        "or 16x4x64x64 (those below)")  # fmt: skip
    options.add_case_options(parser, several=True)
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), metavar="P",
                        help="what is timed beside ours, names with spaces in quotes; see below (all)")  # fmt: skip
    options.add_device_options(parser)
    parser.add_argument("--cold", action="store_true", help="call another provider before each timed call, as other "
                        "work of a training step would; on the CPU")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=f"one small shape, at most {ROUNDS_IF_QUICK} rounds, no "
                        "compiler: under a minute")  # fmt: skip
    parser.add_argument("--csv", type=options.file(".csv"), metavar="FILE.csv",
                        help="write a row for each case, pass and provider")  # fmt: skip
    return parser


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Case]]:
    for name in args.op:
        text = QUICK.get(name, "128x20") if args.quick else SHAPES.get(name, USUAL)
        for dtype in args.dtype:
            for shape in args.shape or [options.shape(word) for word in text.split()]:
                dims: dict[str, Any] = {"shape": shape, "dtype": options.DTYPES[dtype], "device": device}
                yield name, Case(**OPS[name], **dims, param=args.param)


def timed(calls: dict[str, Callable[[], Any]], what: Row, args: argparse.Namespace) -> list[Row]:
    """Measure, and return a row for each provider, with its ratio to ours."""
    for i, found in enumerate(measure.interleave(calls, args.rounds, str(args.device), args.cold), 1):
        progress(f"{' '.join(map(str, what.values()))}: round {i} of {args.rounds}")
        timings = found
    clock = "wall" if args.threads > 1 else "cpu"
    ours = getattr(timings["ours"], clock).q50
    rows = []
    for name, timing in timings.items():
        shown = getattr(timing, clock)
        us = {f"us_{q}": getattr(shown, q) * 1e6 for q in ("q10", "q50", "q90")}
        wall = {"wall_us_q50": timing.wall.q50 * 1e6, "ratio_to_ours": shown.q50 / ours}
        rows.append({**what, "provider": name, "clock": clock, **us, **wall})
    return rows


def progress(text: str) -> None:
    """Replace the last line of a terminal, and write nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:78]}", end="", file=sys.stderr, flush=True)


def measured(name: str, case: Case, functions: dict[str, Function], args: argparse.Namespace) -> list[Row]:
    """Check each provider of a case and time its passes."""
    leaves, rows = case.leaves(), []
    progress(f"{name} {case.shape_text}: the providers are checked")
    made = truth.checked(case, functions, leaves, "--providers")
    for i, which in enumerate(PASSES):
        calls = {provider: by_pass[which] for provider, by_pass in made.items()}
        what = {"op": name, "pass": which, "shape": case.shape_text, "dtype": case.dtype_text}
        if case.draws:
            calls["noise alone"] = lambda: rk.randn(case.shape, dtype=case.dtype, device=case.device)
        timed_rows = timed(calls, what, args)
        passes = 1 + (i == 2)
        noise = [passes * row["us_q50"] for row in timed_rows if row["provider"] == "noise alone"]
        least = sum(case.words()[:passes]) * leaves[0].element_size() / args.bandwidth * 1e6
        for row in timed_rows:
            row["elements"] = case.numel
            if row["provider"] == "noise alone":
                continue
            row["of_bandwidth"] = None if case.op == "mixture_log_prob" else least / row["us_q50"]
            row["of_noise"] = noise[0] / row["us_q50"] if noise else None
            row["saved_bytes"] = measure.saved_bytes(functions[row["provider"]], leaves)
            row["peak_bytes"] = measure.peak_bytes(calls[row["provider"]], case.device.type)
        rows += timed_rows
    return rows


def measured_noise(case: Case, args: argparse.Namespace) -> list[Row]:
    what = {"op": "noise", "pass": "forward", "shape": case.shape_text, "dtype": case.dtype_text}
    rows = timed(noise_providers(case.shape, case.dtype, case.device), what, args)
    return [{**row, "elements": math.prod(case.shape)} for row in rows]


def table(rows: list[Row]) -> str:
    """Format a case: our time, each peer's as a multiple of it, and our share of the limits, for each pass."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    by = {(row["provider"], row["pass"]): row for row in rows}
    first = rows[0]
    lines = [f"{first['op']}, {first['shape']}, {first['dtype']}", f"{'':25}" + "".join(f"{p:>18}" for p in passes)]

    def line(name: str, cell: Callable[[str], str]) -> None:
        lines.append(f"  {name:23}" + "".join(f"{cell(p):>18}" for p in passes))

    line("ours", lambda p: seconds(by["ours", p]["us_q50"] / 1e6))
    for provider in dict.fromkeys(row["provider"] for row in rows):
        if provider not in ("ours", "noise alone"):
            line(provider, lambda p, name=provider: f"{by[name, p]['ratio_to_ours']:.2f}x")  # type: ignore[misc]
    for key, name in (("of_bandwidth", "a copy of its bytes"), ("of_noise", "its noise alone")):
        if first.get(key):
            line(name, lambda p, key=key: f"{by['ours', p][key]:.2f}x")  # type: ignore[misc]
    return "\n".join(lines)


def write(path: Path, rows: list[Row], known: Row) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row)) + list(known)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows({**row, **known} for row in rows)


def main(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device = options.device(args, parser)
    for name, case in cases(args, device):
        why = case.refusal()
        if why is not None:
            parser.error(f"--op {name}: {why}")
    args.rounds = min(args.rounds, ROUNDS_IF_QUICK) if args.quick else args.rounds
    names = ["ours", *(args.providers or [p for p in PROVIDERS if not (args.quick and "compile" in p)])]
    if args.cold and device.type != "cpu":
        parser.error(f"--cold: the device must be cpu; got {device}. Leave --cold out.")
    options.start(parser.prog, device, args.threads)
    args.bandwidth = measure.copy_bandwidth(str(device))
    known = options.conditions(device, args.threads) | {
        "caches": "cold" if args.cold else "warm",
        "copy_gb_s": args.bandwidth / 1e9,
    }
    print(options.text(known))
    rows: list[Row] = []
    for name, case in cases(args, device):
        torch.compiler.reset()  # the recompilation limit would turn a compiled peer into an eager one
        found = measured_noise(case, args) if name == "noise" else measured(name, case, providers(case, names), args)
        progress("")
        print(f"\n{table(found)}", flush=True)
        rows += found
        if args.csv is not None:  # after each case, since the run may be cut
            write(args.csv, rows, known)
    print(FOOTNOTE)
    if args.csv is not None:
        print(args.csv, file=sys.stderr)
    return 0
