"""`python -m bench.gpu_times` measures on a GPU what bench/static.py predicts, and what a call costs on the host.

It writes times.csv, with each prediction beside what was measured, and host.csv. `--once` runs each kernel of the table
once, for `ncu`.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import reparam_kernels as rk
from reparam_kernels.profiling import measure, options

from .static import DTYPES

PREDICTED = Path(__file__).parent / "results/gpu_static.csv"
COLS = 128
ROWS = {"cuda": 2**18, "cpu": 2**4}  # 2^25 elements exceed every cache


def predictions(device: str) -> dict[tuple[str, str], dict[str, str]]:
    """Return the rows of the prediction for a device, by dtype and pass; none for a device that was not predicted."""
    with PREDICTED.open() as file:
        rows = [row for row in csv.DictReader(file) if row["provider"] == "ours" and row["device"] in device]
    return {(row["dtype"], row["pass"]): row for row in rows}


def passes(dtype: str, rows: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return calls of the forward kernel and of the backward kernel alone."""
    mu, x = (torch.randn(rows, COLS, device=device, dtype=DTYPES[dtype]).requires_grad_() for _ in range(2))
    seed = rk.draw_seed(device)
    z, kl = rk.reparameterize_kl(mu, x, seed=seed)
    grads = torch.ones_like(z), torch.ones_like(kl)

    def forward() -> Any:
        with torch.no_grad():
            return rk.reparameterize_kl(mu, x, seed=seed)

    return {"forward": forward, "backward": lambda: torch.autograd.grad((z, kl), (mu, x), grads, retain_graph=True)}


def kernels(device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the device time of each kernel per element beside its prediction, and the bandwidth that it means."""
    kind = device.partition(":")[0]
    name = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
    copy = measure.copy_bandwidth(device) / 1e12
    predicted = predictions(name)
    for dtype in DTYPES:
        calls = passes(dtype, ROWS[kind], device)
        *_, timings = measure.interleave(calls, rounds, device)
        for which, timing in timings.items():
            ps = timing.cpu.q50 / (ROWS[kind] * COLS) * 1e12
            words = 3 if which == "forward" else 5
            row = predicted.get((dtype, which), {})
            yield {
                "device": name,
                "dtype": dtype,
                "pass": which,
                "predicted_ps": row.get("predicted_ps", ""),
                "measured_ps": round(ps, 3),
                "q10_ps": round(timing.cpu.q10 / (ROWS[kind] * COLS) * 1e12, 3),
                "q90_ps": round(timing.cpu.q90 / (ROWS[kind] * COLS) * 1e12, 3),
                "tb_s": round(words * DTYPES[dtype].itemsize / ps, 3),
                "copy_tb_s": round(copy, 3),
                "torch": torch.__version__,
            }


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def host(device: str, batches: range) -> Iterator[dict[str, Any]]:
    """Yield the host's time of the first and the following steps at each batch of 20 columns, after one warm-up."""

    def step(mu: Any, x: Any) -> None:
        z, kl = rk.reparameterize_kl(mu, x)
        torch.autograd.grad((z, kl), (mu, x), (z.detach(), kl.detach()))

    for batch in (128, *batches):
        leaves = [torch.randn(batch, 20, device=device, requires_grad=True) for _ in range(2)]
        synchronize(device)
        us = []
        for _ in range(50):
            begin = time.perf_counter()
            step(*leaves)
            us.append((time.perf_counter() - begin) * 1e6)
        synchronize(device)
        following = sorted(us[1:])
        yield {
            "batch": batch,
            "first_us": round(us[0], 1),
            "least_us": round(following[0], 1),
            "median_us": round(following[len(following) // 2], 1),
        }


def write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write and print each row as it comes, so that an interrupted run keeps what it has measured."""
    with path.open("w", newline="") as file:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_times", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=40, help="default: 40")
    parser.add_argument("--once", action="store_true", help="run each kernel once and write nothing, for ncu")
    parser.add_argument("--out", type=Path, default=Path("out/gpu_times"))
    args = parser.parse_args()
    options.kernels(parser.prog, torch.device(args.device))
    if args.once:
        for dtype in DTYPES:
            for call in passes(dtype, ROWS[args.device.partition(":")[0]], args.device).values():
                call()
        synchronize(args.device)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "host.csv", host(args.device, range(1, 129 if args.device != "cpu" else 4)))
    write(args.out / "times.csv", kernels(args.device, args.rounds))


if __name__ == "__main__":
    main()
