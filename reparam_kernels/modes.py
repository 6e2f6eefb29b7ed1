"""What torch is doing around a call. Every private torch name of the package is here."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

_functorch_level = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def recording() -> bool:
    """Something reads the ops that run: a dispatch mode (fake tensors, make_fx, flop counting) or torch.jit.trace."""
    return _dispatch_modes() > 0 or _tracing_state() is not None


def transforming() -> bool:
    """Inside a torch.func transform, or of forward-mode AD."""
    return _functorch_level() is not None or forward_ad._current_level >= 0


def constant_to_the_compiler(f: Callable[P, R]) -> Callable[P, R]:
    """torch.compiler.assume_constant_result without its import of the compiler, which takes two seconds."""
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return f


@constant_to_the_compiler
def compiling_a_transform() -> bool:
    """As transforming(), while torch.compile traces: it enters a transform as it meets one."""
    return transforming()


def batched(*grads: Tensor | None) -> bool:
    """Gradients that vmap, or is_grads_batched, holds many of."""
    return _functorch_level() is not None or any(g is not None and _is_legacy_batched(g) for g in grads)
