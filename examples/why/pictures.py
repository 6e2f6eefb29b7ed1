"""The pictures of docs/why.md and docs/numerics.md, from the numbers that the other files measure."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

import reparam_kernels as rk
from bench.charts import COLOURS
from examples.vae.pictures import save

from . import digits, estimators, precision
from .digits import Row
from .memory import Counted

OURS, GREY = COLOURS["ours"], COLOURS["distributions"]
COLOUR = {"score function": COLOURS["eager"], "score function, baseline": COLOURS["compile fallback"], "pathwise": OURS}
PROVIDER = {"eager": COLOURS["eager"], "torch.compile": COLOURS["compile"], "ours": OURS}
SYMBOLS = ("$\\mu$", "$\\sigma$")


def panels(count: int, height: float = 3.4) -> tuple[plt.Figure, Any]:
    return plt.subplots(1, count, figsize=(8.2, height), constrained_layout=True)


def paths(path: Path) -> Path:
    """Draw z against sigma, with a new draw at each sigma and with one eps for each line."""
    count, lines = 40, 10
    sigma = torch.linspace(0, 2, count)
    figure, axes = panels(2)
    fresh = sigma * rk.randn(lines, count, seed=157)
    axes[0].plot(sigma, fresh.T, "o", ms=3, color=COLOURS["eager"])
    axes[0].set(title="drawn anew at each $\\sigma$: no slope to read off")
    eps = rk.randn(lines, seed=157).expand(count, lines).contiguous()
    z = rk.reparameterize(torch.zeros(count, lines), sigma[:, None].expand(count, lines), eps=eps, param="std")
    axes[1].plot(sigma, z, color=OURS, lw=1.5)
    axes[1].set(title="one $\\epsilon$ for each line: its slope is $\\epsilon$")
    for ax in axes:
        ax.set(xlabel="$\\sigma$", ylabel="$z$", ylim=(-6, 6))
    return save(figure, path)


def spread(mu: float, sigma: float, sizes: list[int], estimates: int, path: Path) -> Path:
    """Draw the standard deviation of an estimate against its samples, with the closed forms."""
    figure, axes = panels(2, 3.6)
    for which, ax in enumerate(axes):
        for name in estimators.ESTIMATORS:
            one = estimators.VARIANCES[name][which](mu, sigma)
            ax.plot(sizes, [(one / n) ** 0.5 for n in sizes], color=COLOUR[name], lw=1.2)
            points = [estimators.measure(name, which, mu, sigma, n, estimates, seed=i) for i, n in enumerate(sizes)]
            deviation = [p.variance**0.5 for p in points]
            errors = [2 * p.variance_error / (2 * s) for p, s in zip(points, deviation, strict=True)]
            label = f"{name}, {one:.0f} / n"
            ax.errorbar(sizes, deviation, errors, fmt="o", ms=4, capsize=3, color=COLOUR[name], label=label)
        true = 2 * (mu, sigma)[which]
        ax.axhline(true, color=GREY, ls="--", lw=1, label=f"the gradient itself, {true:g}")
        ax.set(
            xscale="log",
            yscale="log",
            ylim=(0.02, 60),
            xlabel="samples n of one estimate",
            title=f"in {SYMBOLS[which]}",
        )
        ax.legend(fontsize=8, loc="lower left", title="variance of an estimate", title_fontsize=8)
    axes[0].set_ylabel("standard deviation of the gradient")
    return save(figure, path)


def descent(start: tuple[float, float], lr: tuple[float, float], steps: int, runs: int, path: Path) -> Path:
    """Draw gradient descent on E[x^2] with one sample per step."""
    figure, axes = panels(2)
    for which, ax in enumerate(axes):
        for name in estimators.ESTIMATORS:
            values = estimators.descend(name, which, start, lr[which], steps, runs)
            low, mid, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]).double(), dim=1)
            ax.plot(mid, color=COLOUR[name], label=name)
            ax.fill_between(range(steps + 1), low, high, color=COLOUR[name], alpha=0.25, lw=0)
        ax.set(xlabel="step, of one sample", ylabel=SYMBOLS[which], title=f"{SYMBOLS[which]}, step size {lr[which]:g}")
        ax.axhline(0, color=GREY, ls="--", lw=1)
        ax.legend(fontsize=9, title="median, 10 % to 90 %", title_fontsize=8)
    return save(figure, path)


def by_seed(rows: list[Row], key: str, own: bool = True) -> dict[str, torch.Tensor]:
    """Return [seeds, epochs] for each estimator. Unless `own`, the variance is measured on the pathwise run."""
    values: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in digits.ESTIMATORS}
    for row in rows:
        if key != "variance":
            values[row["estimator"]][row["seed"]].append(row[key])
        elif own:
            values[row["estimator"]][row["seed"]].append(row["variance"][row["estimator"]])
        elif row["estimator"] == "pathwise":
            for name, value in row["variance"].items():
                values[name][row["seed"]].append(value)
    return {name: torch.tensor(list(lines.values())) for name, lines in values.items()}


def elbo(rows: list[Row], path: Path) -> Path:
    figure, ax = plt.subplots(figsize=(8.2, 4), constrained_layout=True)
    for name, lines in by_seed(rows, "held_out").items():
        epochs = range(1, lines.shape[1] + 1)
        ax.plot(epochs, lines.mean(0), color=COLOUR[name], label=name)
        ax.fill_between(epochs, lines.amin(0), lines.amax(0), color=COLOUR[name], alpha=0.2, lw=0)
    seeds = lines.shape[0]
    ax.set(
        xlabel="epoch", ylabel="held-out ELBO (nats an image)", title="One VAE on handwritten digits, three gradients"
    )
    ax.legend(title=f"mean and range of {seeds} seeds" if seeds > 1 else None, title_fontsize=9, loc="lower right")
    return save(figure, path)


def variance(rows: list[Row], path: Path) -> Path:
    figure, axes = panels(2, 3.8)
    steps = sorted({row["step"] for row in rows})
    titles = ("each along its own training", "all three at the pathwise run's weights")
    for ax, own, title in zip(axes, (True, False), titles, strict=True):
        for name, lines in by_seed(rows, "variance", own).items():
            ax.plot(steps, lines.log().mean(0).exp(), color=COLOUR[name], label=name, lw=1.2)
            ax.fill_between(steps, lines.amin(0), lines.amax(0), color=COLOUR[name], alpha=0.2, lw=0)
        ax.set(yscale="log", xlabel="training step", title=title)
    limits = [min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)]
    for ax in axes:
        ax.set_ylim(limits)
    axes[0].set_ylabel("variance of the encoder's gradient,\nsummed over its weights")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return save(figure, path)


def squares(ax: plt.Axes, count: float, left: float, top: float, columns: int, side: float, colour: str) -> None:
    """Draw one square per word, row by row; the last may be a part."""
    for i in range(-(-round(count * 100) // 100)):
        part = min(1.0, count - i)
        x, y = left + i % columns * side, top - (i // columns + 1) * side
        ax.add_patch(plt.Rectangle((x, y), part * side * 0.88, side * 0.88, color=colour, lw=0))


def memory(counts: dict[str, Counted], path: Path) -> Path:
    """Draw what moves, is kept for backward, and is held at once: one square per word and element."""
    rows = ("forward\nmoves", "kept for\nbackward", "backward\nmoves", "held at once,\nat most")
    heights, side, columns, width, first = (2.5, 1.9, 3.1, 1.2), 0.6, 8, 6.4, 3.5
    greek = {"sigma": "$\\sigma$", "sigma²": "$\\sigma^2$", "eps": "$\\epsilon$"}
    figure, ax = plt.subplots(figsize=(8.2, 4.3), constrained_layout=True)
    for k, (name, counted) in enumerate(counts.items()):
        left, top = first + k * width, 0.0
        ax.text(left, 0.4, name, color=PROVIDER[name], fontsize=12, weight="bold")
        kept = sum(counted.kept.values())
        for i, count in enumerate((counted.forward, kept, counted.backward, counted.peak)):
            ax.text(left - 0.25, top - side * 0.46, f"{count:.0f}", ha="right", va="center", fontsize=12)
            squares(ax, round(count, 1), left, top, columns, side, PROVIDER[name])
            if i == 1 and kept < 0.5:
                ax.text(left, top - side * 0.46, "a seed: 8 bytes in all", fontsize=9, va="center")
            elif i == 1:
                for j, part in enumerate(counted.kept):
                    ax.text(left + (j + 0.44) * side, top - side * 1.5, greek[part], ha="center", va="center")
            top -= heights[i]
    top = 0.0
    for label, height in zip(rows, heights, strict=True):
        ax.text(0, top - 0.02, label, va="top", fontsize=10, linespacing=1.3)
        ax.axhline(top + 0.25, color="#dddddd", lw=0.8)
        top -= height
    ax.set(xlim=(0, first + len(counts) * width - 1), ylim=(top + 0.2, 1.1), aspect="equal")
    ax.set_title("z and its KL, forward and backward; a square is one word for each element of z", fontsize=10)
    ax.set_axis_off()
    return save(figure, path)


def kl_error(path: Path) -> Path:
    """Draw the largest relative error of a row's KL against the scale of mu and logvar."""
    figure, axes = panels(2, 3.8)
    colour = {"the usual line": COLOURS["eager"], "torch.distributions": GREY, "ours": OURS}
    for ax, dtype in zip(axes, (torch.float32, torch.float16), strict=True):
        for name, errors in precision.compare(dtype).items():
            finite = [(s, e.largest) for s, e in zip(precision.SCALES, errors, strict=True) if e.largest < torch.inf]
            ax.plot(*zip(*finite, strict=True), "o-", ms=3, lw=1.2, color=colour[name], label=name)
            beyond = [s for s, e in zip(precision.SCALES, errors, strict=True) if e.largest == torch.inf]
            height = 1e3 if name == "the usual line" else 3e3
            ax.plot(beyond, [height] * len(beyond), "x", ms=5, color=colour[name])
        ax.axhline(1e-6, color="black", ls=":", lw=1, label="guaranteed: $10^{-6}$")
        title = f"mu and logvar in {str(dtype).removeprefix('torch.')}"
        ax.set(xscale="log", yscale="log", ylim=(5e-9, 2e4), xlabel="scale of mu and logvar", title=title)
    axes[1].text(4.5, 1e2, "inf, NaN", ha="center", fontsize=9)
    axes[0].set_ylabel("largest relative error of a row's KL")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return save(figure, path)
