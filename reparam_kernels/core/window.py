"""A window: the place of a tensor in a larger one, whose noise it takes there.

It is a pair of `whole`, the shape of the larger tensor, and `start`, the index of the window's first element. Both are
empty without a window.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import checks
from .seeds import make_seed

Window = tuple[tuple[int, ...], tuple[int, ...]]

NONE: Window = ((), ())
MOST = 2**62  # elements of the whole, of all samples together
DO = "Pass window=(whole_shape, start), for example ((64, 20), (16, 0)) for rows 16 and up of 64."


def check(where: str, window: Any, shape: tuple[int, ...], samples: tuple[int, ...] = ()) -> Window:
    """Check the window of a tensor of this shape, drawn `samples` times, and return it as two tuples."""
    pair = checks.sequence(window)
    if pair is None or len(pair) != 2:
        got = type(window).__name__ if pair is None else f"{len(pair)} items"
        raise TypeError(f"{where}: window must be a pair (whole_shape, start); got {got}. {DO}")
    whole = checks.sizes(where, "the whole shape of window", pair[0], DO)
    start = checks.sizes(where, "the start of window", pair[1], DO)
    if not len(whole) == len(start) == len(shape):
        raise ValueError(
            f"{where}: window must have one size and one start for each of the {len(shape)} dims; got {len(whole)} "
            f"sizes and {len(start)} starts. {DO}"
        )
    if any(first + size > all_of_it for first, size, all_of_it in zip(start, shape, whole, strict=True)):
        raise ValueError(
            f"{where}: window must hold a tensor of shape {tuple(shape)} inside the whole; got the whole shape {whole} "
            f"and start {start}. Correct one of them."
        )
    if math.prod(whole) * math.prod(samples) > MOST:
        raise ValueError(
            f"{where}: window must lie in a whole of at most 2**62 elements; got {samples + whole} with the samples. "
            "Give each item a seed, and call once for each group of items."
        )
    return whole, start


def no_eps(where: str, window: Any, eps: Any) -> None:
    if window is not None and eps is not None:
        raise ValueError(
            f"{where}: window goes with noise that the call makes; got eps and window. Cut eps to the window before "
            "the call, and leave window out."
        )


def place(
    where: str,
    seed: Any,
    generator: torch.Generator | None,
    device: torch.device,
    shape: tuple[int, ...],
    window: Any,
    samples: tuple[int, ...] = (),
) -> tuple[Tensor, Window]:
    """Return the seed of a call on a tensor of this shape, and the tensor's window, both from what the user passed."""
    if window is None:
        return make_seed(where, seed, generator, device, shape[0] if shape else None), NONE
    whole, start = check(where, window, shape, samples)
    seeds = make_seed(where, seed, generator, device, whole[0] if whole else None)
    return own_seeds(seeds, shape, (whole, start))


def own_seeds(seed: Tensor, shape: tuple[int, ...], window: Window) -> tuple[Tensor, Window]:
    """Select the seeds of a window's items from those of the whole. The index restarts in each item."""
    if seed.numel() <= 1:
        return seed, window
    whole, start = window
    return seed.narrow(0, start[0], shape[0]), ((shape[0], *whole[1:]), (0, *start[1:]))


def index_strides(whole: tuple[int, ...], seeds: int) -> list[int]:
    """Return the strides of an element's index. With a seed for each item, the leading dim does not count."""
    result, step = [], 1
    for size in reversed(whole):
        result.append(step)
        step *= size
    result.reverse()
    return [0, *result[1:]] if seeds > 1 else result
