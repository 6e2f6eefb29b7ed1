"""One call, checked and put in order: what is asked (Spec) and of which tensors (Call)."""

from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks


class Spec(NamedTuple):
    """What is asked of a call, besides its tensors."""

    z: bool
    kl: bool
    sample_shape: tuple[int, ...]
    event_ndim: int
    param: str
    min_std: float
    clamp: tuple[float, float] | None
    packed: int | None  # the dim along which mu holds mu and x; x is None then


class Call(NamedTuple):
    """A call ready to run. x is the second argument, read as spec.param says; the prior expands to the shape of mu."""

    mu: Tensor
    x: Tensor | None
    mu_p: Tensor | None
    x_p: Tensor | None
    seed: Tensor | None
    eps: Tensor | None
    spec: Spec


def unpacked(call: Call) -> tuple[Tensor, Tensor]:
    """mu and x, as views of the moments where they come packed."""
    if call.x is not None:
        return call.mu, call.x
    mu, x = call.mu.chunk(2, call.spec.packed or 0)
    return mu, x


def expanded_prior(call: Call, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """The prior in the shape of mu, without a copy."""
    if call.mu_p is None or call.x_p is None:
        return None, None
    return call.mu_p.expand(shape), call.x_p.expand(shape)


def prior_gradient(like: Tensor | None, mu: Tensor) -> Tensor:
    """An empty gradient to a prior in the shape of mu: in its dtype, or wide if it is yet to be summed."""
    whole = like is not None and like.shape == mu.shape and like.dtype == mu.dtype
    return mu.new_empty(mu.shape, dtype=mu.dtype if whole else accumulate_dtype(mu.dtype))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, and of the KL."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked_spec(
    where: str,
    ndim: int,
    z: bool,
    kl: bool,
    sample_shape: Any,
    event_ndim: Any,
    param: Any,
    min_std: Any,
    clamp: Any,
    packed: int | None,
) -> Spec:
    min_std, clamp = checks.scale(where, param, min_std, clamp)
    sample_shape = checks.sizes(where, "sample_shape", sample_shape)
    event_ndim = checks.event_dims(where, event_ndim, ndim) if kl else 0
    return Spec(z, kl, sample_shape, event_ndim, param, min_std, clamp, packed)


_known_spec = lru_cache(maxsize=1024)(checked_spec)


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """One random seed, the only draw of a call; no host synchronisation."""
    if generator is not None:
        return torch.randint(2**63 - 1, (1,), device=generator.device, generator=generator).to(device)
    if torch.compiler.is_compiling():  # by this signature torch.compile draws what eager draws
        return torch.randint(2**63 - 1, (1,), device=device, generator=None)
    return torch.randint(2**63 - 1, (1,), device=device)


def take_seed(
    where: str, seed: Any, generator: torch.Generator | None, device: torch.device, items: int | None
) -> Tensor:
    """The call's seed as an int64 tensor: drawn, or the user's."""
    if seed is None:
        return draw_seed(device, generator)
    if isinstance(seed, Tensor):
        checks.seed_tensor(where, seed, device, items)
        return seed.reshape(-1).contiguous()
    return torch.full((1,), checks.seed_in_range(where, seed), dtype=torch.int64, device=device)


def _promote(mu: Tensor, x: Tensor, eps: Any, prior: Any) -> tuple[Tensor, Tensor, Any, Any]:
    """Inside autocast, mixed floats promote to the widest; a 0-dim prior is a number, which does not promote."""
    pair = list(prior) if isinstance(prior, (tuple, list)) else []
    promoting = [t for t in (mu, x, eps, *pair) if isinstance(t, Tensor) and (t.dim() > 0 or mu.dim() == 0)]
    dtypes = {t.dtype for t in promoting if t.dtype in checks.FLOATS}
    if len(dtypes) < 2 or not torch.is_autocast_enabled(mu.device.type):
        return mu, x, eps, prior
    dtype = reduce(torch.promote_types, dtypes)
    pair = [t.to(dtype) if isinstance(t, Tensor) and (t.dim() > 0 or mu.dim() == 0) else t for t in pair]
    return mu.to(dtype), x.to(dtype), eps.to(dtype) if isinstance(eps, Tensor) else eps, tuple(pair) if pair else prior


