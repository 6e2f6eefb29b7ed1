"""python -m bench.mixture: the mixture op against eager, torch.compile and the expansion by a matrix multiplication.

One thread, thread CPU time, nanoseconds for each pair of a point and a component and each dim. The providers take
turns, and the least of many runs counts, since other work on the machine only adds time.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

import reparam_kernels as rk

Outputs = tuple[Tensor, ...]
CASES = [
    (256, 256, 10, "both"),
    (256, 256, 64, "both"),
    (1024, 1024, 10, "both"),
    (1024, 1024, 64, "joint"),
    (128, 500, 40, "joint"),
]


def ours(z: Tensor, mu: Tensor, logvar: Tensor, of: str) -> Outputs:
    out = rk.mixture_log_prob(z, mu, logvar, of=of)
    return out if isinstance(out, tuple) else (out,)


def eager(z: Tensor, mu: Tensor, logvar: Tensor, of: str) -> Outputs:
    terms = -((z.unsqueeze(1) - mu) ** 2) / 2 * torch.exp(-logvar) - logvar / 2 - math.log(2 * math.pi) / 2
    weight = -math.log(mu.shape[0])
    joint = torch.logsumexp(weight + terms.sum(2), 1)
    return (joint, torch.logsumexp(weight + terms, 1)) if of == "both" else (joint,)


def by_matmul(z: Tensor, mu: Tensor, logvar: Tensor, of: str) -> Outputs:
    """Inaccurate if means are far from zero, and only for joint."""
    inverse = torch.exp(-logvar)
    squares = z**2 @ inverse.t() - 2 * z @ (mu * inverse).t() + (mu**2 * inverse).sum(1)
    constant = logvar.sum(1) / 2 + mu.shape[1] * math.log(2 * math.pi) / 2 + math.log(mu.shape[0])
    return (torch.logsumexp(-squares / 2 - constant, 1),)


def times(b: int, n: int, d: int, of: str, seconds: float) -> dict[str, tuple[float, float]]:
    """Return the least time of forward, and of forward and backward, of each provider."""
    torch.manual_seed(0)
    torch.compiler.reset()
    leaves = [torch.randn(rows, d).mul_(scale).requires_grad_() for rows, scale in ((b, 1.0), (n, 1.0), (n, 0.3))]
    providers: dict[str, Callable[..., Outputs]] = {"ours": ours, "eager": eager}
    providers["compile"] = torch.compile(eager, fullgraph=True, dynamic=False)
    if of == "joint":
        providers["matmul"] = by_matmul
    least = {name: [math.inf, math.inf] for name in providers}
    stop = time.monotonic() + seconds
    for round_ in range(1000):
        for name, f in providers.items():
            start = time.thread_time()
            with torch.no_grad():
                f(*leaves, of)
            middle = time.thread_time()
            out = f(*leaves, of)
            torch.autograd.grad(out, leaves, [torch.ones_like(y) for y in out])
            end = time.thread_time()
            if round_ > 0:  # the first round compiles
                least[name] = [min(least[name][0], middle - start), min(least[name][1], end - middle)]
        if round_ > 2 and time.monotonic() > stop:
            break
    return {name: (forward * 1e9 / (b * n * d), both * 1e9 / (b * n * d)) for name, (forward, both) in least.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="for each case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| B x N x D, of | provider | forward, ns | x ours | forward and backward, ns | x ours |")
    print("|---|---|---|---|---|---|")
    for b, n, d, of in CASES:
        measured = times(b, n, d, of, args.seconds)
        base = measured["ours"]
        for name, (forward, both) in measured.items():
            ratios = forward / base[0], both / base[1]
            print(
                f"| {b} x {n} x {d}, {of} | {name} | {forward:.3f} | {ratios[0]:.1f} | {both:.3f} | {ratios[1]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
