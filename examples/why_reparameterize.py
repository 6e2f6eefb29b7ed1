"""`python -m examples.why_reparameterize` shows by experiment why z is mu + sigma * eps. docs/why.md explains it."""

import argparse
from pathlib import Path

import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck
from torch.distributions import Normal

import reparam_kernels as rk
from examples.vae.data import load
from examples.why import digits, estimators, memory, pictures
from examples.why.graph import graph

MU, SIGMA = 2.0, 1.0


def a_draw_has_no_derivative() -> None:
    mu, sigma = (torch.tensor([v], requires_grad=True) for v in (MU, SIGMA))
    print("\n1. A draw is a number: nothing leads back from z to mu and sigma.\n")
    print("Normal(mu, sigma).sample()\n  " + graph(Normal(mu, sigma).sample()))
    zeros = torch.autograd.grad(torch.normal(mu, sigma).sum(), (mu, sigma))
    print(f"torch.normal(mu, sigma): its gradients are put at {zeros[0].item():g} and {zeros[1].item():g}")
    print("\nand z alone does not know mu and sigma:")
    for m, s, e in ((0.0, 1.0, 1.5), (1.0, 0.5, 1.0), (2.0, 0.25, -2.0)):
        leaves = [torch.tensor([v], requires_grad=True) for v in (m, s)]
        z = rk.reparameterize(*leaves, eps=torch.tensor([e]), param="std")
        dm, ds = torch.autograd.grad(z, leaves)
        slopes = f"dz/dmu {dm.item():g}, dz/dsigma {ds.item():g}"
        print(f"  mu {m:4g}  sigma {s:4g}  eps {e:4g}:  z {z.item():g}, {slopes}")
    print(
        "\nmu + sigma * eps, in plain torch\n  "
        + graph(mu + sigma * torch.randn(1), mu=mu, sigma=sigma).replace("\n", "\n  ")
    )
    z = rk.reparameterize(mu, sigma, param="std", seed=7)
    print("rk.reparameterize(mu, sigma, seed=7)\n  " + graph(z, mu=mu, sigma=sigma).replace("\n", "\n  "))


def two_estimators(estimates: int) -> None:
    print(f"\n2. Two estimators of the gradient of E[x^2], x ~ N({MU:g}, {SIGMA:g}), from one sample:\n")
    print(f"{'':15} {'in':6} {'mean':>16} {'true':>5} {'variance':>16} {'closed form':>12}")
    for name in estimators.ESTIMATORS:
        for which, symbol in enumerate(("mu", "sigma")):
            m = estimators.measure(name, which, MU, SIGMA, 1, estimates, seed=which)
            true, closed = 2 * (MU, SIGMA)[which], estimators.VARIANCES[name][which](MU, SIGMA)
            print(
                f"{name:15} {symbol:6} {m.mean:8.3f} ± {m.mean_error:5.3f} {true:5g} "
                f"{m.variance:8.2f} ± {m.variance_error:5.2f} {closed:12g}"
            )


def on_digits(rows: list[digits.Row]) -> None:
    print("\n3. The same in a VAE on handwritten digits: where training ends, at the pathwise run's weights.\n")
    print(f"{'':25} {'held-out ELBO':>13} {'gradient variance':>18}")
    ends, variances = pictures.by_seed(rows, "held_out"), pictures.by_seed(rows, "variance", own=False)
    for name in digits.ESTIMATORS:
        print(f"{name:25} {ends[name][:, -1].mean():13.2f} {variances[name][:, -1].log().mean().exp():18.1f}")


def a_reproducible_eps() -> None:
    print("\n4. A seed determines eps: z is then a function, and gradcheck applies to it.\n")
    mu, sigma = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (MU, SIGMA))
    print("seed=7:", gradcheck(lambda m, s: rk.reparameterize(m, s, param="std", seed=7), (mu, sigma)))
    try:
        gradcheck(lambda m, s: m + s * torch.randn_like(m), (mu, sigma))
    except GradcheckError as error:
        print(f"torch.randn_like: {str(error).splitlines()[0]}")


def what_is_held(counted: dict[str, memory.Counted], missing: str | None) -> None:
    print(f"\n5. Words for each element, z and KL of {memory.SHAPE[0]} x {memory.SHAPE[1]}:\n")
    print(f"{'':15} {'forward moves':>14} {'kept':>6} {'backward moves':>15} {'peak':>6}")
    for name, c in counted.items():
        print(f"{name:15} {c.forward:14.1f} {sum(c.kept.values()):6.1f} {c.backward:15.1f} {c.peak:6.1f}")
    if missing:
        print(missing)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.why_reparameterize", description=__doc__)
    parser.add_argument("--short", action="store_true", help="run for seconds: few samples, two epochs, no compiler")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/why"), help="folder for the pictures")
    args = parser.parse_args()
    if args.short:
        args.epochs, args.seeds = 2, 2
    torch.set_num_threads(1)  # such a small model gains little from more
    args.out.mkdir(parents=True, exist_ok=True)
    estimates, sizes = (500, [1, 4, 16]) if args.short else (20_000, [1, 3, 10, 30, 100, 300])

    a_draw_has_no_derivative()
    two_estimators(estimates * sizes[-1])
    rows = digits.compare(load(), args.epochs, args.seeds, hidden=16 if args.short else 256)
    on_digits(rows)
    a_reproducible_eps()
    counted, missing = memory.compare(compiler=not args.short)
    what_is_held(counted, missing)
    drawn = [
        pictures.paths(args.out / "paths.png"),
        pictures.spread(MU, SIGMA, sizes, estimates, args.out / "spread.png"),
        pictures.descent((MU, SIGMA), (0.01, 0.005), 50 if args.short else 500, 500, args.out / "descent.png"),
        pictures.elbo(rows, args.out / "elbo.png"),
        pictures.variance(rows, args.out / "gradient_variance.png"),
        pictures.memory(counted, args.out / "memory.png"),
        pictures.kl_error(args.out / "kl_error.png"),
    ]
    print("\npictures:\n" + "\n".join(f"  {path}" for path in drawn))


if __name__ == "__main__":
    main()