def _take_prior(where: str, prior: Any, mu: Tensor, shape: torch.Size) -> list[Tensor]:
    """The prior's two tensors, each in its own shape."""
    out = []
    for name, value in zip(("mu_p", "second_p"), checks.prior_pair(where, prior), strict=True):
        if isinstance(value, Tensor):
            value = _as_number(value, mu, shape)
            checks.floating(where, name, value)
            if value.dim() > 0 or len(shape) == 0:
                checks.like_mu(where, name, value, mu, shape=False)
            else:
                checks.on_device_of_mu(where, name, value, mu)
            checks.expands(where, name, value, shape)
        else:
            number = checks.prior_number(where, name, value)
            value = torch.full((), number, dtype=accumulate_dtype(mu.dtype), device=mu.device)
        out.append(positive(value))
    return out


def _as_number(t: Tensor, mu: Tensor, shape: torch.Size) -> Tensor:
    """A 0-dim prior as torch's arithmetic takes it: from the CPU to any device, its dtype giving way to that of mu."""
    if t.dim() > 0 or t.dtype == torch.bool or t.is_complex():
        return t
    if t.device != mu.device and t.device.type == "cpu":
        t = t.to(mu.device)
    return t.to(accumulate_dtype(mu.dtype)) if len(shape) > 0 and t.dtype != mu.dtype else t


def positive(t: Tensor) -> Tensor:
    """Not a view whose memory holds the opposite sign; under torch.compile there are none."""
    return t if torch.compiler.is_compiling() or not t.is_neg() else t.resolve_neg()


def prepare(
    where: str,
    mu: Any,
    x: Any,
    *,
    z: bool = False,
    kl: bool = False,
    seed: Any = None,
    generator: Any = None,
    eps: Any = None,
    sample_shape: Any = (),
    event_ndim: Any = None,
    prior: Any = None,
    param: Any = "logvar",
    min_std: Any = 0.0,
    clamp: Any = None,
    packed: int | None = None,
) -> Call:
    """Checks the arguments of a public function and puts them in order; `where` is its name, for errors."""
    if seed is not None or generator is not None or eps is not None:
        checks.one_source(where, seed, generator, eps)
    if packed is None:
        if not alike(mu, x):
            checks.floating(where, "mu", mu)
            checks.floating(where, "logvar", x)
        if eps is not None or prior is not None or mu.dtype != x.dtype:
            mu, x, eps, prior = _promote(mu, x, eps, prior)
        if not alike(mu, x):
            checks.like_mu(where, "logvar", x, mu)
        shape = mu.shape
    else:
        checks.floating(where, "moments", mu)
        shape = torch.Size((*mu.shape[:packed], mu.shape[packed] // 2, *mu.shape[packed + 1 :]))
    if isinstance(clamp, list):
        clamp = tuple(clamp)
    if isinstance(sample_shape, list):
        sample_shape = tuple(sample_shape)
    compiling = torch.compiler.is_compiling()
    make = checked_spec if compiling else _known_spec  # torch.compile warns of a cache
    spec = make(where, len(shape), z, kl, sample_shape, event_ndim, param, min_std, clamp, packed)
    mu_p = x_p = None
    if prior is not None:
        mu_p, x_p = _take_prior(where, prior, mu, shape)
    if not z:
        seed = None
    elif eps is None:
        seed = take_seed(where, seed, generator, mu.device, shape[0] if shape else None)
    else:
        checks.floating(where, "eps", eps)
        checks.like_mu(where, "eps", eps, mu, shape=False)
        checks.eps_shape(where, eps, spec.sample_shape + tuple(shape))
        eps = positive(eps)
    if not compiling and (mu.is_neg() or (x is not None and x.is_neg())):
        mu, x = positive(mu), None if x is None else positive(x)
    return Call(mu, x, mu_p, x_p, seed, eps, spec)


def alike(mu: Any, x: Any) -> bool:
    """The usual case, told at once: two dense float tensors of one dtype, shape and device."""
    return (
        isinstance(mu, Tensor)
        and isinstance(x, Tensor)
        and mu.dtype in checks.FLOATS
        and mu.dtype is x.dtype
        and mu.shape == x.shape
        and mu.device == x.device
        and mu.layout is torch.strided
        and x.layout is torch.strided
    )
