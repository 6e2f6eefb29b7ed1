"""Each op as every provider writes it. A provider is a function of the case's leaves."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    TanhTransform,
    TransformedDistribution,
    kl_divergence,
)

import reparam_kernels as rk

from .case import Case

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]
LOG_2PI = math.log(2 * math.pi)

# The order is that of the tables.
PROVIDERS = {
    "ours": "this package",
    "ours again": "the same: shows the noise of the measurement",
    "ours compiled": "our call inside torch.compile",
    "eager": "the usual lines in plain torch",
    "compile": "eager compiled; Inductor makes the noise",
    "compile fallback": "eager compiled, fallback_random: torch's noise",
    "distributions": "torch.distributions",
    "distributions compiled": "the same compiled, fallback_random",
    "matmul": "the joint mixture by matrix products, inaccurate",
}


def ours(case: Case) -> Function:
    samples, options = case.sample_shape, {"param": case.param, "min_std": case.min_std}

    def packed(*leaves: Tensor) -> Outputs:
        q, *p = (rk.DiagonalGaussian.from_moments(moments, **options) for moments in leaves)  # type: ignore[arg-type]
        match case.op:
            case "reparameterize":
                return (q.rsample(samples),)
            case "kl_divergence":
                return (q.kl(*p),)
            case "reparameterize_log_prob":
                return q.rsample_and_log_prob(samples)
            case _:
                return q.rsample_kl(p[0] if p else None, samples)

    if case.packed:
        return packed
    f: Callable[..., Any] = getattr(rk, case.op)
    asked: dict[str, Any] = options | ({"of": case.of} if case.op == "mixture_log_prob" else {})
    asked |= {"sample_shape": samples} if case.draws else {}
    asked |= {"squash": "tanh"} if case.squash else {}

    def run(*leaves: Tensor) -> Outputs:
        out = f(*leaves[:2], prior=leaves[2:], **asked) if case.prior else f(*leaves, **asked)
        return out if isinstance(out, tuple) else (out,)

    return run


def eager(case: Case) -> Function:
    """Write the op as most code does."""
    size, sigma, dims = (*case.sample_shape, *case.shape), case.sigma, case.dims
    logvar = case.param == "logvar"

    def kl(mu: Tensor, x: Tensor, *prior: Tensor) -> Tensor:
        if logvar and not prior:
            return -0.5 * (1 + x - mu**2 - x.exp()).sum(dims)
        if logvar:
            d = x - prior[1]
            return 0.5 * (d.exp() + (mu - prior[0]) ** 2 * torch.exp(-prior[1]) - 1 - d).sum(dims)
        s = sigma(x)
        if not prior:
            return (0.5 * (s**2 + mu**2 - 1) - torch.log(s)).sum(dims)
        s_p = sigma(prior[1])
        return (torch.log(s_p / s) + (s**2 + (mu - prior[0]) ** 2) / (2 * s_p**2) - 0.5).sum(dims)

    def log_density(z: Tensor, mu: Tensor, x: Tensor) -> Tensor:
        if logvar:
            return -0.5 * ((z - mu) ** 2 * torch.exp(-x) + x + LOG_2PI)
        s = sigma(x)
        return -0.5 * ((z - mu) / s) ** 2 - torch.log(s) - LOG_2PI / 2

    def run(*leaves: Tensor) -> Outputs:
        mu, x, *prior = case.split(leaves)
        if case.op == "kl_divergence":
            return (kl(mu, x, *prior),)
        z = mu + sigma(x) * torch.randn(size, dtype=mu.dtype, device=mu.device)
        if case.op == "reparameterize":
            return (z,)
        if case.op == "reparameterize_kl":
            return z, kl(mu, x, *prior)
        log_q = log_density(z, mu, x)
        if case.squash:
            return torch.tanh(z), (log_q - 2 * (math.log(2) - z - F.softplus(-2 * z))).sum(dims)
        if case.op == "reparameterize_log_prob":
            return z, log_q.sum(dims)
        log_p = log_density(z, *prior) if prior else -0.5 * (z**2 + LOG_2PI)
        return z, (log_q - log_p).sum(dims)

    def of_mixture(z: Tensor, mu: Tensor, x: Tensor) -> Outputs:
        terms = log_density(z.unsqueeze(1), mu, x)
        weight = -math.log(len(mu))
        found = []
        if case.of != "dims":
            found.append(torch.logsumexp(weight + terms.sum(2), 1))
        if case.of != "joint":
            found.append(torch.logsumexp(weight + terms, 1))
        return tuple(found)

    return of_mixture if case.op == "mixture_log_prob" else run


def matmul(case: Case) -> Function:
    """Write the joint density by matrix products, which cancel if means are far from zero."""

    def run(z: Tensor, mu: Tensor, x: Tensor) -> Outputs:
        s = case.sigma(x)
        inverse = 1 / s**2
        squares = z**2 @ inverse.t() - 2 * z @ (mu * inverse).t() + (mu**2 * inverse).sum(1)
        constant = torch.log(s).sum(1) + mu.shape[1] * LOG_2PI / 2 + math.log(len(mu))
        return (torch.logsumexp(-squares / 2 - constant, 1),)

    return run


def distributions(case: Case) -> Function:
    samples, dims = torch.Size(case.sample_shape), case.dims

    def run(*leaves: Tensor) -> Outputs:
        mu, x, *prior = case.split(leaves)
        q = Normal(mu, case.sigma(x))
        if case.op == "reparameterize":
            return (q.rsample(samples),)
        if case.squash:
            squashed = TransformedDistribution(q, TanhTransform(cache_size=1))
            z = squashed.rsample(samples)
            return z, squashed.log_prob(z).sum(dims)
        if case.op == "reparameterize_log_prob":
            z = q.rsample(samples)
            return z, q.log_prob(z).sum(dims)
        p = Normal(prior[0], case.sigma(prior[1])) if prior else Normal(torch.zeros_like(mu), torch.ones_like(mu))
        if case.op == "kl_divergence":
            return (kl_divergence(q, p).sum(dims),)
        z = q.rsample(samples)
        return z, (kl_divergence(q, p) if case.op == "reparameterize_kl" else q.log_prob(z) - p.log_prob(z)).sum(dims)

    def of_mixture(z: Tensor, mu: Tensor, x: Tensor) -> Outputs:
        q = Normal(mu, case.sigma(x))
        return tuple(mixture(q, of).log_prob(z) for of in case.parts())

    return of_mixture if case.op == "mixture_log_prob" else run


def mixture(components: Normal, of: str) -> MixtureSameFamily:
    """Make torch's mixture with equal weights, of whole events or of each dim alone."""
    mu, sigma = components.loc, components.scale
    if of == "joint":
        return MixtureSameFamily(Categorical(logits=torch.zeros_like(mu[:, 0])), Independent(components, 1))
    return MixtureSameFamily(Categorical(logits=torch.zeros_like(mu.t())), Normal(mu.t(), sigma.t()))


