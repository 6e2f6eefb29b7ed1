"""Copies of modules, and the tensors in nested values."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def copied(module: nn.Module) -> nn.Module:
    """Deep-copy a module. A tensor that it keeps of a forward call is copied without its graph, as deepcopy needs."""
    kept = [t for m in module.modules() for t in floating_tensors(vars(m)) if t.grad_fn is not None]
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in kept})


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """Find the floating tensors at any depth of tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floating_tensors(item)
    elif isinstance(value, dict):
        yield from floating_tensors(list(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from floating_tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
