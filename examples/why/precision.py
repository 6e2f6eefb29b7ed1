"""The accuracy of the KL: the textbook formula and our kernels against float64, from near collapse to far away."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

import reparam_kernels as rk

SCALES = torch.logspace(-4, 1, 26).tolist()
SHAPE = (2000, 32)


def usual(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)


def distributions(mu: Tensor, logvar: Tensor) -> Tensor:
    prior = Normal(torch.zeros_like(mu), torch.ones_like(mu))
    posterior = Normal(mu, torch.exp(0.5 * logvar), validate_args=False)  # in float16 sigma may round to 0
    return torch_kl(posterior, prior).sum(-1)


LINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the usual line": usual,
    "torch.distributions": distributions,
    "ours": rk.kl_divergence,
}


class Error(NamedTuple):
    median: float
    largest: float  # inf if a row overflows


def error(line: Callable[[Tensor, Tensor], Tensor], scale: float, dtype: torch.dtype) -> Error:
    """Return the error relative to float64, by rows of 32; mu and logvar are normal with the given scale."""
    g = torch.Generator().manual_seed(0)
    mu, logvar = ((torch.randn(SHAPE, generator=g).double() * scale).to(dtype) for _ in range(2))
    wide = [t.double() for t in (mu, logvar)]
    truth = ((wide[0] ** 2 + torch.expm1(wide[1]) - wide[1]) / 2).sum(-1)
    off = (line(mu, logvar).double() - truth).abs() / truth
    off[off.isnan()] = torch.inf
    return Error(off.median().item(), off.max().item())


def compare(dtype: torch.dtype) -> dict[str, list[Error]]:
    return {name: [error(line, scale, dtype) for scale in SCALES] for name, line in LINES.items()}
