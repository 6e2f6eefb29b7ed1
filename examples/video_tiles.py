"""`python -m examples.video_tiles` encodes a video whole, by rows as over ranks, and in overlapping tiles: the same z.

Each part of the latent tensor gets the noise of the whole at its place, by `window=`. Beside it stands what torch.randn
gives: each tile draws noise of its own, so two tiles disagree where they overlap, and their blend is less random there.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

import reparam_kernels as rk

CHANNELS, SCALE = 4, 4  # of the latent tensor; pixels to one of its rows or columns
MARGIN = 2  # latent rows and columns beyond a part whose pixels its convolutions reach
Part = tuple[int, int, int, int]  # rows [a, b) and columns [c, d) of the latent tensor
Draw = Callable[[rk.DiagonalGaussian, Part, tuple[int, ...]], Tensor]


class Autoencoder(nn.Module):
    """A small 3-D convolutional VAE; the latent tensor is (batch, CHANNELS, frames, height / SCALE, width / SCALE)."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv3d(1, width, 3, stride=(1, 2, 2), padding=1), nn.SiLU(),
            nn.Conv3d(width, 2 * width, 3, stride=(1, 2, 2), padding=1), nn.SiLU(),
            nn.Conv3d(2 * width, 2 * CHANNELS, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv3d(CHANNELS, 2 * width, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=(1, 2, 2)),
            nn.Conv3d(2 * width, width, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=(1, 2, 2)),
            nn.Conv3d(width, 1, 3, padding=1),
        )  # fmt: skip

    def posterior(self, video: Tensor) -> rk.DiagonalGaussian:
        return rk.DiagonalGaussian.from_moments(self.encoder(video), clamp=(-8.0, 8.0))


def moving_discs(count: int, frames: int, size: int, seed: int) -> Tensor:
    """Return videos (count, 1, frames, size, size) of a disc that moves along a line."""
    g = torch.Generator().manual_seed(seed)
    at, speed = torch.rand(count, 2, 1, generator=g), (torch.rand(count, 2, 1, generator=g) - 0.5) / frames
    centre = (at + speed * torch.arange(frames)) * size
    ticks = torch.arange(size) + 0.5
    square = (ticks[:, None] - centre[:, 0, :, None, None]) ** 2 + (ticks - centre[:, 1, :, None, None]) ** 2
    radius = (0.12 + 0.1 * torch.rand(count, 1, 1, 1, generator=g)) * size
    return torch.sigmoid(radius - square.sqrt())[:, None]


