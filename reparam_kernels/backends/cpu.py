"""The C++ kernels of csrc/: allocates the outputs, hands the tensors over."""

import os
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import _C
from ..spec import Call, Spec, accumulate_dtype, expanded_prior, prior_gradient, unpacked

_C.bind_tensor_type(torch.Tensor, torch.nn.Parameter)
if "REPARAM_CPU_ISA" in os.environ:
    _C.use(os.environ["REPARAM_CPU_ISA"])


@lru_cache(maxsize=256)
def _options(param: str, min_std: float, clamp: tuple[float, float] | None) -> _C.Options:
    low, high = clamp or (0.0, 0.0)
    return _C.Options(getattr(_C.Param, param), min_std, clamp is not None, low, high)


def _options_of(spec: Spec) -> _C.Options:
    return _options(spec.param, spec.min_std, spec.clamp)


def randn(out: Tensor, seed: Tensor) -> None:
    """Fills `out`, contiguous, with the noise of `seed`."""
    _C.randn(seed, out, torch.get_num_threads())


def forward(call: Call) -> tuple[Tensor | None, Tensor | None]:
    mu, x = unpacked(call)
    spec, shape = call.spec, mu.shape
    z = mu.new_empty(spec.sample_shape + shape) if spec.z else None
    kl = None
    if spec.kl:
        kl = mu.new_empty(shape[: len(shape) - spec.event_ndim], dtype=accumulate_dtype(mu.dtype))
    _C.forward(
        _options_of(spec),
        mu,
        x,
        *expanded_prior(call, mu.shape),
        call.seed if spec.z else None,
        call.eps,
        z,
        kl,
        torch.get_num_threads(),
    )
    return z, kl


def backward(
    call: Call, dz: Tensor | None, dkl: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients to mu, x, mu_p and x_p, the prior's in the shape of mu; packed: to the moments, None, mu_p, x_p."""
    mu, x = unpacked(call)
    noisy = dz is not None
    want_mu, want_x, *want_prior = wanted
    packed = dmu = dx = None
    if call.x is None and want_mu:
        packed = call.mu.new_empty(call.mu.shape)
        dmu, dx = packed.chunk(2, call.spec.packed or 0)
    else:
        dmu = mu.new_empty(mu.shape) if want_mu else None
        dx = mu.new_empty(mu.shape) if want_x else None
    priors = zip((call.mu_p, call.x_p), want_prior, strict=True)
    dmu_p, dx_p = (prior_gradient(p, mu) if want and dkl is not None else None for p, want in priors)
    _C.backward(
        _options_of(call.spec),
        mu,
        x,
        *expanded_prior(call, mu.shape),
        call.seed if noisy else None,
        call.eps if noisy else None,
        dz,
        dkl,
        dmu,
        dx,
        dmu_p,
        dx_p,
        torch.get_num_threads(),
    )
    if call.x is None:
        return packed, None, dmu_p, dx_p
    return dmu, dx, dmu_p, dx_p
