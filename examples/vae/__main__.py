"""`python -m examples.vae` trains the reference VAE and draws what it learned."""

import argparse
import csv
from pathlib import Path

import torch

from . import pictures
from .data import Images, load
from .model import IMPLS, VAE
from .processes import Processes, join
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
    parser.add_argument("--distributed", action="store_true", help="train on the processes that torchrun has started")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args()
    if args.distributed and args.impl == "plain":
        parser.error(
            "--distributed: impl must be kernels or reference; got plain, whose noise depends on the processes."
        )
    return args


def main() -> None:
    args = arguments()
    processes, device = join() if args.distributed else (Processes(), torch.device("cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    images = load(args.data)
    if args.data is None:
        torch.set_num_threads(1)  # the digits are too small for a second thread
    if processes.rank == 0:
        size = f"{images.height} x {images.width} pixels"
        print(f"{len(images.train)} images to train on, {len(images.test)} held out, {size}")
    names = ("kernels", "reference") if args.impl == "both" else (args.impl,)
    models, histories = {}, {}
    for impl in names:
        options = Options(impl, args.likelihood, args.latent, args.hidden, args.epochs, args.batch, args.lr, args.seed)
        on_device = images._replace(train=images.train.to(device), test=images.test.to(device))
        model, histories[impl] = train(on_device, options, args.out / f"{impl}.pt", args.resume, processes=processes)
        models[impl] = model.cpu()
    if args.distributed:
        torch.distributed.destroy_process_group()
    if processes.rank == 0:
        report(args, images, names, models, histories)


def report(
    args: argparse.Namespace,
    images: Images,
    names: tuple[str, ...],
    models: dict[str, VAE],
    histories: dict[str, pictures.History],
) -> None:
    """Write the tables, draw the pictures and print the last epoch."""
    for impl in names:
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
