"""`python -m bench.steps` times whole training steps, which show how much the ops change inside a model."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import reparam_kernels as rk
from examples.vae.data import load
from examples.vae.training import Options, start
from reparam_kernels.profiling import bench, options
from reparam_kernels.profiling.providers import compiled

PROVIDERS = ("ours", "ours again", "ours compiled", "eager", "compile fallback")


class Step(NamedTuple):
    loss: Callable[[], Any]
    update: Callable[[], Any] = lambda: None  # after backward


def sample(impl: str, mu: Tensor, logvar: Tensor) -> Tensor:
    return rk.reparameterize(mu, logvar) if impl == "ours" else mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def kl_of(impl: str, mu: Tensor, x: Tensor, *prior: Tensor) -> Tensor:
    dims = tuple(range(1, mu.dim()))
    if impl == "ours":
        return rk.kl_divergence(mu, x, prior=prior or None)  # type: ignore[arg-type]
    if not prior:
        return -0.5 * (1 + x - mu**2 - x.exp()).sum(dims)
    d = x - prior[1]
    return 0.5 * (d.exp() + (mu - prior[0]) ** 2 * torch.exp(-prior[1]) - 1 - d).sum(dims)


def sample_kl(impl: str, mu: Tensor, logvar: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor]:
    if impl == "ours":
        return rk.reparameterize_kl(mu, logvar, prior=prior or None)  # type: ignore[arg-type]
    return sample(impl, mu, logvar), kl_of(impl, mu, logvar, *prior)


def vae(impl: str, device: str, apart: bool = False) -> Step:
    """Make a step of the reference VAE on a batch of 64 digits, with Adam; z and KL in one call or in two."""
    images = load()
    model, optimizer = start(images, Options(latent=20))
    model.to(device)
    x = images.train[:64].to(device)

    def loss() -> Tensor:
        h = model.encoder(x)
        mu, logvar = model.head.mu(h), model.head.logvar(h)
        z, kl = (sample(impl, mu, logvar), kl_of(impl, mu, logvar)) if apart else sample_kl(impl, mu, logvar)
        return (model.nll(z, x) + kl).mean()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Step(loss, update)


def vae_apart(impl: str, device: str) -> Step:
    return vae(impl, device, apart=True)


def hierarchical(impl: str, device: str) -> Step:
    """Make a step of a block of a very deep VAE, [16, 16, 32, 32], with a learned prior, by 1 x 1 convolutions."""
    torch.manual_seed(0)
    h = torch.randn(16, 32, 32, 32, device=device)
    q, p = (nn.Conv2d(32, 32, 1).to(device) for _ in range(2))
    out = nn.Conv2d(16, 32, 1).to(device)

    def loss() -> Tensor:
        z, kl = sample_kl(impl, *q(h).chunk(2, dim=1), *p(h).chunk(2, dim=1))
        return out(z).square().mean() + kl.mean()

    return Step(loss)


def recurrent(impl: str, device: str) -> Step:
    """Make a step of a recurrent state-space model of fifty steps, each with a posterior and a prior, [50, 30]."""
    torch.manual_seed(0)
    cell = nn.Linear(30, 120).to(device)
    first = torch.zeros(50, 30, device=device)

    def loss() -> Any:
        z: Tensor = first
        total: Any = 0.0
        for _ in range(50):
            z, kl = sample_kl(impl, *cell(z).chunk(4, dim=1))
            total = total + kl.mean()
        return total

    return Step(loss)


def recurrent_one_kl(impl: str, device: str) -> Step:
    """Make the same step where prior and posterior are sampled at each step, and one KL is taken of all at the end."""
    torch.manual_seed(0)
    cell = nn.Linear(60, 120).to(device)
    first = torch.zeros(50, 60, device=device)

    def loss() -> Tensor:
        z, steps = first, []
        for _ in range(50):
            parts = cell(z).chunk(4, dim=1)
            steps.append(parts)
            z = torch.cat([sample(impl, *parts[:2]), sample(impl, *parts[2:])], dim=1)
        return kl_of(impl, *(torch.cat(part) for part in zip(*steps, strict=True))).mean()

    return Step(loss)


def actor(impl: str, device: str) -> Step:
    """Make a step of a soft actor-critic's actor, 256 states of 17 to 6 actions squashed by tanh, and their density."""
    torch.manual_seed(0)
    states = torch.randn(256, 17, device=device)
    body = nn.Sequential(nn.Linear(17, 256), nn.ReLU(), nn.Linear(256, 12)).to(device)
    critic = nn.Sequential(nn.Linear(23, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)

    def loss() -> Tensor:
        mu, x = body(states).chunk(2, dim=1)
        x = x.clamp(-10.0, 4.0)
        if impl == "ours":
            action, density = rk.reparameterize_log_prob(mu, x, squash="tanh")
        else:
            z = sample(impl, mu, x)
            action = torch.tanh(z)
            density = -0.5 * ((z - mu) ** 2 * torch.exp(-x) + x + math.log(2 * math.pi))
            density = (density - torch.log(1 - action**2 + 1e-6)).sum(1)
        return (0.2 * density - critic(torch.cat([states, action], dim=1)).squeeze(1)).mean()

    return Step(loss)


def bayesian(impl: str, device: str) -> Step:
    """Make a step of a Bayesian linear layer, 400 to 400, whose weights are drawn once for a batch of 64."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 400, device=device)
    mu, x = (torch.zeros(400, 400, device=device).add_(start).requires_grad_() for start in (0.0, -5.0))

    def loss() -> Tensor:
        weight, kl = sample_kl(impl, mu, x)
        return (inputs @ weight).square().mean() + kl.sum() / 1e4

    def update() -> None:
        mu.grad = x.grad = None

    return Step(loss, update)


def total_correlation(impl: str, device: str) -> Step:
    """Make the latent part of a beta-TCVAE's step, a batch of 1024 of 10 dims, between linear layers."""
    torch.manual_seed(0)
    h = torch.randn(1024, 32, device=device)
    encode, decode = nn.Linear(32, 20).to(device), nn.Linear(10, 32).to(device)

    def log_density(z: Tensor, mu: Tensor, x: Tensor) -> Tensor:
        return -0.5 * ((z - mu) ** 2 * torch.exp(-x) + x + math.log(2 * math.pi))

    def loss() -> Tensor:
        mu, x = encode(h).chunk(2, dim=1)
        z = sample(impl, mu, x)
        if impl == "ours":
            joint, dims = rk.mixture_log_prob(z, mu, x, of="both")
        else:
            pairs = log_density(z.unsqueeze(1), mu, x) - math.log(len(h))
            joint = torch.logsumexp(pairs.sum(2) + 9 * math.log(len(h)), 1)
            dims = torch.logsumexp(pairs, 1)
        log_p = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1)
        mi, tc, rest = rk.losses.total_correlation(log_density(z, mu, x).sum(1), joint, dims, log_p)
        return (decode(z) - h).square().mean() + (mi + 6 * tc + rest).mean()

    return Step(loss)


