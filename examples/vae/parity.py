"""python -m examples.vae.parity: the fused VAE and the tutorial's, with torch.randn, end at the same held-out ELBO."""

import argparse
import statistics
from dataclasses import replace

import torch
from tqdm import tqdm

from .data import Images, load
from .training import Options, train


def final_elbos(images: Images, options: Options, seeds: range) -> dict[str, list[float]]:
    """Held-out ELBO at the end of training, for each seed, by each implementation."""
    found: dict[str, list[float]] = {"kernels": [], "plain": []}
    for seed in tqdm(seeds, desc="parity", unit="seed"):
        for impl, elbos in found.items():
            _, history = train(images, replace(options, impl=impl, seed=seed), quiet=True)
            elbos.append(history[-1]["held_out"])
    return found


def gap_in_errors(found: dict[str, list[float]]) -> float:
    """Difference of the means in its own standard errors (Welch's t)."""
    a, b = found["kernels"], found["plain"]
    error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    return (statistics.mean(a) - statistics.mean(b)) / error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.vae.parity", description=__doc__)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=Options.epochs)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the digits are small
    found = final_elbos(load(), Options(epochs=args.epochs), range(args.seeds))
    for impl, elbos in found.items():
        mean, spread = statistics.mean(elbos), statistics.stdev(elbos)
        print(f"{impl:8} held-out ELBO {mean:8.3f} +- {spread:.3f} over {args.seeds} seeds")
    print(f"difference: {gap_in_errors(found):+.2f} standard errors")


if __name__ == "__main__":
    main()
