"""`python -m examples.vae` trains the reference VAE and draws what it learned."""

import argparse
import csv
from pathlib import Path

import torch

from . import pictures
from .data import load
from .model import IMPLS
from .training import Options, train


def arguments() -> argparse.Namespace:
    d = Options()
    parser = argparse.ArgumentParser(prog="python -m examples.vae", description=__doc__)
    parser.add_argument("--data", type=Path, help=".npz with images x (N, H, W) and maybe labels y; default: digits")
    parser.add_argument("--impl", choices=(*IMPLS, "both"), default=d.impl, help="both: kernels, then reference")
    parser.add_argument("--likelihood", choices=("bernoulli", "gaussian"), default=d.likelihood)
    parser.add_argument("--latent", type=int, default=d.latent, help="latent dims; 2 draws the manifold")
    parser.add_argument("--hidden", type=int, default=d.hidden)
    parser.add_argument("--epochs", type=int, default=d.epochs)
    parser.add_argument("--batch", type=int, default=d.batch)
    parser.add_argument("--lr", type=float, default=d.lr)
    parser.add_argument("--seed", type=int, default=d.seed)
    parser.add_argument("--out", type=Path, default=Path("out/vae"), help="folder for pictures, tables, checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    images = load(args.data)
    if args.data is None:
        torch.set_num_threads(1)  # the digits are too small for a second thread
    print(
        f"{len(images.train)} images to train on, {len(images.test)} held out, {images.height} x {images.width} pixels"
    )
    names = ("kernels", "reference") if args.impl == "both" else (args.impl,)
    models, histories = {}, {}
    for impl in names:
        options = Options(impl, args.likelihood, args.latent, args.hidden, args.epochs, args.batch, args.lr, args.seed)
        models[impl], histories[impl] = train(images, options, args.out / f"{impl}.pt", args.resume)
        with open(args.out / f"{impl}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, histories[impl][0])
            writer.writeheader()
            writer.writerows(histories[impl])

    model, history = models[names[0]], histories[names[0]]
    drawn = [
        pictures.curves(history, args.out / "curves.png"),
        pictures.reconstructions(model, images, args.out / "reconstructions.png"),
        pictures.samples(model, images, args.out / "samples.png"),
    ]
    if args.latent == 2:
        drawn.append(pictures.manifold(model, images, args.out / "manifold.png"))
    if len(names) == 2:
        drawn.append(pictures.compared(histories, args.out / "kernels_and_reference.png"))

    print(f"\n{'nats an image':14} {'ELBO':>9} {'reconstr.':>10} {'KL':>7} {'held-out ELBO':>14}")
    for impl in names:
        last = histories[impl][-1]
        print(
            f"{impl:14} {last['elbo']:9.3f} {last['reconstruction']:10.3f} {last['kl']:7.3f} {last['held_out']:14.4f}"
        )
    print("\npictures:\n" + "\n".join(f"  {path}" for path in drawn))


if __name__ == "__main__":
    main()
