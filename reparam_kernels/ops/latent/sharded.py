"""The latent op on DTensors: each process runs its part, whose noise is that of the whole at its place."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...core import dtensor
from ...core.op import Outputs
from .arguments import Arguments


def shard(arguments: Arguments) -> tuple[Arguments, Callable[[Outputs], Outputs]]:
    """Return the arguments of this process's part, and what makes DTensors of its outputs."""
    from torch.distributed.tensor import Partial, Shard

    mu, x, mu_p, x_p, seed, eps, config = arguments
    name = "mu" if config.packed is None else "moments"
    if not dtensor.is_dtensor(mu):
        raise TypeError(
            f"DTensor: {name} must be a DTensor if a tensor that goes with it is; got {type(mu).__name__}. "
            "Distribute it with torch.distributed.tensor.distribute_tensor."
        )
    mesh, placements, kept = mu.device_mesh, mu.placements, mu.dim() - config.event_ndim  # type: ignore[attr-defined]
    samples = len(config.sample_shape)
    shape, start = dtensor.part_of(name, mu)
    whole = list(mu.shape)
    if config.packed is not None:
        if any(placement.is_shard() and placement.dim % mu.dim() == config.packed for placement in placements):
            raise ValueError(
                f"DTensor: moments must not be sharded in dim {config.packed}, which holds mu and logvar; "
                f"got {placements}. Redistribute them, or shard another dim."
            )
        whole[config.packed] //= 2
        shape = (*shape[: config.packed], whole[config.packed], *shape[config.packed + 1 :])

    def behind_samples(placement: Any) -> Any:
        return Shard(placement.dim % mu.dim() + samples) if placement.is_shard() else placement

    def summed(placement: Any) -> Any:
        return Partial() if placement.is_shard() and placement.dim % mu.dim() >= kept else placement

    def part_of_prior(name: str, p: Tensor | None) -> Tensor | None:
        if p is None or (p.dim() == 0 and not p.requires_grad and not dtensor.is_dtensor(p)):
            return p
        replicated = dtensor.is_dtensor(p) and all(placement.is_replicate() for placement in p.placements)  # type: ignore[attr-defined]
        if not replicated:
            dtensor.same_layout(name, p, "mu", mu, placements)
            if p.shape != mu.shape:
                raise ValueError(
                    f"DTensor: {name} must have the shape of mu if it is sharded; got mu {tuple(mu.shape)}, "
                    f"{name} {tuple(p.shape)}. Replicate it, or expand it."
                )
            return dtensor.local(p)
        dtensor.same_layout(name, p, "mu", mu, p.placements)  # type: ignore[attr-defined]
        # Each process adds to the gradient what comes from its part.
        part = dtensor.local(p, [Partial() if placement.is_shard() else placement for placement in placements])
        for dim in range(-p.dim(), 0):
            if part.shape[dim] != 1:
                part = part.narrow(dim, start[dim], shape[dim])
        return part

    if x is not None:
        dtensor.same_layout("logvar", x, "mu", mu, placements)
    of_samples = [behind_samples(placement) for placement in placements]
    if eps is not None:
        dtensor.same_layout("eps", eps, "mu", mu, of_samples)
    if seed is not None:
        seed, (places, first) = dtensor.window_of_part(seed, config.window, tuple(whole), shape, start)
        config = config._replace(whole=places, start=first)
    part = Arguments(
        dtensor.local(mu),
        None if x is None else dtensor.local(x),
        part_of_prior("mu_p", mu_p),
        part_of_prior("second_p", x_p),
        seed,
        None if eps is None else dtensor.local(eps),
        config,
    )

    def join(outputs: Outputs) -> Outputs:
        z, kl, log_q = outputs
        sample_shape, rows = config.sample_shape, whole[:kept]
        of_rows = [summed(placement) for placement in placements]
        of_log_q = [behind_samples(placement) for placement in of_rows]
        layouts = (of_samples, (*sample_shape, *whole)), (of_rows, rows), (of_log_q, (*sample_shape, *rows))
        return tuple(
            None if t is None else dtensor.from_part(t, mesh, *layout)
            for t, layout in zip((z, kl, log_q), layouts, strict=True)
        )

    return part, join
