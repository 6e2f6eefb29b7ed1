"""Two unbiased estimators of the gradient of E[x^2], x ~ N(mu, sigma^2): their spread, and descent with them.

E[x^2] = mu^2 + sigma^2, so its gradient is 2 mu in mu and 2 sigma in sigma.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import reparam_kernels as rk

Gradients = tuple[Tensor, Tensor]  # in mu and in the second argument, one element a sample


def score_function(mu: Tensor, x: Tensor, seed: int, param: str = "std") -> Gradients:
    """Return f(z) grad log q(z): z is a constant, and only its probability has a gradient."""
    z = rk.reparameterize(mu, x, seed=seed, param=param).detach()
    log_q = rk.DiagonalGaussian(mu, x, event_ndim=0, param=param).log_prob(z)
    return torch.autograd.grad((z**2 * log_q).sum(), (mu, x))


def pathwise(mu: Tensor, x: Tensor, seed: int, param: str = "std") -> Gradients:
    """Return grad f(z): z is a function of mu and sigma."""
    z = rk.reparameterize(mu, x, seed=seed, param=param)
    return torch.autograd.grad((z**2).sum(), (mu, x))


ESTIMATORS: dict[str, Callable[..., Gradients]] = {"score function": score_function, "pathwise": pathwise}

# Of one sample's gradient, in mu and in sigma.
VARIANCES: dict[str, tuple[Callable[[float, float], float], Callable[[float, float], float]]] = {
    "score function": (
        lambda mu, sigma: mu**4 / sigma**2 + 14 * mu**2 + 15 * sigma**2,
        lambda mu, sigma: 2 * mu**4 / sigma**2 + 60 * mu**2 + 74 * sigma**2,
    ),
    "pathwise": (lambda mu, sigma: 4 * sigma**2, lambda mu, sigma: 4 * mu**2 + 8 * sigma**2),
}


class Measured(NamedTuple):
    n: int  # samples per estimate
    mean: float
    mean_error: float
    variance: float  # of one estimate
    variance_error: float


def measure(name: str, which: int, mu: float, sigma: float, n: int, estimates: int, seed: int) -> Measured:
    """Measure the mean and variance of an estimate from n samples, with errors; which: 0 for mu, 1 for sigma."""
    leaves = [torch.full((estimates * n,), value, dtype=torch.float64, requires_grad=True) for value in (mu, sigma)]
    g = ESTIMATORS[name](*leaves, seed=seed)[which].view(estimates, n).mean(1)
    variance = g.var().item()
    fourth = ((g - g.mean()) ** 4).mean().item()
    return Measured(
        n, g.mean().item(), (variance / estimates) ** 0.5, variance, ((fourth - variance**2) / estimates) ** 0.5
    )


def descend(name: str, which: int, start: tuple[float, float], lr: float, steps: int, runs: int) -> Tensor:
    """Descend with one sample per step and return mu (0) or sigma (1), [steps + 1, runs]; sigma by its logarithm."""
    place = [torch.full((runs,), start[0]).double(), torch.full((runs,), start[1]).double().log()]
    path = [place[which].clone()]
    for step in range(steps):
        gradients = ESTIMATORS[name](*(p.requires_grad_() for p in place), seed=step, param="logstd")
        place[which] = place[which].detach() - lr * gradients[which]
        path.append(place[which].clone())
    values = torch.stack(path)
    return values.exp() if which else values
