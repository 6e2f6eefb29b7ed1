"""`python -m bench` measures every committed result again, part by part, and writes the tables of README and docs.

Each part takes at most eight minutes on a quiet machine: `python -m bench --list`. `python -m bench PART ...` measures
some. The results of bench/results/zen4 are of another machine and stay.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
STEPS = "bench.steps --csv {results}/{part}/results.csv"
OPS = "reparam_kernels bench --csv {results}/{part}/results.csv"


class Part(NamedTuple):
    command: str
    minutes: str  # estimated for a quiet machine of two cores


PARTS = {
    "main": Part("reparam_kernels bench --csv {results}/results.csv --op latent noise "
                 "--shape 128x20 512x128 256x1024 1024x1024 4096x1024", "8"),
    "small": Part(f"{OPS} --op sample kl", "3"),
    "cold": Part(f"{OPS} --op latent sample kl --shape 8x30 128x20 512x128 --cold", "6"),
    "ops": Part(f"{OPS} --op prior sample kl --shape 512x128 1024x1024", "5"),
    "packed": Part(f"{OPS} --op packed images --shape 16x4x64x64 4x16x64x64", "1"),
    "densities": Part(f"{OPS} --op log_prob tanh mc_kl --shape 128x20 512x128 1024x1024 --rounds 20", "7"),
    "mixtures": Part(f"{OPS} --op joint dims both --rounds 8", "7"),
    "half": Part(f"{OPS} --op latent --dtype bfloat16 float16 --shape 512x128 1024x1024", "4"),
    "steps": Part(STEPS, "5"),
    "recurrent": Part(f"{STEPS} --recurrent", "6"),
    "scaling": Part("bench.scaling --out {results}", "3"),
    "static": Part("bench.static --out {results}", "3"),
    "charts": Part("bench.charts {results}/results.csv", "1"),
    "pages": Part("bench.pages", "1"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)} (all, in this order)", metavar="PART")
    parser.add_argument("--list", action="store_true", help="print the command and the minutes of each part")
    args = parser.parse_args()
    for name in args.part:
        if name not in PARTS:
            parser.error(f"PART: must be one of {', '.join(PARTS)}; got {name!r}")
    for name in args.part or PARTS:
        part = PARTS[name]
        command = part.command.format(results=RESULTS.relative_to(ROOT), part=name)
        print(f"[{name}, {part.minutes} min] {command}", flush=True)
        if args.list:
            continue
        if "{part}" in part.command:
            (RESULTS / name).mkdir(exist_ok=True)
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, check=True)
        print(f"[{name} took {(time.monotonic() - start) / 60:.1f} min]", flush=True)


if __name__ == "__main__":
    main()
