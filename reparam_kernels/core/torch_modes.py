"""Queries the torch modes around a call. Every private torch name that the package uses is here."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")

MISSING: str | None = None  # why no kernels may run: a transform or mode around a call would not be seen
try:
    _functorch_level = torch._C._functorch.peek_interpreter_stack
    _dispatch_modes = torch._C._len_torch_dispatch_stack
    _tracing_state = torch._C._get_tracing_state
    _is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
    forward_ad._current_level  # noqa: B018
except AttributeError as error:
    MISSING = f"torch {torch.__version__} does not say which transforms are around a call: {error}"
    _functorch_level = _dispatch_modes = lambda: 1  # type: ignore[assignment]  # any call may be in one


def in_dispatch_mode() -> bool:
    """Return True in a dispatch mode (fake tensors, make_fx, a flop counter) or a trace, which see the ops that run."""
    return _dispatch_modes() > 0 or _tracing_state() is not None


def in_transform() -> bool:
    """Return True inside a torch.func transform or forward-mode AD."""
    return _functorch_level() is not None or forward_ad._current_level >= 0


def watched() -> bool:
    """Return True if a transform, a mode or a trace sees the ops that run."""
    return (
        _functorch_level() is not None
        or _dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


def constant_to_the_compiler(f: Callable[P, R]) -> Callable[P, R]:
    """Do what torch.compiler.assume_constant_result does, without importing the compiler, which takes two seconds."""
    if torch.__version__ >= "2.15":  # the mark was read in torch 2.10 to 2.14
        return torch.compiler.assume_constant_result(f)  # type: ignore[no-any-return, no-untyped-call]
    f._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return f


@constant_to_the_compiler
def compiling_a_transform() -> bool:
    """Return True if torch.compile is tracing a transform: it enters each transform that it meets."""
    return in_transform()


def is_batched_grad(*grads: Tensor | None) -> bool:
    """Return True if one of these holds several gradients, by vmap or is_grads_batched."""
    if _functorch_level() is not None:
        return True
    for g in grads:  # noqa: SIM110  a generator expression is slower
        if g is not None and _is_legacy_batched(g):
            return True
    return False
