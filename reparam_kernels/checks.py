"""Errors by one template, `where: what must hold; got what. Do this.`, and the checks that raise them."""

import math
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PARAMS = ("logvar", "logstd", "std", "softplus")


def fail(kind: type[Exception], where: str, must: str, got: str, do: str) -> NoReturn:
    raise kind(f"{where}: {must}; got {got}. {do}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def floating(where: str, name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        fail(
            TypeError,
            where,
            f"{name} must be a torch.Tensor",
            type(t).__name__,
            "Wrap it with torch.as_tensor.",
        )
    if t.dtype not in FLOATS:
        fail(
            TypeError,
            where,
            f"{name} must be float16, bfloat16, float32 or float64",
            name_of(t.dtype),
            f"Convert it, for example with {name}.float().",
        )
    if t.layout is not torch.strided:
        fail(
            TypeError,
            where,
            f"{name} must be a dense (strided) tensor",
            str(t.layout),
            f"Convert it with {name}.to_dense().",
        )


def on_device_of_mu(where: str, name: str, t: Tensor, mu: Tensor) -> None:
    if t.device != mu.device:
        fail(
            ValueError,
            where,
            f"{name} must be on the device of mu",
            f"mu {mu.device}, {name} {t.device}",
            "Move one of them with .to().",
        )


def like_mu(where: str, name: str, t: Tensor, mu: Tensor, shape: bool = True) -> None:
    """`t` goes with mu: one device, one dtype and, unless it may expand, one shape."""
    on_device_of_mu(where, name, t, mu)
    if t.dtype != mu.dtype:
        fail(
            TypeError,
            where,
            f"{name} must have the dtype of mu",
            f"mu {name_of(mu.dtype)}, {name} {name_of(t.dtype)}",
            "Convert one of them with .to(), or call inside torch.autocast, where they promote to the widest.",
        )
    if shape and t.shape != mu.shape:
        fail(
            ValueError,
            where,
            f"{name} must have the shape of mu",
            f"mu {tuple(mu.shape)}, {name} {tuple(t.shape)}",
            f"Check the encoder's last layer, or expand {name} before the call.",
        )


def expands(where: str, name: str, t: Tensor, shape: Sequence[int]) -> None:
    sizes = zip(reversed(t.shape), reversed(shape), strict=False)
    if t.dim() > len(shape) or any(a not in (1, b) for a, b in sizes):
        fail(
            ValueError,
            where,
            f"{name} must expand to the shape of mu",
            f"mu {tuple(shape)}, {name} {tuple(t.shape)}",
            "Give it size 1 in the dims along which it is shared.",
        )


