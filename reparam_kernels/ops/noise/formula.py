"""The noise in plain torch and float64. The kernels are tested against it, and it runs if there are none."""

import math

import torch
from torch import Tensor

from ...core.dtypes import has_float64
from ...core.window import NONE, Window, index_strides


def philox4x32_10(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Compute four 32-bit words for each counter of four and key of two, all held in int64 (Salmon et al., SC 2011)."""
    mask = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & mask ^ c1 ^ k0, p1 & mask, (p0 >> 32) & mask ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def reference_noise(seed: Tensor, shape: tuple[int, ...], samples: int = 1, window: Window = NONE) -> Tensor:
    """Compute eps, version 1, in float64. `shape` begins with the samples; each seed gives an equal part of it.

    With a window, the other dims of `shape` lie in it.
    """
    device = seed.device if has_float64(seed.device) else torch.device("cpu")
    i = torch.arange(math.prod(shape), device=device)
    n = max(i.numel() // max(samples, 1), 1)
    group = max(n // max(seed.numel(), 1), 1)
    key = seed.to(device).index_select(0, i % n // group)
    if window[0]:
        index = i // n * (math.prod(window[0]) // max(seed.numel(), 1)) + index_in_whole(
            i % n, shape, window, seed.numel()
        )
    else:
        index = i // n * group + i % group  # restarts in each group
    c, word = index // 4, index % 4
    zero = torch.zeros_like(c)
    x = philox4x32_10([c & 0xFFFFFFFF, c >> 32, zero, zero], [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF])
    radius, angle = torch.where(word < 2, x[0], x[2]), torch.where(word < 2, x[1], x[3])
    r = torch.sqrt(-2 * torch.log((radius.double() + 0.5) / 2**32))
    t = 2 * math.pi * (angle.double() + 0.5) / 2**32
    eps = r * torch.where(word % 2 == 0, torch.cos(t), torch.sin(t))
    return eps.reshape(shape) if device == seed.device else eps.reshape(shape).float().to(seed.device)


def index_in_whole(i: Tensor, shape: tuple[int, ...], window: Window, seeds: int) -> Tensor:
    """Return the indices in the whole, or in their items, of elements whose row-major index in the window is i."""
    whole, start = window
    index = torch.zeros_like(i)
    own = shape[len(shape) - len(whole) :]
    for size, first, stride in zip(own[::-1], start[::-1], index_strides(whole, seeds)[::-1], strict=True):
        index = index + (i % max(size, 1) + first) * stride
        i = i // max(size, 1)
    return index
