"""Whole training steps, which show how much the op changes inside a model."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import reparam_kernels as rk
from examples.vae.data import load
from examples.vae.training import Options, start

from .providers import eager_latent, eager_prior

Step = Callable[[], Any]


def sample(impl: str, mu: Tensor, logvar: Tensor) -> Tensor:
    return rk.reparameterize(mu, logvar) if impl == "ours" else mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def sample_kl(impl: str, mu: Tensor, logvar: Tensor, *prior: Tensor) -> tuple[Tensor, ...]:
    if impl == "ours":
        return rk.reparameterize_kl(mu, logvar, prior=prior or None)  # type: ignore[arg-type]
    return eager_prior(mu, logvar, *prior) if prior else eager_latent(mu, logvar)


def vae(impl: str, device: str) -> Step:
    """Make a step of the reference VAE on a batch of 64 digits, with Adam."""
    images = load()
    model, optimizer = start(images, Options(impl={"ours": "kernels", "eager": "plain"}[impl], latent=20))
    model.to(device)
    x = images.train[:64].to(device)
    seeds = itertools.count()  # fresh noise each step, as in training

    def step() -> None:
        terms = model(x, next(seeds))
        optimizer.zero_grad()
        (terms.nll + terms.kl).mean().backward()
        optimizer.step()

    return step


def hierarchical(impl: str, device: str) -> Step:
    """Make a step of a block of a very deep VAE, [16, 16, 32, 32], with a learned prior, by 1 x 1 convolutions."""
    torch.manual_seed(0)
    h = torch.randn(16, 32, 32, 32, device=device)
    q, p = (nn.Conv2d(32, 32, 1).to(device) for _ in range(2))
    out = nn.Conv2d(16, 32, 1).to(device)

    def step() -> None:
        z, kl = sample_kl(impl, *q(h).chunk(2, dim=1), *p(h).chunk(2, dim=1))
        (out(z).square().mean() + kl.mean()).backward()

    return step


def recurrent(impl: str, device: str) -> Step:
    """Make a step of a recurrent state-space model of fifty steps, each with a posterior and a prior, [50, 30]."""
    torch.manual_seed(0)
    cell = nn.Linear(30, 120).to(device)
    first = torch.zeros(50, 30, device=device)

    def step() -> None:
        z: Tensor = first
        total: Any = 0.0
        for _ in range(50):
            z, kl = sample_kl(impl, *cell(z).chunk(4, dim=1))
            total = total + kl.mean()
        total.backward()

    return step


def recurrent_one_kl(impl: str, device: str) -> Step:
    """Make the same step where prior and posterior are sampled at each step, and one KL is taken of all at the end."""
    torch.manual_seed(0)
    cell = nn.Linear(60, 120).to(device)
    first = torch.zeros(50, 60, device=device)

    def step() -> None:
        z, steps = first, []
        for _ in range(50):
            parts = cell(z).chunk(4, dim=1)
            steps.append(parts)
            z = torch.cat([sample(impl, *parts[:2]), sample(impl, *parts[2:])], dim=1)
        mu, x, mu_p, x_p = (torch.stack(part) for part in zip(*steps, strict=True))
        if impl == "ours":
            kl = rk.kl_divergence(mu, x, prior=(mu_p, x_p), event_ndim=1)
        else:
            kl = 0.5 * ((x - x_p).exp() + (mu - mu_p) ** 2 * torch.exp(-x_p) - 1 - (x - x_p)).sum(-1)
        kl.mean().backward()

    return step


def actor(impl: str, device: str) -> Step:
    """Make a step of a soft actor-critic's actor, 256 states of 17 to 6 actions: a sample alone, and its density."""
    torch.manual_seed(0)
    states = torch.randn(256, 17, device=device)
    body = nn.Sequential(nn.Linear(17, 256), nn.ReLU(), nn.Linear(256, 12)).to(device)
    critic = nn.Sequential(nn.Linear(23, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)

    def step() -> None:
        mu, x = body(states).chunk(2, dim=1)
        x = x.clamp(-10.0, 4.0)
        z = sample(impl, mu, x)
        action = torch.tanh(z)
        density = -0.5 * ((z - mu) ** 2 * torch.exp(-x) + x) - torch.log(1 - action**2 + 1e-6)
        (0.2 * density.sum(1, keepdim=True) - critic(torch.cat([states, action], dim=1))).mean().backward()

    return step


def bayesian(impl: str, device: str) -> Step:
    """Make a step of a Bayesian linear layer, 400 to 400, whose weights are drawn once for a batch of 64."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 400, device=device)
    mu, x = (torch.zeros(400, 400, device=device).add_(start).requires_grad_() for start in (0.0, -5.0))

    def step() -> None:
        weight, kl = sample_kl(impl, mu, x)
        mu.grad = x.grad = None
        ((inputs @ weight).square().mean() + kl.sum() / 1e4).backward()

    return step


def packed(impl: str, device: str) -> Step:
    """Make a step of an image autoencoder's packed latent, [16, 8, 64, 64] to [16, 4, 64, 64], between convolutions."""
    torch.manual_seed(0)
    h = torch.randn(16, 16, 64, 64, device=device)
    encode, decode = nn.Conv2d(16, 8, 3, padding=1).to(device), nn.Conv2d(4, 16, 3, padding=1).to(device)

    def step() -> None:
        moments = encode(h)
        if impl == "ours":
            z, kl = rk.DiagonalGaussian.from_moments(moments).rsample_kl()
        else:
            z, kl = eager_latent(*moments.chunk(2, dim=1))
        (decode(z).square().mean() + kl.mean()).backward()

    return step


STEPS: dict[str, Callable[[str, str], Step]] = {
    "digits VAE": vae,
    "VDVAE block": hierarchical,
    "50 recurrent steps": recurrent,
    "50 recurrent steps, one KL": recurrent_one_kl,
    "SAC actor": actor,
    "Bayesian layer": bayesian,
    "packed 16x4x64x64": packed,
}
