"""`python -m bench.scaling` measures cost per element against size, row length, threads and allocator."""

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import reparam_kernels as rk
from reparam_kernels.ops.latent.arguments import make_arguments
from reparam_kernels.profiling import measure, options

SIZES = [10**5, 10**6, 10**7, 10**8]
COLUMNS = [1, 3, 20, 1000, 10**7]


def cases(rows: int, cols: int) -> dict[str, Callable[[], Any]]:
    """Return calls of the public op, and of its kernel alone on allocated outputs."""
    from reparam_kernels import _C
    from reparam_kernels.ops.latent import cpu

    mu = torch.randn(rows, cols)
    x = torch.randn(rows, cols)
    call = make_arguments("bench", mu, x, z=True, kl=True, seed=7)
    plain = _C.Options(_C.Param.logvar, 0.0, False, 0.0, 0.0)
    z, kl, _ = cpu.forward(call)

    def kernel() -> None:
        _C.latent_forward(plain, torch.get_num_threads(), mu, x, None, None, call.seed, None, z, kl, None)

    return {"op": lambda: rk.reparameterize_kl(mu, x, seed=7), "kernel": kernel}


def row(what: str, rows: int, cols: int, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    *_, timings = measure.interleave(cases(rows, cols), rounds, "cpu")
    n = rows * cols
    values = {f"{name}_ns": timing.wall.q50 * 1e9 / n for name, timing in timings.items()}
    return {"what": what, "rows": rows, "cols": cols, "threads": threads, **values}


def measured(rounds: int) -> list[dict[str, Any]]:
    out = [row("size", n // 1000, 1000, 1, rounds if n < 10**8 else 3) for n in SIZES]
    out += [row("row length", max(10**7 // cols, 1), cols, 1, rounds) for cols in COLUMNS]
    out += [row("threads", n // 1000, 1000, threads, rounds) for n in SIZES[:3] for threads in (1, 2)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--rounds", type=options.positive, default=9, help="of each case (9)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="the folder of scaling.csv (out/bench)")
    parser.add_argument("--huge-pages", action="store_true", help=argparse.SUPPRESS)  # for the child process
    args = parser.parse_args()
    if options.kernels(parser.prog, torch.device("cpu")) != "cpu":
        parser.error("measures the C++ kernels; REPARAM_BACKEND chooses others. Unset it.")
    if args.huge_pages:
        rows = [row("huge pages", n // 1000, 1000, 1, args.rounds) for n in SIZES[1:3]]
        csv.DictWriter(sys.stdout, rows[0]).writerows(rows)
        return
    rows = measured(args.rounds)
    again = [sys.executable, "-m", "bench.scaling", "--huge-pages", f"--rounds={args.rounds}"]
    env = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    text = subprocess.run(again, env=env, capture_output=True, text=True, check=True).stdout
    rows += list(csv.DictReader(text.splitlines(), list(rows[0])))
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "scaling.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{'':12} {'rows':>9} {'cols':>9} {'threads':>7} {'op, ns/element':>15} {'kernel alone':>13}")
    for r in rows:
        op, kernel = float(r["op_ns"]), float(r["kernel_ns"])
        print(f"{r['what']:12} {r['rows']:>9} {r['cols']:>9} {r['threads']:>7} {op:15.2f} {kernel:13.2f}")
    print(args.out / "scaling.csv")


if __name__ == "__main__":
    main()
