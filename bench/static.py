"""`python -m bench.static` predicts the speed of compiled code on GPUs. It times nothing and needs no GPU.

bench/compiled.py compiles and counts our kernels and those that Inductor generates for the same function. The time of a
pass is at least the longest of: its bytes through the memory, its instructions through the schedulers (128 lanes per
clock and SM), and its instructions of each kind through their units. Caches, latency, dependencies, launches and clock
changes are left out, so both sides run slower than this.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt

import reparam_kernels as rk

from . import compiled
from .compiled import Census

ROWS, COLS = 4096, 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Device(NamedTuple):
    """Figures of the data sheets, and lanes per clock and SM of the CUDA programming guide's throughput table."""

    target: str
    sms: int
    ghz: float  # boost
    tb_s: float
    float32: int
    integer: int = 64
    special: int = 16
    issue: int = 128


DEVICES = {
    "A100": Device("sm_80", 108, 1.41, 2.04, 64),
    "H100": Device("sm_90", 132, 1.755, 3.35, 128),
    "H200": Device("sm_90", 132, 1.755, 4.8, 128),
    "B200": Device("sm_100", 148, 1.85, 8.0, 128),
}

# Words per element. Ours reads mu, logvar and writes z, then reads mu, logvar, dz and writes dmu, dlogvar. Inductor's
# code also stores eps and reads it again. One word per row (kl, dkl) is left out.
WORDS = {("ours", "forward"): 3, ("ours", "backward"): 5}
WORDS |= {("torch.compile", "forward"): 4, ("torch.compile", "backward"): 6}


def ours(target: str, dtype: str) -> Iterator[tuple[str, list[list[Census]]]]:
    mu, logvar = (torch.zeros(ROWS, COLS, dtype=DTYPES[dtype], requires_grad=True) for _ in range(2))
    with compiled.compiling(target) as launches:
        z, kl = rk.reparameterize_kl(mu, logvar, seed=1)
        torch.autograd.grad((z, kl), (mu, logvar), (torch.zeros_like(z), torch.zeros_like(kl)))
    for launch in launches:
        yield launch.name.removesuffix("_kernel"), [[compiled.census(launch, ROWS * COLS)]]


def theirs(target: str, dtype: str) -> Iterator[tuple[str, list[list[Census]]]]:
    from . import inductor  # Inductor takes seconds to import

    whole, sums = ((ROWS, COLS), DTYPES[dtype]), ((ROWS,), DTYPES[dtype])
    for function, inputs in ((inductor.forward, [whole] * 2), (inductor.backward, [whole] * 4 + [sums])):
        kernels = inductor.kernels(function, inputs, target)
        yield function.__name__, [[compiled.census(launch, ROWS * COLS) for launch in each] for each in kernels]


