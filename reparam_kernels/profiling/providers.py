"""One case of the profile as each provider writes it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import reparam_kernels as rk

Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]


class Case(NamedTuple):
    """What is profiled. The shape is that of mu; packed moments have twice the size in dim 1."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    param: str
    min_std: float
    samples: int | None
    prior: bool
    packed: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape) * (self.samples or 1)

    @property
    def draws(self) -> bool:
        return self.op != "kl_divergence"

    def leaves(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)

        def made(scale: float, offset: float = 0.0) -> Tensor:
            t = torch.randn(self.shape, generator=generator) * scale + offset
            return t.to(self.device, self.dtype)

        def made_x() -> Tensor:
            return made(0.5).abs() + 0.1 if self.param == "std" else made(0.5)

        pairs = [(made(1.0), made_x()) for _ in range(2 if self.prior else 1)]
        tensors = [torch.cat(pair, dim=1) for pair in pairs] if self.packed else [t for pair in pairs for t in pair]
        return [t.requires_grad_() for t in tensors]

    def words(self) -> tuple[int, int]:
        """The fewest words that forward and backward read and write for each element of mu."""
        samples = (self.samples or 1) * self.draws
        inputs = 4 if self.prior else 2
        return inputs + samples, 2 * inputs + samples


def split(case: Case, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part for t in leaves for part in t.chunk(2, dim=1)) if case.packed else leaves


def ours(case: Case) -> Function:
    samples = () if case.samples is None else (case.samples,)
    options: Any = {"param": case.param, "min_std": case.min_std}

    def posterior(pair: tuple[Tensor, ...]) -> rk.DiagonalGaussian:
        if case.packed:
            return rk.DiagonalGaussian.from_moments(pair[0], **options)
        return rk.DiagonalGaussian(*pair, **options)

    def run(*leaves: Tensor) -> Outputs:
        each = 1 if case.packed else 2
        q, p = posterior(leaves[:each]), posterior(leaves[each:]) if case.prior else None
        if case.op == "reparameterize":
            return (q.rsample(samples),)
        return (q.kl(p),) if case.op == "kl_divergence" else q.rsample_kl(p, samples)

    def direct(*leaves: Tensor) -> Outputs:
        """The functions, which are the cheaper call if mu and x are apart."""
        asked = (
            options | ({"sample_shape": samples} if case.draws else {}) | ({"prior": leaves[2:]} if case.prior else {})
        )
        out = getattr(rk, case.op)(*leaves[:2], **asked)
        return out if isinstance(out, tuple) else (out,)

    return run if case.packed else direct


def scale(case: Case, x: Tensor) -> Tensor:
    match case.param:
        case "logvar":
            return torch.exp(0.5 * x)
        case "logstd":
            return torch.exp(x)
        case "softplus":
            return F.softplus(x) + case.min_std
        case _:
            return x


def plain(case: Case) -> Function:
    """The usual lines in plain torch."""
    dims = tuple(range(1, len(case.shape)))
    samples = () if case.samples is None else (case.samples,)

    def kl(mu: Tensor, x: Tensor, prior: tuple[Tensor, ...]) -> Tensor:
        if not prior and case.param == "logvar":
            each = -0.5 * (1 + x - mu**2 - x.exp())
        elif not prior:
            sigma = scale(case, x)
            each = 0.5 * (sigma**2 + mu**2 - 1) - torch.log(sigma)
        elif case.param == "logvar":
            each = 0.5 * ((x - prior[1]).exp() + (mu - prior[0]) ** 2 * torch.exp(-prior[1]) - 1 - x + prior[1])
        else:
            sigma, sigma_p = scale(case, x), scale(case, prior[1])
            each = torch.log(sigma_p / sigma) + (sigma**2 + (mu - prior[0]) ** 2) / (2 * sigma_p**2) - 0.5
        return each.sum(dims)

    def run(*leaves: Tensor) -> Outputs:
        mu, x, *prior = split(case, leaves)
        outputs = []
        if case.draws:
            noise = torch.randn((*samples, *mu.shape), dtype=mu.dtype, device=mu.device)
            outputs.append(mu + scale(case, x) * noise)
        if case.op != "reparameterize":
            outputs.append(kl(mu, x, tuple(prior)))
        return tuple(outputs)

    return run


def distributions(case: Case) -> Function:
    dims = tuple(range(1, len(case.shape)))
    samples = torch.Size(() if case.samples is None else (case.samples,))

    def run(*leaves: Tensor) -> Outputs:
        mu, x, *prior = split(case, leaves)
        q = Normal(mu, scale(case, x))
        outputs = [q.rsample(samples)] if case.draws else []
        if case.op != "reparameterize":
            p = Normal(prior[0], scale(case, prior[1])) if prior else Normal(torch.zeros_like(mu), torch.ones_like(mu))
            outputs.append(kl_divergence(q, p).sum(dims))
        return tuple(outputs)

    return run


def providers(case: Case, with_compile: bool) -> dict[str, Function]:
    found = {
        "ours": ours(case),
        "ours again": ours(case),  # its distance from "ours" is the noise of the measurement
        "plain torch": plain(case),
        "distributions": distributions(case),
    }
    if with_compile:
        # on CPUs Inductor's own noise is slow, so the peer is plain torch compiled with aten's
        options = {"fallback_random": case.device.type == "cpu"}
        for name, f in (("ours, compiled", ours(case)), ("plain, compiled", plain(case))):
            found[name] = torch.compile(f, fullgraph=True, dynamic=False, options=options)  # type: ignore[arg-type]
    return found
