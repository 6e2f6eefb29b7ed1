"""Seeds: drawn from torch's generators, or given by the user."""

from typing import Any

import torch
from torch import Tensor

from . import checks


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draw one seed, the only random draw of a call, without a host synchronisation."""
    if generator is not None:
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
        return seed.reshape(-1).contiguous()
    return torch.full((1,), checks.seed_in_range(where, seed), dtype=torch.int64, device=device)
