"""The noise as a registered op: eps in float32 for a seed, with a rule for vmap and no gradient."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import backends, torch_modes
from ...core.op import LIBRARY
from ...core.window import NONE, Window
from .formula import reference_noise

PACKAGE = __package__

LIBRARY.define(
    "noise(Tensor seed, SymInt[] size, SymInt samples, SymInt[]? whole=None, SymInt[]? start=None) -> Tensor"
)


def noise_op(seed: Tensor, size: Sequence[int], samples: int = 1, window: Window = NONE) -> Tensor:
    """Draw eps in float32. `size` begins with the samples; each seed gives an equal part of the rest."""
    whole, start = window
    return torch.ops.reparam_kernels.noise(seed, size, samples, whole or None, start or None)  # type: ignore[no-any-return]


def draw_into(out: Tensor, seed: Tensor, window: Window) -> Tensor:
    """Return the noise of `seed` in `out`, or in a new tensor like it if `out` cannot be written to."""
    if torch.compiler.is_compiling() or torch_modes.in_transform() or torch_modes.in_dispatch_mode():
        return noise_op(seed, out.shape, 1, window).to(out.dtype)
    kernels = backends.kernels(PACKAGE, out.device)
    if kernels is None:
        return noise_op(seed, out.shape, 1, window).to(out.dtype)
    fresh = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    kernels.fill_eps(fresh, seed, window)
    return fresh if fresh is out else out.copy_(fresh)


@torch.library.impl(LIBRARY, "noise", "CompositeExplicitAutograd")
def _run(
    seed: Tensor,
    size: Sequence[int],
    samples: int,
    whole: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
) -> Tensor:
    seed = seed.as_subclass(Tensor)
    window = tuple(whole or ()), tuple(start or ())
    kernels = backends.kernels(PACKAGE, seed.device)
    if kernels is None:
        return reference_noise(seed, tuple(size), samples, window).float()
    if whole:
        own = size[len(size) - len(whole) :]
        eps = seed.new_empty(by_seed(seed, 1, samples, own), dtype=torch.float32)
        kernels.fill_eps(eps, seed, (by_seed(seed, 1, samples, whole), by_seed(seed, 0, 0, window[1])))
    else:
        per_seed = math.prod(size) // max(samples * seed.numel(), 1)
        eps = seed.new_empty((seed.numel(), samples, per_seed), dtype=torch.float32)
        kernels.fill_eps(eps, seed)
    return eps.movedim(0, 1).reshape(-1).view(size)  # contiguous, whatever movedim leaves


def by_seed(seed: Tensor, one: int, samples: int, dims: Sequence[int]) -> tuple[int, ...]:
    """Put the samples behind the dim of the seeds, as the index of an element counts them."""
    return (one, samples, *dims) if seed.numel() == 1 else (dims[0], samples, *dims[1:])


@torch.library.register_fake("reparam_kernels::noise", lib=LIBRARY)
def _fake(seed: Tensor, size: Sequence[int], samples: int, whole: Any = None, start: Any = None) -> Tensor:
    return seed.new_empty(size, dtype=torch.float32)


@torch.library.register_vmap("reparam_kernels::noise", lib=LIBRARY)
def _vmap(
    info: Any, in_dims: Any, seed: Tensor, size: Sequence[int], samples: int, whole: Any = None, start: Any = None
) -> tuple[Tensor, int]:
    """Draw the whole batch at once, with the seeds of all its items."""
    seeds = seed.movedim(in_dims[0], 0)
    count, items, window = seeds.shape[0], seeds.numel(), NONE
    if whole:
        inner = int(items != count)  # the items of a window that has a seed for each are already a dim
        window = (items, *whole[inner:]), (0, *start[inner:])
        dims = items, *size[len(size) - len(whole) + inner :]
    else:
        dims = count, math.prod(size) // max(samples, 1)
    eps = noise_op(seeds.reshape(-1).contiguous(), (samples, *dims), samples, window)
    return eps.reshape(samples, count, -1).movedim(1, 0).contiguous().view(count, *size), 0
