"""The smallest op, made as "Adding an op" in CONTRIBUTING says: y = scale * x^2 * weight."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reparam_kernels.core import checks
from reparam_kernels.core.execute import execute
from reparam_kernels.core.op import Op, Shape


class Config(NamedTuple):
    scale: float


class Arguments(NamedTuple):
    x: Tensor
    weight: Tensor | None  # expands to the shape of x
    config: Config


def formula(arguments: Arguments) -> tuple[Tensor]:
    square = arguments.config.scale * arguments.x**2
    return (square if arguments.weight is None else square * arguments.weight,)


def shapes(arguments: Arguments) -> tuple[Shape]:
    return (Shape(tuple(arguments.x.shape), arguments.x.dtype),)


TOY = Op(
    "toy",
    Arguments,
    inputs=("x", "weight"),
    outputs=("y",),
    formula=formula,
    shapes=shapes,
    package=__package__,
    expands=("weight",),
)


def weighted_square(x: Tensor, weight: Tensor | None = None, *, scale: Any = 1.0) -> Tensor:
    checks.floating("weighted_square", "x", x)
    if weight is not None:
        checks.expands("weighted_square", "weight", weight, x.shape)
    (y,) = execute(TOY, Arguments(x, weight, Config(checks.number("weighted_square", "scale", scale, "Pass 1.0."))))
    return y


def kernel(x: torch.Tensor, weight: torch.Tensor | None, scale: float, out: torch.Tensor) -> None:
    """Fill `out`, in place of a kernel in C++ or Triton."""
    out.copy_(scale * x.detach() ** 2 * (1 if weight is None else weight.detach()))