def packed(impl: str, device: str) -> Step:
    """Make a step of an image autoencoder's packed latent, [16, 8, 64, 64] to [16, 4, 64, 64], between convolutions."""
    torch.manual_seed(0)
    h = torch.randn(16, 16, 64, 64, device=device)
    encode, decode = nn.Conv2d(16, 8, 3, padding=1).to(device), nn.Conv2d(4, 16, 3, padding=1).to(device)

    def loss() -> Tensor:
        moments = encode(h)
        if impl == "ours":
            z, kl = rk.DiagonalGaussian.from_moments(moments).rsample_kl()
        else:
            z, kl = sample_kl(impl, *moments.chunk(2, dim=1))
        return decode(z).square().mean() + kl.mean()

    return Step(loss)


RECURRENT: dict[str, Callable[[str, str], Step]] = {
    "50 recurrent steps": recurrent,
    "50 recurrent steps, one KL": recurrent_one_kl,
}
OTHERS: dict[str, Callable[[str, str], Step]] = {
    "digits VAE": vae,
    "digits VAE, z and KL apart": vae_apart,
    "VDVAE block": hierarchical,
    "SAC actor": actor,
    "Bayesian layer": bayesian,
    "TC-VAE, batch 1024": total_correlation,
    "packed 16x4x64x64": packed,
}
STEPS = OTHERS | RECURRENT


def call(name: str, provider: str, device: str) -> Callable[[], None]:
    """Return a whole step as a provider takes it. Of a compiled one, loss and backward are compiled."""
    step = STEPS[name]("ours" if provider.startswith("ours") else "eager", device)
    loss: Callable[[], Any] = compiled(step.loss, True) if "compile" in provider else step.loss

    def run() -> None:
        loss().backward()
        step.update()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__)
    parser.add_argument("--recurrent", action="store_true", help="the two recurrent models, which take minutes to "
                        "compile, in place of the others")  # fmt: skip
    options.add_device_options(parser)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), metavar="P",
                        help=f"{', '.join(map(repr, PROVIDERS))} (all)")  # fmt: skip
    parser.add_argument("--csv", type=options.file(".csv"), metavar="FILE.csv", help="write a row for each provider")
    args = parser.parse_args()
    args.cold = False
    device = options.device(args, parser)
    options.start(parser.prog, device, args.threads)
    known = options.conditions(device, args.threads)
    rows = []
    for name in RECURRENT if args.recurrent else OTHERS:
        torch.compiler.reset()
        calls = {p: call(name, p, args.device) for p in dict.fromkeys(["ours", *args.providers])}
        found = bench.timed(calls, {"op": "step", "pass": "training step", "shape": name, "dtype": "float32"}, args)
        bench.progress("")
        print(f"\n{bench.table(found)}", flush=True)
        rows += found
    if args.csv is not None:
        bench.write(args.csv, rows, known)


if __name__ == "__main__":
    main()
