"""The noise as a registered op: eps in float32 for a seed, with a rule for vmap and no gradient."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import backends, torch_modes
from ...core.op import LIBRARY
from .formula import reference_noise

PACKAGE = __package__

LIBRARY.define("noise(Tensor seed, SymInt[] size, SymInt samples) -> Tensor")


def noise_op(seed: Tensor, size: Sequence[int], samples: int = 1) -> Tensor:
    """Draw eps in float32. `size` begins with the samples; each seed gives an equal part of the rest."""
    return torch.ops.reparam_kernels.noise(seed, size, samples)  # type: ignore[no-any-return]


def draw_into(out: Tensor, seed: Tensor) -> Tensor:
    """Return the noise of `seed` in `out`, or in a new tensor like it if `out` cannot be written to."""
    if torch.compiler.is_compiling() or torch_modes.in_transform() or torch_modes.in_dispatch_mode():
        return noise_op(seed, out.shape).to(out.dtype)
    kernels = backends.kernels(PACKAGE, out.device)
    if kernels is None:
        return noise_op(seed, out.shape).to(out.dtype)
    fresh = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    kernels.fill_eps(fresh, seed)
    return fresh if fresh is out else out.copy_(fresh)


@torch.library.impl(LIBRARY, "noise", "CompositeExplicitAutograd")
def _run(seed: Tensor, size: Sequence[int], samples: int) -> Tensor:
    seed = seed.as_subclass(Tensor)
    kernels = backends.kernels(PACKAGE, seed.device)
    if kernels is None:
        return reference_noise(seed, tuple(size), samples).float()
    per_seed = math.prod(size) // max(samples * seed.numel(), 1)
    eps = seed.new_empty((seed.numel(), samples, per_seed), dtype=torch.float32)
    kernels.fill_eps(eps, seed)
    return eps.movedim(0, 1).reshape(-1).view(size)  # contiguous, whatever movedim leaves


@torch.library.register_fake("reparam_kernels::noise", lib=LIBRARY)
def _fake(seed: Tensor, size: Sequence[int], samples: int) -> Tensor:
    return seed.new_empty(size, dtype=torch.float32)


@torch.library.register_vmap("reparam_kernels::noise", lib=LIBRARY)
def _vmap(info: Any, in_dims: Any, seed: Tensor, size: Sequence[int], samples: int) -> tuple[Tensor, int]:
    """Draw the whole batch at once, with the seeds of all its items."""
    seeds = seed.movedim(in_dims[0], 0)
    per_item = math.prod(size) // max(samples, 1)
    eps = noise_op(seeds.reshape(-1).contiguous(), (samples, seeds.shape[0], per_item), samples)
    return eps.movedim(1, 0).contiguous().view(seeds.shape[0], *size), 0
