"""The checks that ops share. Each error reads `where: what must hold; got what. Do this.`"""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import extension
from .dtypes import FLOATS, dtype_name


def _unknown_pair(mu: Any, x: Any) -> int:
    return -1


# plain_pair_ndim(mu, x) returns the number of dims of two plain, dense tensors of one float dtype, shape and device,
# or -1 for anything else, which the checks below then read one by one.
plain_pair_ndim = _unknown_pair if isinstance(extension.LOADED, str) else extension.LOADED.plain_pair_ndim


def floating(where: str, name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor; got {type(t).__name__}. {instead_of_tensor(t)}")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{where}: {name} must be float16, bfloat16, float32 or float64; got {dtype_name(t.dtype)}. "
            f"Convert it, for example with {name}.float()."
        )
    if t.layout is not torch.strided:
        raise TypeError(
            f"{where}: {name} must be a dense (strided) tensor; got {t.layout}. Convert it with {name}.to_dense()."
        )


def instead_of_tensor(value: Any) -> str:
    """Return what to do about a value that should be a tensor."""
    if isinstance(value, torch.fx.Proxy):
        return "torch.fx.symbolic_trace cannot see into this call: mark it with torch.fx.wrap, or use torch.export."
    if isinstance(value, torch.distributions.Distribution) or hasattr(value, "kl"):
        return "For two distributions call torch.distributions.kl_divergence(q, p)."
    return "Wrap it with torch.as_tensor."


def float_dtype(where: str, dtype: Any) -> None:
    if dtype is not None and dtype not in FLOATS:
        got = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise TypeError(
            f"{where}: dtype must be float16, bfloat16, float32 or float64; got {got}. Pass dtype=torch.float32."
        )


def some_size(where: str, size: tuple[Any, ...]) -> None:
    if not size:
        raise TypeError(f"{where}: size must be ints or one tuple of ints; got nothing. Pass (2, 3), for example.")


def on_device_of_mu(where: str, name: str, t: Tensor, mu: Tensor) -> None:
    if t.device != mu.device:
        raise ValueError(
            f"{where}: {name} must be on the device of mu; got mu {mu.device}, {name} {t.device}. "
            "Move one of them with .to()."
        )


def like_mu(where: str, name: str, t: Tensor, mu: Tensor, shape: bool = True) -> None:
    """Check that `t` has the device, the dtype and, if `shape`, the shape of mu."""
    on_device_of_mu(where, name, t, mu)
    if t.dtype != mu.dtype:
        raise TypeError(
            f"{where}: {name} must have the dtype of mu; got mu {dtype_name(mu.dtype)}, {name} {dtype_name(t.dtype)}. "
            "Convert one of them with .to(), or call inside torch.autocast, where they promote to the widest."
        )
    if shape and t.shape != mu.shape:
        raise ValueError(
            f"{where}: {name} must have the shape of mu; got mu {tuple(mu.shape)}, {name} {tuple(t.shape)}. "
            f"Check the encoder's last layer, or expand {name} before the call."
        )


def expands(where: str, name: str, t: Tensor, shape: Sequence[int]) -> None:
    pairs = zip(reversed(t.shape), reversed(shape), strict=False)
    if t.dim() > len(shape) or any(own not in (1, size) for own, size in pairs):
        raise ValueError(
            f"{where}: {name} must expand to the shape of mu; got mu {tuple(shape)}, {name} {tuple(t.shape)}. "
            "Give it size 1 in the dims along which it is shared."
        )


def integer(where: str, name: str, value: Any, do: str) -> int:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{where}: {name} must be an int; got {type(value).__name__}. {do}")


def number(where: str, name: str, value: Any, do: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):  # a number of numpy is one of these too
        raise TypeError(f"{where}: {name} must be a number; got {type(value).__name__}. {do}")
    return float(value)


def sequence(value: Any) -> tuple[Any, ...] | None:
    """Return the items of a tuple, a list, an array of numpy or another ordered sequence; None for anything else."""
    if isinstance(value, (tuple, list)):
        return tuple(value)
    ordered = isinstance(value, Sequence) or hasattr(value, "__array__")
    if not ordered or isinstance(value, (str, bytes, Tensor)) or getattr(value, "shape", None) == ():
        return None
    return tuple(value)


def sizes(where: str, name: str, value: Any, do: str | None = None) -> tuple[int, ...]:
    do = f"Pass {name}=(5,), for example." if do is None else do
    items = sequence(value)
    if items is None:
        raise TypeError(f"{where}: {name} must be a tuple of ints; got {type(value).__name__}. {do}")
    checked = tuple(integer(where, f"each of {name}", size, do) for size in items)
    if any(size < 0 for size in checked):
        raise ValueError(f"{where}: {name} must not be negative; got {checked}. {do}")
    return checked


def seed_in_range(where: str, seed: Any) -> int:
    value = integer(where, "seed", seed, "Pass an int in [-2**63, 2**64), or an int64 tensor on mu's device.")
    if not -(2**63) <= value < 2**64:
        raise ValueError(
            f"{where}: seed must lie in [-2**63, 2**64); got {value}. Reduce it, for example modulo 2**64."
        )
    return value


def seed_tensor(where: str, seed: Tensor, device: torch.device, items: int | None) -> None:
    if seed.dtype != torch.int64:
        raise TypeError(
            f"{where}: a seed tensor must be int64; got {dtype_name(seed.dtype)}. Convert it with .to(torch.int64)."
        )
    if seed.device != device:
        raise ValueError(
            f"{where}: a seed tensor must be on the device of the call; got {seed.device}, not {device}. "
            "Move it with .to()."
        )
    if seed.numel() != 1 and (seed.dim() != 1 or seed.numel() != items):
        per_item = "" if items is None else f", or shape ({items},), one for each leading item"
        raise ValueError(
            f"{where}: a seed tensor must have one element{per_item}; got shape {tuple(seed.shape)}. "
            "Give one seed for the call, or one for each item of the leading dim."
        )


def one_source(where: str, seed: Any, generator: Any, eps: Any) -> None:
    given = {"seed": seed, "generator": generator, "eps": eps}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1 and not isinstance(generator, torch.fx.Proxy):
        raise ValueError(
            f"{where}: at most one of seed, generator and eps may be given; got {' and '.join(names)}. "
            "Keep the one that should decide the noise."
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        if isinstance(generator, torch.fx.Proxy):
            raise TypeError(f"{where}: generator must be a torch.Generator; got Proxy. {instead_of_tensor(generator)}")
        raise TypeError(
            f"{where}: generator must be a torch.Generator; got {type(generator).__name__}. "
            "Make one with torch.Generator(device).manual_seed(0), or pass seed=."
        )
