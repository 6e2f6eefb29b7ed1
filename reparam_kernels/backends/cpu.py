"""The C++ kernels of csrc/: allocates the outputs, hands the tensors over."""

import os
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import _C
from ..spec import Call, accumulate_dtype, expanded_prior, prior_gradient, unpacked

try:
    _C.bind_tensor_type(torch.Tensor, torch.nn.Parameter)
except (AttributeError, ValueError, RuntimeError) as error:  # another torch than this package is for
    raise ImportError(
        f"torch {torch.__version__} does not lend its tensors as the extension reads them: {error}"
    ) from error
if "REPARAM_CPU_ISA" in os.environ:
    _C.use(os.environ["REPARAM_CPU_ISA"])


@lru_cache(maxsize=256)
def _options(param: str, min_std: float, clamp: tuple[float, float] | None) -> _C.Options:
    low, high = clamp or (0.0, 0.0)
    return _C.Options(getattr(_C.Param, param), min_std, clamp is not None, low, high)


def randn(out: Tensor, seed: Tensor) -> None:
    """Fills `out`, contiguous, with the noise of `seed`."""
    _C.randn(seed, out, torch.get_num_threads())


def empty(like: Tensor) -> Tensor:
    """Contiguous, unfilled."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def empty_kl(mu: Tensor, event_ndim: int) -> Tensor:
    shape, dtype = mu.shape[: mu.dim() - event_ndim], accumulate_dtype(mu.dtype)
    return mu.new_empty(shape) if mu.dtype is dtype else mu.new_empty(shape, dtype=dtype)  # the keyword costs a us


def forward(call: Call) -> tuple[Tensor | None, Tensor | None]:
    spec = call.spec
    mu, x = (call.mu, call.x) if call.x is not None else unpacked(call)
    mu_p, x_p = (None, None) if call.mu_p is None else expanded_prior(call, mu.shape)
    z = kl = None
    if spec.z:
        z = mu.new_empty(spec.sample_shape + mu.shape) if spec.sample_shape else empty(mu)
    if spec.kl:
        kl = empty_kl(mu, spec.event_ndim)
    _C.forward(
        _options(spec.param, spec.min_std, spec.clamp), mu, x, mu_p, x_p, call.seed, call.eps, z, kl,
        torch.get_num_threads(),
    )  # fmt: skip
    return z, kl


def backward(
    call: Call, dz: Tensor | None, dkl: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients to mu, x, mu_p and x_p, the prior's in the shape of mu; packed: to the moments, None, mu_p, x_p."""
    mu, x = (call.mu, call.x) if call.x is not None else unpacked(call)
    mu_p, x_p = (None, None) if call.mu_p is None else expanded_prior(call, mu.shape)
    packed = dmu = dx = dmu_p = dx_p = None
    if call.x is not None:
        dmu = empty(mu) if wanted[0] else None
        dx = empty(mu) if wanted[1] else None
    elif wanted[0]:
        packed = call.mu.new_empty(call.mu.shape)
        dmu, dx = packed.chunk(2, call.spec.packed or 0)
    if dkl is not None:
        dmu_p = prior_gradient(call.mu_p, mu) if wanted[2] else None
        dx_p = prior_gradient(call.x_p, mu) if wanted[3] else None
    seed, eps = (None, None) if dz is None else (call.seed, call.eps)
    _C.backward(
        _options(call.spec.param, call.spec.min_std, call.spec.clamp), mu, x, mu_p, x_p, seed, eps, dz, dkl, dmu, dx,
        dmu_p, dx_p, torch.get_num_threads(),
    )  # fmt: skip
    return (dmu, dx, dmu_p, dx_p) if call.x is not None else (packed, None, dmu_p, dx_p)
