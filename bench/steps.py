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
    """Make a step of a layer of a hierarchical VAE, [16, 16, 32, 32], with a learned prior, by 1 x 1 convolutions."""
    torch.manual_seed(0)
    h = torch.randn(16, 32, 32, 32, device=device)
    q, p = (nn.Conv2d(32, 32, 1).to(device) for _ in range(2))
    out = nn.Conv2d(16, 32, 1).to(device)

    def step() -> None:
        mu, x = q(h).chunk(2, dim=1)
        mu_p, x_p = p(h).chunk(2, dim=1)
        z, kl = rk.reparameterize_kl(mu, x, prior=(mu_p, x_p)) if impl == "ours" else eager_prior(mu, x, mu_p, x_p)
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
            mu, x, mu_p, x_p = cell(z).chunk(4, dim=1)
            z, kl = rk.reparameterize_kl(mu, x, prior=(mu_p, x_p)) if impl == "ours" else eager_prior(mu, x, mu_p, x_p)
            total = total + kl.mean()
        total.backward()

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
    "hierarchical layer": hierarchical,
    "50 recurrent steps": recurrent,
    "packed 16x4x64x64": packed,
}
