"""Pictures of the training, as PNG files."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import reparam_kernels as rk

from .data import Images
from .model import VAE

History = list[dict[str, float]]


def save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def mosaic(rows: Tensor, images: Images, columns: int, gap: int = 1) -> Tensor:
    """Arrange images side by side with white gaps."""
    h, w = images.height, images.width
    tiles = rows.reshape(-1, columns, h, w).clamp(0, 1)
    canvas = torch.ones(tiles.shape[0] * (h + gap) - gap, columns * (w + gap) - gap)
    for i, line in enumerate(tiles):
        for j, image in enumerate(line):
            canvas[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = 1 - image
    return canvas


def show(axes: plt.Axes, canvas: Tensor, title: str) -> None:
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()


def curves(history: History, path: Path) -> Path:
    epoch = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    left.plot(epoch, [row["elbo"] for row in history], label="training")
    left.plot(epoch, [row["held_out"] for row in history], label="held out")
    left.set(xlabel="epoch", ylabel="ELBO (nats an image)", title="Evidence lower bound")
    left.legend()
    right.plot(epoch, [row["reconstruction"] for row in history], label="reconstruction, $-\\log p(x|z)$")
    right.plot(epoch, [row["kl"] for row in history], label="KL")
    right.set(xlabel="epoch", ylabel="nats an image", title="Its two terms", ylim=(0, None))
    right.legend()
    return save(figure, path)


def compared(histories: dict[str, History], path: Path) -> Path:
    """Draw the same training by different implementations, and their differences."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for (name, history), style in zip(histories.items(), ("-", "--"), strict=False):
        left.plot([r["epoch"] for r in history], [r["held_out"] for r in history], style, lw=2, label=name)
    left.set(xlabel="epoch", ylabel="held-out ELBO (nats an image)", title="One training, two implementations")
    left.legend()
    (_, first), (_, second) = list(histories.items())[:2]
    gap = [abs(a["held_out"] / b["held_out"] - 1) * 2**23 for a, b in zip(first, second, strict=True)]
    right.plot([r["epoch"] for r in first], gap, ".-")
    right.axhline(1, color="gray", ls=":", label="one float32 spacing")
    right.set(xlabel="epoch", ylabel="relative difference / $2^{-23}$", title="How far the two part", ylim=(0, None))
    right.legend()
    return save(figure, path)


@torch.no_grad()
def reconstructions(model: VAE, images: Images, path: Path, count: int = 16) -> Path:
    x = images.test[:count]
    mean = model.decode(model.head.mu(model.encoder(x)))
    figure, axes = plt.subplots(2, 1, figsize=(9, 2.0), constrained_layout=True)
    show(axes[0], mosaic(x, images, len(x)), "held-out originals")
    show(axes[1], mosaic(mean, images, len(x)), "their reconstructions")
    return save(figure, path)


@torch.no_grad()
def samples(model: VAE, images: Images, path: Path, side: int = 12) -> Path:
    z = rk.randn(side * side, model.head.mu.out_features, seed=1)
    figure, axes = plt.subplots(figsize=(5, 5), constrained_layout=True)
    show(axes, mosaic(model.decode(z), images, side), "decoded samples from the prior")
    return save(figure, path)


@torch.no_grad()
def manifold(model: VAE, images: Images, path: Path, side: int = 14) -> Path:
    """Draw the latent plane, decoded at the prior's quantiles, beside the held-out images' places in it."""
    ticks = torch.special.ndtri(torch.linspace(0.02, 0.98, side))
    grid = torch.stack(torch.meshgrid(-ticks, ticks, indexing="ij"), dim=-1).flip(-1).reshape(-1, 2)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5), constrained_layout=True)
    show(left, mosaic(model.decode(grid), images, side), "the latent plane, decoded at the prior's quantiles")
    mu = model.head.mu(model.encoder(images.test))
    if images.test_label is None:
        right.scatter(mu[:, 0], mu[:, 1], s=12)
    else:
        labels = images.test_label.unique().tolist()
        colours = plt.get_cmap("tab10" if len(labels) <= 10 else "turbo", len(labels))
        for i, label in enumerate(labels):
            own = mu[images.test_label == label]
            right.scatter(own[:, 0], own[:, 1], s=12, color=colours(i), label=str(label))
        right.legend(title="label", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    right.set(xlabel="$z_1$", ylabel="$z_2$", title="posterior means of held-out images", aspect="equal")
    return save(figure, path)
