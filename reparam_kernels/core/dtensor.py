"""DTensor, torch's tensor that is spread over processes: the part of this process, and what a call on it needs.

torch.distributed.tensor is imported where a DTensor is met, since its import takes long.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .window import NONE, Window, own_seeds

CHECKED: set[Any] = set()  # (mesh, whether the seed was drawn), if all processes were found to have the same seed


def is_dtensor(t: Any) -> bool:
    return any(base.__name__ == "DTensor" for base in type(t).__mro__)


def part_of(name: str, t: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shape of this process's part of a DTensor, and the index of its first element."""
    from torch.distributed.tensor import Shard

    mesh, coordinates = t.device_mesh, t.device_mesh.get_coordinate()
    if coordinates is None:
        raise ValueError(
            f"DTensor: {name} must be on a mesh that this process belongs to; got {mesh}. Call on its processes alone."
        )
    sizes, start = list(t.shape), [0] * t.dim()
    for mesh_dim, (placement, coordinate) in enumerate(zip(t.placements, coordinates, strict=True)):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard:  # Partial, and subclasses of Shard with another order
            raise TypeError(
                f"DTensor: {name} must have the placements Shard and Replicate; got {t.placements}. "
                f"Call {name}.redistribute(placements=...) first."
            )
        dim = placement.dim % t.dim()
        step = -(-sizes[dim] // mesh.size(mesh_dim))
        first = min(coordinate * step, sizes[dim])
        sizes[dim] = min(step, sizes[dim] - first)
        start[dim] += first
    return tuple(sizes), tuple(start)


def local(t: Any, grad_placements: Sequence[Any] | None = None) -> Tensor:
    """Return this process's part of a DTensor, under autograd."""
    part = t.to_local(grad_placements=grad_placements)
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]  # if it is still on its way


def same_layout(name: str, t: Any, other_name: str, other: Any, placements: Sequence[Any]) -> None:
    """Check that a tensor is a DTensor on the mesh of another one, with these placements."""
    if not is_dtensor(t):
        raise TypeError(
            f"DTensor: {name} must be a DTensor, since {other_name} is one; got {type(t).__name__}. "
            "Distribute it with torch.distributed.tensor.distribute_tensor."
        )
    if t.device_mesh != other.device_mesh or tuple(t.placements) != tuple(placements):
        raise ValueError(
            f"DTensor: {name} must lie on the mesh of {other_name} with the placements {tuple(placements)}; "
            f"got {t.placements} on {t.device_mesh}. Call {name}.redistribute first: nothing is moved silently."
        )


def one_seed(where: str, t: Any, seed: Tensor, drawn: bool) -> None:
    """Check that all processes of a mesh have the same seed: once for seeds that are given, once for those drawn."""
    mesh = t.device_mesh
    if (mesh, drawn) in CHECKED or mesh.get_coordinate() is None:
        return
    digest = (seed * (2 * torch.arange(seed.numel(), device=seed.device) + 1)).sum()
    ends = torch.stack((digest, ~digest))  # the maximum of ~digest is that of the smallest digest
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, mesh.get_group(dim))
    if ends[0] != ~ends[1]:
        do = "Call torch.manual_seed with one number on all of them, or pass seed=." if drawn else "Pass one seed."
        raise ValueError(
            f"{where}: the seed must be the same on all processes of the mesh; got different ones. {do} "
            "The place in the whole already gives each process noise of its own."
        )
    CHECKED.add((mesh, drawn))


def window_of_part(
    seed: Tensor, window: Window, whole: tuple[int, ...], shape: tuple[int, ...], start: tuple[int, ...]
) -> tuple[Tensor, Window]:
    """Return the seeds and the window of a part of a tensor, which may lie in a window itself."""
    whole, origin = window if window != NONE else (whole, (0,) * len(whole))
    return own_seeds(seed, shape, (whole, tuple(a + b for a, b in zip(origin, start, strict=True))))


def from_part(part: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """Return the DTensor of this shape, given the contiguous part that this process holds."""
    from torch.distributed.tensor import DTensor

    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)
