"""Binds the C++ extension to torch's tensor type, and holds what the CPU launches of all ops share.

Importing this module raises an ImportError that says why the extension cannot be used.
"""

import math
import os

import torch
from torch import Tensor

from .. import _C

try:
    _C.bind_tensor_type(torch.Tensor, torch.nn.Parameter)
except (AttributeError, ValueError, RuntimeError) as error:  # a torch that this package does not support
    raise ImportError(
        f"torch {torch.__version__} does not provide the DLPack exchange API that the extension needs: {error}"
    ) from error
_isa = os.environ.get("REPARAM_CPU_ISA")
if _isa is not None:
    if _isa not in _C.available_isas():
        raise ValueError(
            f"instruction set: must be one that this CPU and build have ({', '.join(_C.available_isas())}); "
            f"got {_isa!r}. Correct or unset REPARAM_CPU_ISA."
        )
    _C.set_isa(_isa)


def empty(like: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor like another one."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def explain(refusal: Exception, tensors: dict[str, Tensor | None]) -> ValueError:
    """Return the error for a call that the extension refused. The refusal only names the argument; this adds why."""
    name = str(refusal)
    if name == "window":
        return ValueError(
            "reparam_kernels: window must hold the tensor inside a whole of at most 2**62 elements; got another. "
            "Pass window= to a public function, which says what is wrong."
        )
    must, got = _fault(tensors.get(name))
    return ValueError(
        f"reparam_kernels: {name} must {must}; got {got}. Pass plain, dense CPU tensors that hold their memory."
    )


def _fault(t: Tensor | None) -> tuple[str, str]:
    """Return what a tensor must be for the kernels to read it, and what this one is."""
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
