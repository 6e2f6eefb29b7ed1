"""`python -m bench` measures, prints a table, and writes a CSV and charts."""

import argparse
import csv
import math
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # hides messages of the memory profiler

import torch
from tqdm import tqdm

import reparam_kernels as rk
from reparam_kernels.core import backends
from reparam_kernels.profiling import measure
from reparam_kernels.profiling.processor import processor

from . import charts, providers, steps

SIZES = ["8x30", "128x20", "512x128", "256x1024", "1024x1024", "4096x1024"]
SMALL = ["8x30", "128x20"]  # of a sample alone and of a KL alone, which real models call many times a step
QUICK = ["128x20", "512x128"]
DEFAULTS = ["latent", "sample", "kl"]
PROVIDERS = ["ours", "ours again", "eager", "distributions", "compile", "compile fallback", "ours compiled"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
Row = dict[str, Any]


def size(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", text):
        raise argparse.ArgumentTypeError(f"must be numbers with x between them; got {text!r}. Pass 512x128.")
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--op", nargs="+", choices=[*providers.OPS, "noise", "step"], default=[*DEFAULTS, "noise", "step"]
    )
    sizes = f"as 512x128 or 16x4x64x64; default: {' '.join(SIZES)}, of sample and kl {' '.join(SMALL)}"
    parser.add_argument("--size", nargs="+", type=size, help=sizes)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--device", default="cpu", help="as torch names it; default: cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on the CPU; default: 1")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS, help="what is timed")
    parser.add_argument("--cold", action="store_true", help="another provider's call before each timed call; CPU only")
    parser.add_argument("--rounds", type=int, default=40, help="of all providers in turn; default: 40")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, no compiler")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    args = parser.parse_args()
    why = backends.unusable(args.device)
    if why is not None:
        parser.error(f"--device: must be a device that torch can use here; got {args.device!r}: {why}")
    if args.cold and args.device != "cpu":
        parser.error(f"--cold: the device must be cpu; got {args.device}. Leave --cold out.")
    if args.quick:
        args.rounds = min(args.rounds, 12)
        args.providers = [p for p in args.providers if "compile" not in p]
    return args


def sizes_of(op: str, args: argparse.Namespace) -> list[str]:
    """Return the sizes to measure an op at."""
    return args.size or (QUICK if args.quick else SMALL if op in ("sample", "kl") else SIZES)


def commit() -> str:
    """Return the measured commit, or "unknown" without git or outside of a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def make_current(device: torch.device) -> None:
    """Events and memory counters are those of the current device; one without an index is the current one already."""
    if device.index is not None:
        torch.cuda.set_device(device)


def conditions(args: argparse.Namespace, backend: str) -> Row:
    """Return the conditions of a measurement, which stand in every row."""
    isa = backend
    if backend == "cpu":
        from reparam_kernels import _C

        isa = _C.isa()
    return {
        "machine": processor() if args.device == "cpu" else torch.cuda.get_device_name(),
        "backend": backend,
        "isa": isa,
        "threads": args.threads,
        "caches": "cold" if args.cold else "warm",
        "torch": torch.__version__,
        "commit": commit(),
        "noise_version": rk.NOISE_VERSION,
    }


def timed(calls: dict[str, Callable[[], Any]], what: Row, args: argparse.Namespace) -> list[Row]:
    """Measure and return one row per provider, with its ratio to ours."""
    label = " ".join(str(v) for v in what.values())
    turns = measure.interleave(calls, args.rounds, args.device, args.cold)
    progress = tqdm(turns, desc=label, total=args.rounds, leave=False)
    *_, timings = progress
    clock = "wall" if args.threads > 1 else "cpu"
    ours = getattr(timings["ours"], clock).q50
    rows = []
    for name, timing in timings.items():
        shown = getattr(timing, clock)
        rows.append(
            {
                **what,
                "provider": name,
                "clock": clock,
                "us_q10": shown.q10 * 1e6,
                "us_q50": shown.q50 * 1e6,
                "us_q90": shown.q90 * 1e6,
                "wall_us_q50": timing.wall.q50 * 1e6,
                "ratio_to_ours": shown.q50 / ours,
            }
        )
    return rows


def bench_op(name: str, size: str, dtype: str, bandwidth: float, args: argparse.Namespace) -> list[Row]:
    op, shape = providers.OPS[name], tuple(int(n) for n in size.split("x"))
    leaves = op.inputs(shape, DTYPES[dtype], args.device)
    n = math.prod(shape)
    torch.compiler.reset()  # the recompilation limit would turn a compiled peer into an eager one
    functions = providers.providers(op, args.providers)
    for provider, f in functions.items():
        measure.check(provider, f, leaves, op.truth)
    made = {provider: measure.passes(f, leaves) for provider, f in functions.items()}
    rows = []
    for which, passes in (("forward", 1), ("forward with grad", 1), ("forward+backward", 2)):
        calls = {provider: by_pass[which] for provider, by_pass in made.items()}
        if op.samples:
            calls["noise alone"] = lambda: rk.randn(shape, dtype=DTYPES[dtype], device=args.device)
        timed_rows = timed(calls, {"op": name, "pass": which, "size": size, "dtype": dtype}, args)
        noise = [passes * row["us_q50"] for row in timed_rows if row["provider"] == "noise alone"]
        least = sum(op.words[:passes]) * n * leaves[0].element_size() / bandwidth * 1e6
        for row in timed_rows:
            row["elements"] = n
            if row["provider"] == "noise alone":
                continue
            row["of_bandwidth"] = least / row["us_q50"]
            row["of_noise"] = noise[0] / row["us_q50"] if noise else None
            row["saved_bytes"] = measure.saved_bytes(functions[row["provider"]], leaves)
            row["peak_bytes"] = measure.peak_bytes(calls[row["provider"]], args.device)
        rows += timed_rows
    return rows


def bench_noise(size: str, dtype: str, args: argparse.Namespace) -> list[Row]:
    shape = tuple(int(n) for n in size.split("x"))
    calls = providers.noise_providers(shape, DTYPES[dtype], args.device)
    what = {"op": "noise", "pass": "forward", "size": size, "dtype": dtype}
    return [{**row, "elements": math.prod(shape)} for row in timed(calls, what, args)]


def bench_step(name: str, args: argparse.Namespace) -> list[Row]:
    make = steps.STEPS[name]
    calls = {provider: make(provider.split()[0], args.device) for provider in ("ours", "ours again", "eager")}
    return timed(calls, {"op": "step", "pass": "training step", "size": name, "dtype": "float32"}, args)


def table(rows: list[Row]) -> str:
    """Format one line per case: our time, and each peer's as a multiple of it."""
    peers = list(dict.fromkeys(r["provider"] for r in rows if r["provider"] not in charts.OURS))
    lines = [
        f"{'op':8} {'pass':17} {'size':20} {'dtype':9} {'ours, us':>10} {'again':>7} {'of copy':>8} {'of noise':>8} "
        + " ".join(f"{p:>17}" for p in peers)
    ]
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for r in rows:
        cases.setdefault((r["op"], r["pass"], r["size"], r["dtype"]), {})[r["provider"]] = r
    for (op, which, size, dtype), by in cases.items():
        ours, again = by["ours"], by.get("ours again")
        spread = f"{again['ratio_to_ours'] - 1:+7.1%}" if again else " " * 7
        limits = " ".join(f"{ours[k]:8.0%}" if ours.get(k) else " " * 8 for k in ("of_bandwidth", "of_noise"))
        ratios = " ".join(f"{by[p]['ratio_to_ours']:16.2f}x" if p in by else " " * 17 for p in peers)
        lines.append(f"{op:8} {which:17} {size:20} {dtype:9} {ours['us_q50']:10.1f} {spread} {limits} {ratios}")
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    backend = measure.backend(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    make_current(torch.device(args.device))
    bandwidth = measure.copy_bandwidth(args.device)
    rows: list[Row] = []
    for op in args.op:
        if op == "step":
            for name in steps.STEPS:
                rows += bench_step(name, args)
            continue
        for dtype in args.dtype:
            for size in sizes_of(op, args):
                rows += bench_noise(size, dtype, args) if op == "noise" else bench_op(op, size, dtype, bandwidth, args)
    known = {**conditions(args, backend), "copy_gb_s": bandwidth / 1e9}
    print(table(rows))
    print("\nEach peer: its time over ours. again: ours a second time, the noise of the measurement.")
    print(f"of copy: the least bytes at the copy bandwidth of this run, {bandwidth / 1e9:.1f} GB/s, over our time.")
    print("of noise: rk.randn alone (twice with backward) over our time.")
    fields = list(dict.fromkeys(key for row in rows for key in row)) + list(known)
    with open(args.out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows({**row, **known} for row in rows)
    for path in (args.out / "results.csv", *charts.draw(rows, known, args.out)):
        print(path)


if __name__ == "__main__":
    main()