def integer(where: str, name: str, value: Any, do: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    fail(TypeError, where, f"{name} must be an int", type(value).__name__, do)


def number(where: str, name: str, value: Any, do: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(TypeError, where, f"{name} must be a number", type(value).__name__, do)
    return float(value)


def seed_in_range(where: str, seed: Any) -> int:
    do = "Pass an int in [0, 2**63), or an int64 tensor on mu's device."
    value = integer(where, "seed", seed, do)
    if not 0 <= value < 2**63:
        fail(ValueError, where, "seed must lie in [0, 2**63)", str(value), "Reduce it, for example modulo 2**63.")
    return value


def seed_tensor(where: str, seed: Tensor, device: torch.device, items: int | None) -> None:
    if seed.dtype != torch.int64:
        fail(
            TypeError,
            where,
            "a seed tensor must be int64",
            name_of(seed.dtype),
            "Convert it with .to(torch.int64).",
        )
    if seed.device != device:
        fail(
            ValueError,
            where,
            "a seed tensor must be on the device of the call",
            f"{seed.device}, not {device}",
            "Move it with .to().",
        )
    if seed.numel() != 1 and (seed.dim() != 1 or seed.numel() != items):
        per_item = "" if items is None else f", or shape ({items},), one for each leading item"
        fail(
            ValueError,
            where,
            f"a seed tensor must have one element{per_item}",
            f"shape {tuple(seed.shape)}",
            "Give one seed for the call, or one for each item of the leading dim.",
        )


def one_source(where: str, seed: Any, generator: Any, eps: Any) -> None:
    given = {"seed": seed, "generator": generator, "eps": eps}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        fail(
            ValueError,
            where,
            "at most one of seed, generator and eps may be given",
            " and ".join(names),
            "Keep the one that should decide the noise.",
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        fail(
            TypeError,
            where,
            "generator must be a torch.Generator",
            type(generator).__name__,
            "Make one with torch.Generator(device).manual_seed(0), or pass seed=.",
        )


def eps_shape(where: str, eps: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(eps.shape) != shape:
        fail(
            ValueError,
            where,
            f"eps must have the shape of z, {shape}",
            str(tuple(eps.shape)),
            "It is sample_shape, then the shape of mu.",
        )


def sizes(where: str, name: str, value: Any) -> tuple[int, ...]:
    do = f"Pass {name}=(5,), for example."
    if not isinstance(value, (tuple, list)):
        fail(TypeError, where, f"{name} must be a tuple of ints", type(value).__name__, do)
    out = tuple(integer(where, f"each of {name}", size, do) for size in value)
    if any(size < 0 for size in out):
        fail(ValueError, where, f"{name} must not be negative", str(out), do)
    return out


def event_dims(where: str, event_ndim: Any, ndim: int) -> int:
    if event_ndim is None:
        return max(ndim - 1, min(ndim, 1))
    value = integer(where, "event_ndim", event_ndim, "Pass how many trailing dims of mu the KL sums over.")
    if not 0 <= value <= ndim:
        fail(
            ValueError,
            where,
            f"event_ndim must lie in [0, {ndim}], the number of dims of mu",
            str(value),
            "Pass how many trailing dims of mu the KL sums over.",
        )
    return value


def scale(where: str, param: Any, min_std: Any, clamp: Any) -> tuple[float, tuple[float, float] | None]:
    """min_std and clamp in the form that the kernels read, param being one of PARAMS."""
    if param not in PARAMS:
        fail(
            ValueError,
            where,
            f"param must be one of {', '.join(PARAMS)}",
            repr(param),
            "It says how the second argument reads.",
        )
    floor = number(where, "min_std", min_std, "Pass a small positive number, as 1e-4.")
    if not 0 <= floor < math.inf:
        fail(ValueError, where, "min_std must be finite and not negative", str(floor), "Pass 1e-4, for example.")
    if floor and param != "softplus":
        fail(
            ValueError,
            where,
            'min_std goes with param="softplus" only',
            f"min_std {floor} with param {param!r}",
            "Leave min_std out, or use clamp.",
        )
    if clamp is None:
        return floor, None
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        fail(TypeError, where, "clamp must be a pair (low, high)", repr(clamp), "Pass clamp=(-30.0, 20.0).")
    low, high = (number(where, "each bound of clamp", b, "An infinite one is no bound.") for b in clamp)
    if not low <= high:
        fail(ValueError, where, "clamp must have low <= high", str((low, high)), "Swap or correct the bounds.")
    return floor, (low, high)


def prior_pair(where: str, prior: Any) -> tuple[Any, Any]:
    if not isinstance(prior, (tuple, list)) or len(prior) != 2:
        fail(
            TypeError,
            where,
            "prior must be None or a pair (mu_p, second_p)",
            type(prior).__name__,
            "Pass prior=(mu_p, logvar_p).",
        )
    return prior[0], prior[1]


def prior_number(where: str, name: str, value: Any) -> float:
    out = number(where, name, value, "A prior is two tensors, or Python numbers.")
    if not -math.inf < out < math.inf:
        fail(ValueError, where, f"{name} must be finite", str(out), "A prior of infinite width has no KL.")
    return out
