"""Counts what the latent layer (z and KL) holds and moves: in plain torch, compiled, and in this package.

A word is an element's size: float32, 4 bytes. Counts are words for each element of mu.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reparam_kernels.profiling import measure, providers
from reparam_kernels.profiling.case import Case

SHAPE = (1024, 256)
Layer = Callable[..., tuple[Tensor, ...]]


class Counted(NamedTuple):
    forward: float  # words read or written for each element
    kept: dict[str, float]  # held from forward to backward, beyond mu and logvar
    backward: float
    peak: float  # the most held at once, beyond mu, logvar and the incoming gradients


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that each op of eager torch reads or writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            reads = () if func.overloadpacket.__name__.endswith("_like") else tensors(args)  # a shape, not the data
            self.bytes += sum(size(t) for t in (*reads, *tensors(out)))
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def size(t: Tensor) -> int:
    """Return the stored bytes of a tensor, which may be expanded."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def kept(layer: Layer, leaves: list[Tensor]) -> list[Tensor]:
    """Return what autograd holds beyond the leaves and the outputs."""
    held: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(*leaves)
    for t in (*leaves, *out):
        held.pop(t.untyped_storage().data_ptr(), None)
    return list(held.values())


def named(t: Tensor, mu: Tensor, logvar: Tensor) -> str:
    """Name a tensor by its value: sigma, sigma^2, or else eps."""
    if t.numel() < mu.numel():
        return "seed"
    for name, known in (("sigma", torch.exp(logvar / 2)), ("sigma²", logvar.exp())):
        if torch.allclose(t, known):
            return name
    return "eps"


def fused_traffic(layer: Layer, leaves: list[Tensor]) -> tuple[int, int]:
    """Count the bytes of a layer with one kernel per pass: each input and each output once."""
    out = layer(*leaves)
    ins, held = sum(map(size, leaves)), sum(map(size, kept(layer, leaves)))
    outs = sum(map(size, out))
    return ins + outs + held, ins + held + outs + ins  # backward: the incoming gradients, then those to the leaves


def eager_traffic(layer: Layer, leaves: list[Tensor]) -> tuple[int, int]:
    with Traffic() as forward:
        out = layer(*leaves)
    grads = [torch.full_like(y, 0.5) for y in out]
    with Traffic() as backward:
        torch.autograd.grad(out, leaves, grads)
    return forward.bytes, backward.bytes


def count(name: str, layer: Layer, shape: tuple[int, int] = SHAPE) -> Counted:
    leaves = Case("reparameterize_kl", shape).leaves()
    word = size(leaves[0])
    both = measure.passes(layer, leaves)["forward+backward"]
    both()  # compiles, if there is something to compile
    moved = (eager_traffic if name == "eager" else fused_traffic)(layer, leaves)
    holds = {named(t, *(x.detach() for x in leaves)): size(t) / word for t in kept(layer, leaves)}
    return Counted(moved[0] / word, holds, moved[1] / word, measure.peak_bytes(both, "cpu") / word)


def compare(compiler: bool = True, shape: tuple[int, int] = SHAPE) -> tuple[dict[str, Counted], str | None]:
    """Count each provider; also return why torch.compile is missing, if it is."""
    case, why = Case("reparameterize_kl", shape), None
    counted = {"eager": count("eager", providers.eager(case), shape)}
    try:
        if not compiler:
            raise RuntimeError("not asked for")
        counted["torch.compile"] = count("torch.compile", providers.compiled(providers.eager(case), False), shape)
    except Exception as error:  # no usable compiler; the error depends on the version of torch
        why = f"torch.compile is left out: {str(error).splitlines()[0]}"
    counted["ours"] = count("ours", providers.ours(case), shape)
    return counted, why
