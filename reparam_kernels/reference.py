"""The package in plain torch: the mathematics to check the kernels by, and what runs where there is no kernel.

Arithmetic is in float64 where the device has it, so the textbook formulas stand as they are.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .spec import Call, accumulate_dtype, prepare, take_seed, unpacked

__all__ = ["kl_divergence", "randn", "reparameterize", "reparameterize_kl"]


def philox4x32_10(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Four 32-bit words for each counter of four and key of two, all held in int64 (Salmon et al., SC 2011)."""
    mask = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & mask ^ c1 ^ k0, p1 & mask, (p0 >> 32) & mask ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def noise(seed: Tensor, shape: tuple[int, ...], samples: int = 1) -> Tensor:
    """eps, version 1, in float64; shape includes the samples, and each of the seeds names an equal part of the rest."""
    device = torch.device("cpu") if seed.device.type == "mps" else seed.device
    i = torch.arange(math.prod(shape), device=device)
    n = max(i.numel() // max(samples, 1), 1)
    group = max(n // seed.numel(), 1)
    key = seed.to(device).index_select(0, i % n // group)
    index = i // n * group + i % group  # restarts in each group
    c, word = index // 4, index % 4
    zero = torch.zeros_like(c)
    x = philox4x32_10([c & 0xFFFFFFFF, c >> 32, zero, zero], [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF])
    radius, angle = torch.where(word < 2, x[0], x[2]), torch.where(word < 2, x[1], x[3])
    r = torch.sqrt(-2 * torch.log((radius.double() + 0.5) / 2**32))
    t = 2 * math.pi * (angle.double() + 0.5) / 2**32
    eps = r * torch.where(word % 2 == 0, torch.cos(t), torch.sin(t))
    return eps.reshape(shape) if device == seed.device else eps.reshape(shape).float().to(seed.device)


def log_sigma(x: Tensor, param: str, min_std: float) -> Tensor:
    if param == "logvar":
        return x / 2
    if param == "logstd":
        return x
    if param == "softplus" and min_std == 0:
        exponential = x < -40  # there softplus(x) is exp(x), and may be 0 as a number
        return torch.where(exponential, x, torch.log(sigma_of(torch.where(exponential, 0, x), param, min_std)))
    return torch.log(sigma_of(x, param, min_std))


def sigma_of(x: Tensor, param: str, min_std: float) -> Tensor:
    if param in ("logvar", "logstd"):
        return torch.exp(log_sigma(x, param, min_std))
    return x if param == "std" else softplus(x, threshold=40.0) + min_std


def bounded_exp(x: Tensor) -> Tensor:
    """exp(x) as a number that is neither 0 nor infinite, and its own derivative."""
    limit = math.log(torch.finfo(x.dtype).max) - 1
    return torch.exp(x.clamp(-limit, limit).detach() + (x - x.detach()).nan_to_num())


def formula(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """z and kl, differentiable to any order."""
    spec, dtype = call.spec, call.mu.dtype
    mu, x = unpacked(call)
    shape = spec.sample_shape + tuple(mu.shape)
    mu, x = widen(mu), widen(x)
    if spec.clamp is not None:
        x = x.clamp(*spec.clamp)
    z = kl = None
    if spec.z:
        if call.eps is not None:
            eps = widen(call.eps)
        else:
            assert call.seed is not None  # prepare() drew one
            eps = noise(call.seed, shape, math.prod(spec.sample_shape)).to(mu.dtype)
        z = (mu + sigma_of(x, spec.param, spec.min_std) * eps).to(dtype).contiguous()
    if spec.kl:
        delta, d = mu, 2 * log_sigma(x, spec.param, spec.min_std)
        if call.mu_p is not None and call.x_p is not None:
            log_sigma_p = log_sigma(widen(call.x_p), spec.param, spec.min_std)
            d = d - 2 * log_sigma_p
            delta = (mu - widen(call.mu_p)) * bounded_exp(-log_sigma_p)
        kl = (delta**2 + torch.expm1(d) - d) / 2
        if spec.event_ndim:
            kl = kl.sum(dim=tuple(range(-spec.event_ndim, 0)))
        kl = kl.to(accumulate_dtype(dtype)).contiguous()
    return z, kl


def widen(t: Tensor) -> Tensor:
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


def randn(
    *size: Any,
    seed: Any = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """As reparam_kernels.randn, to the noise's accuracy."""
    shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
    at = torch.device(device) if device is not None else torch.get_default_device()
    seed = take_seed("reference.randn", seed, generator, at, shape[0] if shape else None)
    return noise(seed, shape).float().to(dtype or torch.get_default_dtype())


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: Any = None,
    generator: Any = None,
    eps: Any = None,
    sample_shape: Any = (),
    param: str = "logvar",
    min_std: float = 0.0,
    clamp: Any = None,
) -> Tensor:
    """As reparam_kernels.reparameterize, in plain torch."""
    z, _ = formula(
        prepare(
            "reference.reparameterize",
            mu,
            logvar,
            z=True,
            seed=seed,
            generator=generator,
            eps=eps,
            sample_shape=sample_shape,
            param=param,
            min_std=min_std,
            clamp=clamp,
        )
    )
    return z  # type: ignore[return-value]


def kl_divergence(
    mu: Tensor,
    logvar: Tensor,
    *,
    event_ndim: int | None = None,
    prior: Any = None,
    param: str = "logvar",
    min_std: float = 0.0,
    clamp: Any = None,
) -> Tensor:
    """As reparam_kernels.kl_divergence, in plain torch."""
    _, kl = formula(
        prepare(
            "reference.kl_divergence",
            mu,
            logvar,
            kl=True,
            event_ndim=event_ndim,
            prior=prior,
            param=param,
            min_std=min_std,
            clamp=clamp,
        )
    )
    return kl  # type: ignore[return-value]


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: Any = None,
    generator: Any = None,
    eps: Any = None,
    sample_shape: Any = (),
    event_ndim: int | None = None,
    prior: Any = None,
    param: str = "logvar",
    min_std: float = 0.0,
    clamp: Any = None,
) -> tuple[Tensor, Tensor]:
    """As reparam_kernels.reparameterize_kl, in plain torch."""
    return formula(  # type: ignore[return-value]
        prepare(
            "reference.reparameterize_kl",
            mu,
            logvar,
            z=True,
            kl=True,
            seed=seed,
            generator=generator,
            eps=eps,
            sample_shape=sample_shape,
            event_ndim=event_ndim,
            prior=prior,
            param=param,
            min_std=min_std,
            clamp=clamp,
        )
    )
