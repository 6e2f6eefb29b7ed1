"""The C++ kernels of csrc/: allocates the outputs, hands the tensors over."""

import math
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
_isa = os.environ.get("REPARAM_CPU_ISA")
if _isa is not None:
    if _isa not in _C.available_isas():
        raise ValueError(
            f"instruction set: must be one that this CPU and build have ({', '.join(_C.available_isas())}); "
            f"got {_isa!r}. Correct or unset REPARAM_CPU_ISA."
        )
    _C.set_isa(_isa)


@lru_cache(maxsize=256)
def _options(param: str, min_std: float, clamp: tuple[float, float] | None) -> _C.Options:
    low, high = clamp or (0.0, 0.0)
    return _C.Options(getattr(_C.Param, param), min_std, clamp is not None, low, high)


def randn(out: Tensor, seed: Tensor) -> None:
    """Fills `out`, contiguous, with the noise of `seed`."""
    try:
        _C.randn(seed, out, torch.get_num_threads())
    except _C.InvalidArgument as refusal:
        raise explained(refusal, {"seed": seed, "out": out}) from None


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
    options = _options(spec.param, spec.min_std, spec.clamp)
    try:
        _C.latent_forward(options, torch.get_num_threads(), mu, x, mu_p, x_p, call.seed, call.eps, z, kl)
    except _C.InvalidArgument as refusal:
        tensors = {"mu": mu, "x": x, "mu_p": mu_p, "x_p": x_p, "seed": call.seed, "eps": call.eps, "z": z, "kl": kl}
        raise explained(refusal, tensors) from None
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
    options = _options(call.spec.param, call.spec.min_std, call.spec.clamp)
    try:
        _C.latent_backward(options, torch.get_num_threads(), mu, x, mu_p, x_p, seed, eps, dz, dkl, dmu, dx, dmu_p, dx_p)
    except _C.InvalidArgument as refusal:
        tensors = {"mu": mu, "x": x, "mu_p": mu_p, "x_p": x_p, "seed": seed, "eps": eps, "dz": dz, "dkl": dkl}
        raise explained(refusal, tensors) from None
    return (dmu, dx, dmu_p, dx_p) if call.x is not None else (packed, None, dmu_p, dx_p)


def explained(refusal: Exception, tensors: dict[str, Tensor | None]) -> ValueError:
    """The error for a call that the extension refused: a refusal only names the argument, and this finds out why."""
    name = str(refusal)
    must, got = _fault(tensors.get(name))
    return ValueError(
        f"reparam_kernels: {name} must {must}; got {got}. Pass plain, dense CPU tensors that hold their memory."
    )


def _fault(t: Tensor | None) -> tuple[str, str]:
    """What a tensor must be that the kernels can read, and what this one is."""
    if t is None or type(t) not in (Tensor, torch.nn.Parameter):
        return "be a plain torch.Tensor", type(t).__name__
    if t.layout is not torch.strided or t.device.type != "cpu":
        return "be a dense tensor on the CPU", f"{t.layout} on {t.device}"
    steps = [max(size - 1, 0) for size in t.shape]
    span = sum(step * abs(stride) for step, stride in zip(steps, t.stride(), strict=True))
    if t.dim() > 64 or math.prod(step + 1 for step in steps) > 2**62 or span >= 2**62:
        return "have at most 64 dims and 2**62 elements, and span less than 2**62", f"shape {tuple(t.shape)}"
    if t.numel() > 0 and t.untyped_storage().data_ptr() == 0:
        return "have memory", f"a storage of {t.untyped_storage().nbytes()} bytes"
    return "fit the other tensors of the call", f"{t.dtype}, shape {tuple(t.shape)}, strides {t.stride()}"
