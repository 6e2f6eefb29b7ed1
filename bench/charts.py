"""`python -m bench.charts FILE.csv` draws results of the benchmark beside that file, each op and dtype apart.

They show the throughput against the size with the bandwidth bound, the ratio to each peer, and the memory that is kept.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

Row = dict[str, Any]
OURS = ("ours", "ours again", "noise alone")  # not peers
COLOURS = {
    "ours": "#1f5fbf", "eager": "#e07b39", "distributions": "#8c8c8c", "compile": "#b65cb6",
    "compile fallback": "#3a9a5b", "ours compiled": "#12335f", "distributions compiled": "#555555",
    "matmul": "#c9a227", "torch.randn": "#e07b39", "torch.func._random": "#3a9a5b",
}  # fmt: skip
CALLS = {
    "latent": "z and its KL: rk.reparameterize_kl", "sample": "z alone: rk.reparameterize",
    "kl": "the KL alone: rk.kl_divergence",
}  # fmt: skip
LABELS = {
    "eager": "eager",
    "distributions": "torch.distributions",
    "distributions compiled": "torch.distributions, compiled",
    "compile": "torch.compile",
    "compile fallback": "torch.compile, fallback_random",
    "ours compiled": "ours, compiled",
    "matmul": "matmul",
}


def read(path: Path) -> list[Row]:
    """Read results, with numbers where there are numbers."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text or None

    with open(path, newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def draw(rows: list[Row], out: Path) -> list[Path]:
    paths = []
    for op in dict.fromkeys(r["op"] for r in rows):
        for dtype in dict.fromkeys(r["dtype"] for r in rows if r["op"] == op):
            own = [r for r in rows if r["op"] == op and r["dtype"] == dtype and r["provider"] != "ours again"]
            paths.append(ratios(own, out / f"ratio_{op}_{dtype}.png"))
            if own[0].get("elements"):
                paths.append(throughput(own, out / f"throughput_{op}_{dtype}.png"))
    backward = [r for r in rows if r["pass"] == "forward+backward"]
    return [*paths, memory(backward, out / "memory.png")] if backward else paths


def save(figure: Figure, rows: list[Row], path: Path) -> Path:
    figure.suptitle(caption(rows[0]), fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def legend(figure: Figure) -> None:
    """Draw one legend for all panels, below them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=8, frameon=False)


def caption(known: Row) -> str:
    threads = "1 thread" if known["threads"] == 1 else f"{known['threads']:.0f} threads"
    kernels = "Triton kernels" if known.get("backend") == "triton" else f"C++ kernels, {known['isa']}"
    return f"{known['machine']}, {kernels}, {threads}, torch {known['torch']}"


def throughput(rows: list[Row], path: Path) -> Path:
    which = list(dict.fromkeys(r["pass"] for r in rows))
    figure, axes = plt.subplots(1, len(which), figsize=(5.6 * len(which), 4), constrained_layout=True, squeeze=False)
    for ax, name in zip(axes[0], which, strict=True):
        own = [r for r in rows if r["pass"] == name]
        for provider in dict.fromkeys(r["provider"] for r in own):
            line = sorted(
                (r["elements"], r["us_q10"], r["us_q50"], r["us_q90"]) for r in own if r["provider"] == provider
            )
            n = [point[0] for point in line]
            low, mid, high = ([point[0] / point[k] / 1e3 for point in line] for k in (3, 2, 1))
            if provider == "noise alone":
                draws = 2 if "+" in name else 1
                ax.plot(n, [y / draws for y in mid], "k--", lw=1, label="our noise alone, once a pass")
                continue
            ax.plot(n, mid, "o-", ms=4, color=COLOURS.get(provider), label=LABELS.get(provider, provider))
            ax.fill_between(n, low, high, color=COLOURS.get(provider), alpha=0.15, lw=0)
        bound = [r for r in own if r["provider"] == "ours" and r.get("of_bandwidth")]
        if bound:
            rate = bound[0]["elements"] / bound[0]["us_q50"] / 1e3 / bound[0]["of_bandwidth"]
            ax.axhline(rate, color="black", ls=":", lw=1, label="bandwidth of a plain copy")
        ax.set(xscale="log", yscale="log", xlabel="elements", ylabel="G elements / s", title=f"{own[0]['op']}, {name}")
        ax.xaxis.set_minor_formatter("")
    legend(figure)
    return save(figure, rows, path)


def ratios(rows: list[Row], path: Path) -> Path:
    """Draw each peer's time over ours, in the passes of training. Inductor's own noise on CPUs, which is slow, is left
    to the tables: fallback_random, which takes torch's, is the peer to beat."""
    which = list(dict.fromkeys(r["pass"] for r in rows))
    which = [name for name in which if name != "forward"] or which
    peers = [p for p in dict.fromkeys(r["provider"] for r in rows) if p not in OURS]
    if "compile fallback" in peers and "compile" in peers:
        peers.remove("compile")
    figure, axes = plt.subplots(1, len(which), figsize=(5.6 * len(which), 4), constrained_layout=True, squeeze=False)
    for ax, name in zip(axes[0], which, strict=True):
        sizes = list(dict.fromkeys(r["shape"] for r in rows if r["pass"] == name))
        for k, peer in enumerate(peers):
            by = {r["shape"]: r["ratio_to_ours"] for r in rows if r["pass"] == name and r["provider"] == peer}
            at = [i + (k - (len(peers) - 1) / 2) * 0.8 / len(peers) for i in range(len(sizes))]
            height = [by.get(s, 1) for s in sizes]
            bars = ax.bar(
                at,
                [h - 1 for h in height],
                0.8 / len(peers),
                bottom=1,
                color=COLOURS.get(peer),
                label=LABELS.get(peer, peer),
            )  # wins rise from 1, losses hang from it
            ax.bar_label(bars, [f"{h:.2g}" for h in height], fontsize=6, padding=1)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}x")
        ax.yaxis.set_minor_formatter("")
        ax.margins(y=0.15)
        ax.axhline(1, color=COLOURS["ours"], lw=1.5, label="ours")
        ax.set_xticks(range(len(sizes)), sizes, fontsize=8)
        ax.set(ylabel="time of a call, over ours", title=f"{CALLS.get(rows[0]['op'], rows[0]['op'])}\n{name}")
        ax.title.set_fontsize(10)
    legend(figure)
    return save(figure, rows, path)


def memory(rows: list[Row], path: Path) -> Path:
    """Draw each provider's saved and peak memory in words per element, for the largest case of each op."""
    op = rows[0]["op"]
    largest = max(r["elements"] for r in rows if r["op"] == op and r.get("saved_bytes") is not None)
    own = [r for r in rows if r["op"] == op and r.get("elements") == largest and r["provider"] not in OURS[1:]]
    names = [r["provider"] for r in own]
    word = {"float64": 8, "float32": 4}.get(own[0]["dtype"], 2)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
    titles = {"saved_bytes": "kept for backward beyond the inputs", "peak_bytes": "peak of forward and backward"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        bars = ax.barh(
            [LABELS.get(n, n) for n in names],
            [r[key] / largest / word for r in own],
            color=[COLOURS.get(n) for n in names],
        )
        ax.bar_label(bars, fmt="%.1f", padding=2)
        ax.invert_yaxis()
        ax.margins(x=0.18)
        ax.set(xlabel="words an element", title=title)
    return save(figure, rows, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.charts", description=__doc__)
    parser.add_argument(
        "results", type=Path, metavar="FILE.csv", help="as `python -m reparam_kernels bench --csv` writes"
    )
    path = parser.parse_args().results
    for picture in draw(read(path), path.parent):
        print(picture)


if __name__ == "__main__":
    main()