def occupancy(c: Census) -> float:
    """Return the resident share of an SM's 2048 threads. A thread gets registers by eights; an SM holds 32 blocks."""
    blocks = min(65536 // (-(-c.registers // 8) * 8 * c.threads), 2048 // c.threads, 32)
    return blocks * c.threads / 2048


def times(d: Device, census: list[Census], size: int, words: int) -> dict[str, float]:
    """Return the picoseconds per element in each resource."""
    clocks = d.sms * d.ghz * 1e9 / 1e12  # per picosecond, in all SMs
    total = {kind: sum(c.classes.get(kind, 0) for c in census) for kind in compiled.KINDS | {"integer": ""}}
    return {
        "memory": words * size / d.tb_s,
        "issue": sum(c.instructions for c in census) / d.issue / clocks,
        "float": (total["float"] + 2 * total["packed"] + total["half"]) / d.float32 / clocks,
        "integer": (total["integer"] + total["multiply"]) / d.integer / clocks,
        "special": total["special"] / d.special / clocks,
    }


def rows() -> Iterator[dict[str, Any]]:
    for name, d in DEVICES.items():
        for dtype, torch_dtype in DTYPES.items():
            for provider, counted in (("ours", ours), ("torch.compile", theirs)):
                for which, kernels in counted(d.target, dtype):
                    words = WORDS[provider, which]
                    # the configuration with the fewest instructions among those that do not spill
                    best = [min(each, key=lambda c: (c.spills > 0, c.instructions)) for each in kernels]
                    ps = times(d, best, torch_dtype.itemsize, words)
                    bound = max(ps, key=lambda kind: ps[kind])
                    yield {
                        "device": name,
                        "target": d.target,
                        "dtype": dtype,
                        "pass": which,
                        "provider": provider,
                        "kernels": len(best),
                        "bytes": words * torch_dtype.itemsize,
                        "instructions": round(sum(c.instructions for c in best), 1),
                        **{
                            kind: round(sum(c.classes.get(kind, 0) for c in best), 1)
                            for kind in (*compiled.KINDS, "integer")
                        },
                        "registers": max(c.registers for c in best),
                        "spills": max(c.spills for c in best),
                        "occupancy": min(occupancy(c) for c in best),
                        **{f"{kind}_ps": round(value, 3) for kind, value in ps.items()},
                        "bound": bound,
                        "predicted_ps": round(ps[bound], 3),
                        "of_bandwidth": round(ps["memory"] / ps[bound], 2),
                    }


SHOWN = {"device": 7, "dtype": 9, "pass": 9, "provider": 14, "bytes": 6, "instructions": 13, "float": 6, "packed": 6}
SHOWN |= {"integer": 8, "multiply": 9, "memory": 7, "registers": 10, "occupancy": 10, "bound": 8, "predicted_ps": 13}
SHOWN |= {"of_bandwidth": 13}


def table(predictions: list[dict[str, Any]]) -> str:
    lines = [" ".join(f"{name:>{width}}" for name, width in SHOWN.items())]
    lines += [" ".join(f"{row[name]!s:>{width}}" for name, width in SHOWN.items()) for row in predictions]
    return "\n".join(lines)


def roofline(predictions: list[dict[str, Any]], path: Path) -> None:
    """Draw each device's roofline of bandwidth and issue rate, with each pass at its predicted place."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.6), sharex=True)
    for (name, d), ax in zip(DEVICES.items(), axes.flat, strict=True):
        x = [0.8 * 1.1**i for i in range(40)]
        peak = d.sms * d.ghz * d.issue / 1e3  # instructions per second and lane, in 1e12
        ax.plot(x, [min(d.tb_s, peak / i) for i in x], color="0.4", lw=1.5)
        for row in (r for r in predictions if r["device"] == name):
            color = "tab:blue" if row["provider"] == "ours" else "tab:orange"
            marker = "o" if row["pass"] == "forward" else "s"
            face = color if row["dtype"] == "float32" else "none"
            ax.plot(
                row["instructions"] / row["bytes"],
                row["bytes"] / row["predicted_ps"],
                marker, color=color, markerfacecolor=face, markersize=8, markeredgewidth=1.5,
                label=f"{row['provider']}, {row['pass']}, {row['dtype']}",
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", title=f"{name}: {d.tb_s:g} TB/s", ylim=(d.tb_s / 8, d.tb_s * 1.5))
        ax.set_yticks([d.tb_s / 8, d.tb_s / 4, d.tb_s / 2, d.tb_s], ["1/8", "1/4", "1/2", "all"])
        ax.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("instructions issued a byte moved")
    for ax in axes[:, 0]:
        ax.set_ylabel("share of memory bandwidth")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="lower center", frameon=False, fontsize=9)
    figure.suptitle(
        "Predicted from the compiled code, nothing was timed.\n"
        "Words moved an element, forward and backward: ours 3 and 5, torch.compile 4 and 6",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description="Predictions from compiled code.")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    predictions = list(rows())
    print("PREDICTIONS from compiled code, an element: instructions, picoseconds. Nothing here was timed.\n")
    print(table(predictions))
    with open(out / "gpu_static.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(predictions[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(predictions)
    roofline(predictions, out / "gpu_static.png")


if __name__ == "__main__":
    main()
