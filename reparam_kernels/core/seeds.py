"""Seeds: drawn from torch's generators, or given by the user."""

from typing import Any

import torch
from torch import Tensor

from . import checks


def draw_seed(device: torch.device | str | int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Draw the seed that a sampling call would draw, to pass it to several calls or into compiled code.

    A sampling call makes this one random draw, without a host synchronisation. Draw the seed outside, and pass it as
    `seed=`, where a call must not draw: with a generator inside compiled or checkpointed code, under a memory budget
    of torch.compile that recomputes the forward pass, or to share the noise between calls.

    Args:
        device: of the seed, which must be that of mu; default torch's default device.
        generator: the torch.Generator to draw from; default torch's own, which torch.manual_seed seeds.

    Returns:
        An int64 tensor of shape (1,), in [0, 2**63 - 1).

    Raises:
        TypeError: if the generator is not a torch.Generator.
        ValueError: if a generator is given in compiled code, where torch cannot follow it.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> seed = rk.draw_seed()
        >>> torch.equal(rk.randn(3, seed=seed), rk.randn(3, seed=seed))
        True
    """
    if generator is not None:
        checks.one_source("draw_seed", None, generator, None)
        if torch.compiler.is_compiling():
            raise ValueError(
                "reparam_kernels: a call in compiled code must draw from torch's own generator; got a generator. "
                "Draw a seed outside with rk.draw_seed(generator=...), and pass seed=."
            )
        device = torch.get_default_device() if device is None else device
        return torch.randint(2**63 - 1, (1,), device=generator.device, generator=generator).to(device)
    if torch.compiler.is_compiling():  # with this signature torch.compile draws what eager draws
        return torch.randint(2**63 - 1, (1,), device=device, generator=None)
    return torch.randint(2**63 - 1, (1,), device=device)


def make_seed(
    where: str, seed: Any, generator: torch.Generator | None, device: torch.device, items: int | None
) -> Tensor:
    """Return the seed of a call as an int64 tensor; an int becomes a tensor, so that compiled code does not recompile.

    items: the size of the leading dim, or None if there is none.
    """
    if seed is None:
        return draw_seed(device, generator)
    if isinstance(seed, Tensor):
        checks.seed_tensor(where, seed, device, items)
        return seed if seed.dim() == 1 and seed.is_contiguous() else seed.reshape(-1).contiguous()
    value = checks.seed_in_range(where, seed)
    return torch.full((1,), value if value < 2**63 else value - 2**64, dtype=torch.int64, device=device)
