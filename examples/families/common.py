"""Shared by the families: a small network, a decoder's loss, the training loop and the command line."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from examples.vae.data import Images, load


class Terms(NamedTuple):
    loss: Tensor  # what the family minimises
    elbo: Tensor  # mean over the batch, nats per image


def mlp(inputs: int, outputs: int, hidden: int = 128) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def nll(logits: Tensor, x: Tensor) -> Tensor:
    """Compute -log p(x | z) of each image in nats."""
    return binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)


def train(model: nn.Module, images: Images, epochs: int) -> tuple[float, float]:
    """Train the model and return the held-out ELBO at the start and at the end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    start = end = held_out_elbo(model, images)
    with tqdm(range(epochs), unit="epoch") as bar:
        for _ in bar:
            for rows in torch.randperm(len(images.train)).split(64):
                optimizer.zero_grad()
                model(images.train[rows]).loss.backward()
                optimizer.step()
            end = held_out_elbo(model, images)
            bar.set_postfix(held_out=f"{end:.2f}")
    return start, end


@torch.no_grad()
def held_out_elbo(model: nn.Module, images: Images) -> float:
    return model(images.test).elbo.item()


def main(model: Callable[[Any], nn.Module], **ways: Any) -> None:
    """Train model(way) with the way whose flag is given, or the last of them."""
    *others, default = ways
    parser = argparse.ArgumentParser(description="Trains this family's VAE on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=30)
    for name in others:
        parser.add_argument(f"--{name}", dest="way", action="store_const", const=name, help=f"run `{name}`")
    parser.set_defaults(way=default)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the digits are small
    torch.manual_seed(0)
    start, end = train(model(ways[args.way]), load(), args.epochs)
    print(f"{args.way}: held-out ELBO {start:.2f} at the start, {end:.2f} at the end, nats an image")
