"""Copies of modules."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def copied(module: nn.Module) -> nn.Module:
    """Deep-copy a module. A tensor that it keeps of a forward call is copied without its graph, as deepcopy needs."""
    kept = {id(t): t.detach().clone() for m in module.modules() for t in tensors(vars(m)) if t.grad_fn is not None}
    return copy.deepcopy(module, kept)


def tensors(value: Any) -> Iterator[Tensor]:
    """Find the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