def compiled(f: Function, fallback_random: bool) -> Function:
    """Compile f with the noise that Inductor makes, or with torch's, which is then kept for backward."""
    return torch.compile(f, fullgraph=True, options={"fallback_random": fallback_random}, dynamic=False)


def providers(case: Case, names: Iterable[str]) -> dict[str, Function]:
    """Make those of the providers that the case has. Without noise both ways to compile are one."""
    made: dict[str, Callable[[], Function]] = {
        "ours": lambda: ours(case),
        "ours again": lambda: ours(case),
        "ours compiled": lambda: compiled(ours(case), True),
        "eager": lambda: eager(case),
        "compile": lambda: compiled(eager(case), False),
        "compile fallback": lambda: compiled(eager(case), True),
        "distributions": lambda: distributions(case),
        "distributions compiled": lambda: compiled(distributions(case), True),
        "matmul": lambda: matmul(case),
    }
    left_out = {"compile fallback"} if not case.draws else set()
    left_out |= {"matmul"} if case.op != "mixture_log_prob" or case.of != "joint" else set()
    return {name: make() for name, make in made.items() if name in names and name not in left_out}


def noise_providers(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return calls that draw noise. torch.func._random is stateless too; only some releases have it on the CPU."""
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: rk.randn(shape, dtype=dtype, device=device),
        "ours again": lambda: rk.randn(shape, dtype=dtype, device=device),
        "torch.randn": lambda: torch.randn(shape, dtype=dtype, device=device),
    }
    stateless = getattr(torch.func, "_random", None)
    if stateless is not None:

        def keyed() -> Tensor:
            return stateless.normal(stateless.key(0, device=device), shape, dtype=dtype)  # type: ignore[no-any-return]

        try:
            keyed()
            calls["torch.func._random"] = keyed
        except (NotImplementedError, RuntimeError, TypeError):
            pass
    return calls
