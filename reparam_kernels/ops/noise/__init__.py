"""The noise: standard normals that are a function of a seed and an element index."""

from typing import Any

import torch
from torch import Tensor

from ...core import checks, dtensor
from ...core import window as windows
from ...core.window import Window
from .op import draw_into

NOISE_VERSION = 1


def randn(
    *size: Any,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    window: Window | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout = torch.strided,
    device: torch.device | str | int | None = None,
    requires_grad: bool = False,
    pin_memory: bool = False,
) -> Tensor:
    """Draw standard normals, the same noise that the sampling ops use.

        eps[i] = Box-Muller(Philox4x32-10(key = seed, counter = i // 4))[i % 4]

    Element i, in row-major order, depends on the seed and i alone: not on dtype, device or thread count.

    Args:
        size: ints, or one tuple of ints, as for torch.randn.
        seed: int in [-2**63, 2**64), taken modulo 2**64, or an int64 tensor of one element or of size[0] elements, one
            for each leading item, the element index restarting in each. Default: drawn from the generator, as by
            draw_seed.
        generator: the torch.Generator that the seed is drawn from; default torch's own.
        window: (whole_shape, start), as for reparameterize: the noise is that of randn(whole_shape) at these places.
        out, dtype, layout, device, requires_grad, pin_memory: as for torch.randn; float16, bfloat16, float32 (made in
            float32, then rounded) or float64 (widened).

    Returns:
        eps of the given size.

    Raises:
        TypeError, ValueError: if the seed is out of range or of the wrong kind, or the dtype is not one of the four.

    Source:
        Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller, 1958.

    Example:
        >>> import reparam_kernels as rk
        >>> rk.randn(4, seed=7)
        tensor([ 2.9158e-04, -3.0485e-01,  1.7888e+00,  1.0679e+00])
    """
    checks.some_size("randn", size)
    checks.float_dtype("randn", dtype)
    result = torch.empty(*size, out=out, dtype=dtype, layout=layout, device=device, pin_memory=pin_memory)
    checks.floating("randn", "the default dtype" if out is None else "out", result)
    eps = filled("randn", result, seed, generator, window)
    with torch.no_grad():
        result = eps if out is None or eps is out else out.copy_(eps)
    return result.requires_grad_(requires_grad) if requires_grad else result


def randn_like(
    input: Tensor,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    window: Window | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | str | int | None = None,
    requires_grad: bool = False,
    pin_memory: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """Draw standard normals of the shape, dtype and device of a tensor, the same as `randn` of its shape.

        eps[i] = Box-Muller(Philox4x32-10(key = seed, counter = i // 4))[i % 4]

    Args:
        input: gives the shape and the defaults of dtype, layout and device.
        seed, generator, window: as for randn.
        dtype, layout, device, requires_grad, pin_memory, memory_format: as for torch.randn_like. The index of an
            element is that in the logical, row-major order, whatever the memory format.

    Returns:
        eps of the shape of input.

    Raises:
        TypeError, ValueError: as randn.

    Source:
        As randn.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.randn_like(torch.zeros(4), seed=7)
        tensor([ 2.9158e-04, -3.0485e-01,  1.7888e+00,  1.0679e+00])
    """
    checks.float_dtype("randn_like", dtype)
    options: Any = {"dtype": dtype, "layout": layout, "device": device, "pin_memory": pin_memory}
    result = torch.empty_like(input, memory_format=memory_format, requires_grad=False, **options)
    checks.floating("randn_like", "input", result)
    eps = filled("randn_like", result, seed, generator, window)
    with torch.no_grad():
        result = eps if eps.stride() == result.stride() else result.copy_(eps)
    return result.requires_grad_(requires_grad) if requires_grad else result


def filled(
    where: str, result: Tensor, seed: int | Tensor | None, generator: torch.Generator | None, window: Any
) -> Tensor:
    """Fill a tensor with noise, or return a tensor with the noise where the tensor can't be filled in place."""
    drawn, whole = seed is None, tuple(result.shape)
    seeds, window = windows.place(where, seed, generator, result.device, whole, window)
    with torch.no_grad():
        if not dtensor.is_dtensor(result):
            return draw_into(result, seeds, window)
        dtensor.one_seed(where, result, seeds, drawn)
        seeds, window = dtensor.window_of_part(seeds, window, whole, *dtensor.part_of("the result", result))
        part = draw_into(dtensor.local(result).contiguous(), seeds, window)
        return dtensor.from_part(part, result.device_mesh, result.placements, whole)  # type: ignore[attr-defined]
