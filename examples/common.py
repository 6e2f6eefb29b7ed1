"""Shared by iwae.py, tc_vae.py and vampprior.py: the networks, the training loop and the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from examples.vae.data import Images

History = list[dict[str, float]]


class Networks(nn.Module):
    """An encoder to mu and logvar, and a decoder to the logits of the pixels."""

    def __init__(self, pixels: int, latent: int, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, -1)
        return mu, logvar

    def nll(self, z: Tensor, x: Tensor) -> Tensor:
        """Compute -log p(x | z) of each image in nats; z may have leading sample dims."""
        logits = self.decoder(z)
        return binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean pixels."""
        return torch.sigmoid(self.decoder(z))


def train(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    images: Images,
    epochs: int,
    measure: Callable[[], dict[str, float]],
    name: str,
    batch: int = 64,
) -> History:
    """Minimise the loss of a batch of images, and return what `measure` gives after each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    history: History = []
    with tqdm(range(epochs), desc=name, unit="epoch", disable=None) as bar:  # quiet without a terminal
        for _ in bar:
            for rows in torch.randperm(len(images.train)).split(batch):
                optimizer.zero_grad()
                loss(images.train[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                history.append(measure())
            bar.set_postfix({key: f"{value:.2f}" for key, value in history[-1].items()})
    return history


def arguments(about: str, out: str, epochs: int, **numbers: tuple[int, str]) -> Any:
    """Parse the command line: --epochs, --out and the numbers that an example has."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--epochs", type=int, default=epochs, help="of each training (%(default)s)")
    for name, (default, meaning) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the pictures (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the digits are small
    args.out.mkdir(parents=True, exist_ok=True)
    return args