def train(steps: int, quiet: bool = False) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in tqdm(range(steps), desc="video autoencoder", unit="step", disable=quiet):
        video = moving_discs(4, 4, 32, seed=step)
        z, kl = model.posterior(video).rsample_kl(seed=step)
        loss = (model.decoder(z) - video).square().mean() + 1e-3 * kl.mean() / video[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def rows(height: int, width: int, ranks: int) -> list[Part]:
    """Return the parts of ranks that share the rows."""
    return [(height * i // ranks, height * (i + 1) // ranks, 0, width) for i in range(ranks)]


def tiles(height: int, width: int, size: int, overlap: int) -> list[Part]:
    """Return overlapping square tiles."""

    def spans(n: int) -> Iterator[tuple[int, int]]:
        for start in range(0, max(n - overlap, 1), size - overlap):
            yield start, min(start + size, n)

    return [(a, b, c, d) for a, b in spans(height) for c, d in spans(width)]


def posterior_of_part(model: Autoencoder, video: Tensor, part: Part) -> rk.DiagonalGaussian:
    """Encode the pixels of a part and its margin, and keep the moments of the part."""
    a, b, c, d = part
    height, width = video.shape[-2] // SCALE, video.shape[-1] // SCALE
    top, left = max(a - MARGIN, 0), max(c - MARGIN, 0)
    bottom, right = min(b + MARGIN, height), min(d + MARGIN, width)
    pixels = video[..., top * SCALE : bottom * SCALE, left * SCALE : right * SCALE]
    moments = model.encoder(pixels)[..., a - top : b - top, c - left : d - left]
    return rk.DiagonalGaussian.from_moments(moments, clamp=(-8.0, 8.0))


def noise_of_the_whole(seed: int) -> Draw:
    def draw(q: rk.DiagonalGaussian, part: Part, whole: tuple[int, ...]) -> Tensor:
        return q.rsample(seed=seed, window=(whole, (0, 0, 0, part[0], part[2])))

    return draw


def noise_of_its_own(q: rk.DiagonalGaussian, part: Part, whole: tuple[int, ...]) -> Tensor:
    return q.mean + q.std * torch.randn(q.mean.shape)


@torch.no_grad()
def encode(model: Autoencoder, video: Tensor, parts: list[Part], draw: Draw, overlap: int = 0) -> Tensor:
    """Encode each part alone and put z together, blended linearly where parts overlap."""
    whole = (video.shape[0], CHANNELS, video.shape[2], video.shape[3] // SCALE, video.shape[4] // SCALE)
    total, weights = torch.zeros(whole), torch.zeros(whole[-2:])
    for part in parts:
        a, b, c, d = part
        z = draw(posterior_of_part(model, video, part), part, whole)
        weight = ramp(b - a, overlap, a > 0, b < whole[-2])[:, None] * ramp(d - c, overlap, c > 0, d < whole[-1])
        total[..., a:b, c:d] += z * weight
        weights[a:b, c:d] += weight
    return total / weights


def ramp(size: int, overlap: int, rises: bool, falls: bool) -> Tensor:
    """Return the weights of a tile along one dim: linear in what it shares with its neighbours."""
    slope = (torch.arange(overlap) + 0.5) / max(overlap, 1)
    weight = torch.ones(size)
    if rises:
        weight[:overlap] = slope
    if falls:
        weight[size - overlap :] = slope.flip(0)
    return weight


@torch.no_grad()
def spread(model: Autoencoder, video: Tensor, z: Tensor) -> Tensor:
    """Return the standard deviation of the noise (z - mu) / sigma at each place, over batch, channels and frames."""
    q = model.posterior(video)
    return ((z - q.mean) / q.std).std((0, 1, 2))


def picture(model: Autoencoder, video: Tensor, ways: dict[str, Tensor], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(ways), figsize=(3.1 * len(ways), 6.4), constrained_layout=True)
    exact = next(iter(ways.values()))
    for i, (name, z) in enumerate(ways.items()):
        gap = (z - exact).abs()[0].amax((0, 1))
        gap = interpolate(gap[None, None], scale_factor=SCALE)[0, 0]
        first = axes[0, i].imshow(gap.numpy(), cmap="magma", vmin=0, vmax=3)
        axes[0, i].set_title(f"{name}\nlargest {gap.max():.1g}")
        second = axes[1, i].imshow(spread(model, video, z).numpy(), cmap="viridis", vmin=0.5, vmax=1.1)
        for ax in axes[:, i]:
            ax.set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("difference of z from the whole")
    axes[1, 0].set_ylabel("standard deviation of the noise")
    figure.colorbar(first, ax=axes[0, :], shrink=0.8)
    figure.colorbar(second, ax=axes[1, :], shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.video_tiles", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--ranks", type=int, default=4, help="that share the rows")
    parser.add_argument("--out", type=Path, default=Path("out/video_tiles.png"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model, video = train(args.steps), moving_discs(16, 8, 96, seed=10**6)
    height, width = video.shape[-2] // SCALE, video.shape[-1] // SCALE
    overlapping = tiles(height, width, 12, 4)
    ours = noise_of_the_whole(seed=7)
    with torch.no_grad():
        whole = model.posterior(video).rsample(seed=7)
    ways = {
        "whole": whole,
        f"rows over {args.ranks} ranks": encode(model, video, rows(height, width, args.ranks), ours),
        "overlapping tiles": encode(model, video, overlapping, ours, 4),
        "the same tiles, torch.randn": encode(model, video, overlapping, noise_of_its_own, 4),
    }
    for name, z in ways.items():
        noise = spread(model, video, z)
        print(f"{name:28} z differs by {(z - whole).abs().max():.1e}; the noise spreads by {noise.min():.2f} or more")
    print(f"picture: {picture(model, video, ways, args.out)}")


if __name__ == "__main__":
    main()
