"""The memory format of what is computed from a tensor element by element: channels_last where torch keeps it."""

import torch
from torch import Tensor

# By the number of dims: the format, and its dims from the innermost outwards.
CHANNELS_LAST = {
    4: (torch.channels_last, (1, 3, 2, 0)),
    5: (torch.channels_last_3d, (1, 4, 3, 2, 0)),
}


def format_of(t: Tensor) -> torch.memory_format:
    """Return the format that torch gives mu + sigma * eps for this mu if it is a channels_last one, else contiguous."""
    if t.dim() not in CHANNELS_LAST or t.is_contiguous():
        return torch.contiguous_format
    memory_format, order = CHANNELS_LAST[t.dim()]
    sizes, strides, least = t.shape, t.stride(), 1  # there may be gaps, as in a half of packed moments
    for dim in order:
        if strides[dim] < least:
            return torch.contiguous_format
        least = strides[dim] * sizes[dim]
    return memory_format


def empty_like(t: Tensor) -> Tensor:
    """Return an uninitialised dense tensor like another one, in its format."""
    return torch.empty_like(t, memory_format=format_of(t))


def in_format(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Return the same numbers in a format. vmap knows no other way to make a channels_last tensor."""
    if memory_format is torch.contiguous_format:
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)
