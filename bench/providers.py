"""Each op of the benchmark as every provider writes it. A provider is a function of the case's inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

import reparam_kernels as rk

Outputs = tuple[Tensor, ...]


class Op(NamedTuple):
    inputs: Callable[..., list[Tensor]]  # (shape, dtype, device) -> leaves
    ours: Callable[..., Outputs]
    eager: Callable[..., Outputs]
    distributions: Callable[..., Outputs] | None
    words: tuple[int, int]  # the fewest words read or written per element: forward, backward
    truth: Callable[..., tuple[Tensor, Tensor, Tensor | None]]  # float64: mean of z, sigma of z, kl
    samples: bool = True


def two(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=g), torch.randn(shape, generator=g) * 0.5]
    return [t.to(device, dtype).requires_grad_() for t in parts]


def four(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    return two(shape, dtype, device) + [t.detach().flip(0).requires_grad_() for t in two(shape, dtype, device)]


def one_packed(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.cat(two(shape, dtype, device), dim=1).detach().requires_grad_()]


def last(t: Tensor) -> tuple[int, ...]:
    return tuple(range(1, t.dim()))


def eager_latent(mu: Tensor, logvar: Tensor) -> Outputs:
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    return z, -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(last(mu))


def distributions_latent(mu: Tensor, logvar: Tensor) -> Outputs:
    q = Normal(mu, torch.exp(0.5 * logvar))
    return q.rsample(), torch_kl(q, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(last(mu))


def eager_kl(mu: Tensor, logvar: Tensor) -> Outputs:
    return (-0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(last(mu)),)


def eager_prior(mu: Tensor, logvar: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Outputs:
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    d = logvar - logvar_p
    return z, 0.5 * (d.exp() + (mu - mu_p) ** 2 * torch.exp(-logvar_p) - 1 - d).sum(last(mu))


def distributions_prior(mu: Tensor, logvar: Tensor, mu_p: Tensor, logvar_p: Tensor) -> Outputs:
    q, p = Normal(mu, torch.exp(0.5 * logvar)), Normal(mu_p, torch.exp(0.5 * logvar_p))
    return q.rsample(), torch_kl(q, p).sum(last(mu))


def truth(mu: Tensor, logvar: Tensor, *prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = [t.detach().double() for t in (mu, logvar, *prior)]
    kl = rk.reference.kl_divergence(*wide[:2], prior=tuple(wide[2:]) or None)
    return wide[0], torch.exp(wide[1] / 2), kl


OPS: dict[str, Op] = {
    "latent": Op(two, lambda mu, x: rk.reparameterize_kl(mu, x), eager_latent, distributions_latent, (3, 5), truth),
    "sample": Op(
        two,
        lambda mu, x: (rk.reparameterize(mu, x),),
        lambda mu, x: (mu + torch.exp(0.5 * x) * torch.randn_like(mu),),
        lambda mu, x: (Normal(mu, torch.exp(0.5 * x)).rsample(),),
        (3, 5),
        lambda mu, x: (*truth(mu, x)[:2], None),
    ),
    "kl": Op(
        two,
        lambda mu, x: (rk.kl_divergence(mu, x),),
        eager_kl,
        lambda mu, x: (distributions_latent_kl(mu, x),),
        (2, 4),
        truth,
        samples=False,
    ),
    "prior": Op(
        four,
        lambda mu, x, mu_p, x_p: rk.reparameterize_kl(mu, x, prior=(mu_p, x_p)),
        eager_prior,
        distributions_prior,
        (5, 9),
        truth,
    ),
    "packed": Op(
        one_packed,
        lambda m: rk.DiagonalGaussian.from_moments(m).rsample_kl(),
        lambda m: eager_latent(*m.chunk(2, dim=1)),
        lambda m: distributions_latent(*m.chunk(2, dim=1)),
        (3, 5),
        lambda m: truth(*m.chunk(2, dim=1)),
    ),
}


def distributions_latent_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    q = Normal(mu, torch.exp(0.5 * logvar))
    return torch_kl(q, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(last(mu))


def compiled(f: Callable[..., Outputs], fallback_random: bool) -> Callable[..., Outputs]:
    """Compile f with Inductor's noise, or with aten's randn, which is then stored for backward."""
    return torch.compile(f, fullgraph=True, options={"fallback_random": fallback_random}, dynamic=False)


def providers(op: Op, names: list[str]) -> dict[str, Callable[..., Outputs]]:
    made: dict[str, Any] = {
        "ours": lambda: op.ours,
        "ours again": lambda: op.ours,  # its distance from "ours" shows the noise of the measurement
        "ours compiled": lambda: compiled(op.ours, True),
        "eager": lambda: op.eager,
        "distributions": lambda: op.distributions,
        "distributions compiled": lambda: op.distributions and compiled(op.distributions, True),
        "compile": lambda: compiled(op.eager, False),
        "compile fallback": lambda: compiled(op.eager, True),
    }
    return {name: f for name in names if name in made and (f := made[name]()) is not None}


def noise_providers(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Callable[[], Outputs]]:
    """Return calls that draw noise. torch.func._random is stateless too; only some releases have it on the CPU."""
    calls: dict[str, Callable[[], Outputs]] = {
        "ours": lambda: (rk.randn(shape, dtype=dtype, device=device),),
        "ours again": lambda: (rk.randn(shape, dtype=dtype, device=device),),
        "torch.randn": lambda: (torch.randn(shape, dtype=dtype, device=device),),
    }
    stateless = getattr(torch.func, "_random", None)
    if stateless is not None:

        def keyed() -> Outputs:
            return (stateless.normal(stateless.key(0, device=device), shape, dtype=dtype),)

        try:
            keyed()
            calls["torch.func._random"] = keyed
        except (NotImplementedError, RuntimeError, TypeError):
            pass
    return calls
