"""`python -m examples.vae.parity` compares the held-out ELBO of the fused VAE with that of the tutorial's code."""

import argparse
import statistics
from dataclasses import replace

import torch
from tqdm import tqdm

from .data import Images, load
from .training import Options, train


def final_elbos(images: Images, options: Options, seeds: range) -> dict[str, list[float]]:
    """Return the held-out ELBO after training, for each implementation and seed."""
    elbos_by_impl: dict[str, list[float]] = {"kernels": [], "plain": []}
    for seed in tqdm(seeds, desc="parity", unit="seed"):
        for impl, elbos in elbos_by_impl.items():
            _, history = train(images, replace(options, impl=impl, seed=seed), quiet=True)
            elbos.append(history[-1]["held_out"])
    return elbos_by_impl


def gap_in_errors(elbos_by_impl: dict[str, list[float]]) -> float:
    """Return the difference of the means in units of its standard error (Welch's t)."""
    a, b = elbos_by_impl["kernels"], elbos_by_impl["plain"]
    error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    return (statistics.mean(a) - statistics.mean(b)) / error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.vae.parity", description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=Options.epochs)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the digits are small
    elbos_by_impl = final_elbos(load(), Options(epochs=args.epochs), range(args.seeds))
    for impl, elbos in elbos_by_impl.items():
        mean, spread = statistics.mean(elbos), statistics.stdev(elbos)
        print(f"{impl:8} held-out ELBO {mean:8.3f} +- {spread:.3f} over {args.seeds} seeds")
    print(f"difference: {gap_in_errors(elbos_by_impl):+.2f} standard errors")


if __name__ == "__main__":
    main()
