"""The arguments of the latent op, and the checks that make them from what the user passes."""

import math
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import FLOATS, compute_dtype, dtype_name
from ...core.op import Shape, resolve_neg
from ...core.seeds import make_seed

PARAMS = ("logvar", "logstd", "std", "softplus")


class Config(NamedTuple):
    """The options of a call."""

    z: bool
    kl: bool
    sample_shape: tuple[int, ...]
    event_ndim: int
    param: str
    min_std: float
    clamp: tuple[float, float] | None
    packed: int | None  # the dim along which mu holds mu and x; x is None then


class Arguments(NamedTuple):
    """The validated tensors and options of a call. x is the second argument, which config.param says how to read; the
    prior expands to the shape of mu."""

    mu: Tensor
    x: Tensor | None
    mu_p: Tensor | None
    x_p: Tensor | None
    seed: Tensor | None
    eps: Tensor | None
    config: Config


def unpacked(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return mu and x, as views of the moments if they are packed."""
    if arguments.x is not None:
        return arguments.mu, arguments.x
    mu, x = arguments.mu.chunk(2, arguments.config.packed or 0)
    return mu, x


def expanded_prior(arguments: Arguments, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """Expand the prior to the shape of mu, without a copy."""
    if arguments.mu_p is None or arguments.x_p is None:
        return None, None
    return arguments.mu_p.expand(shape), arguments.x_p.expand(shape)


def empty_prior_gradient(like: Tensor | None, mu: Tensor) -> Tensor:
    """Allocate a gradient to a prior in the shape of mu, in the compute dtype if it is to be summed later."""
    whole = like is not None and like.shape == mu.shape and like.dtype == mu.dtype
    return mu.new_empty(mu.shape, dtype=mu.dtype if whole else compute_dtype(mu.dtype))


def shapes(arguments: Arguments) -> tuple[Shape | None, Shape | None]:
    """Return the shapes and dtypes of z and kl."""
    config, mu = arguments.config, arguments.mu
    dims = list(mu.shape)
    if config.packed is not None:
        dims[config.packed] //= 2
    z = Shape((*config.sample_shape, *dims), mu.dtype) if config.z else None
    kl = Shape(tuple(dims[: len(dims) - config.event_ndim]), compute_dtype(mu.dtype)) if config.kl else None
    return z, kl


def make_arguments(
    where: str,
    mu: Any,
    logvar: Any,
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
) -> Arguments:
    """Check the arguments of a public function, whose name for errors is `where`, and return them as the op takes them.

    packed: mu holds the moments, and logvar is None.
    """
    if seed is not None or generator is not None or eps is not None:
        checks.one_source(where, seed, generator, eps)
    if packed is None:
        mu, logvar, eps, prior = _check_pair(where, mu, logvar, eps, prior)
        shape = mu.shape
    else:
        checks.floating(where, "moments", mu)
        shape = torch.Size((*mu.shape[:packed], mu.shape[packed] // 2, *mu.shape[packed + 1 :]))
    compiling = torch.compiler.is_compiling()
    config = _make_config(compiling, where, len(shape), z, kl, sample_shape, event_ndim, param, min_std, clamp, packed)
    mu_p, x_p = (None, None) if prior is None else _take_prior(where, prior, mu, shape)
    if not z:
        seed = None
    elif eps is None:
        seed = make_seed(where, seed, generator, mu.device, shape[0] if shape else None)
    else:
        eps = _take_eps(where, eps, mu, config.sample_shape + tuple(shape))
    if not compiling and (mu.is_neg() or (logvar is not None and logvar.is_neg())):
        mu, logvar = resolve_neg(mu), None if logvar is None else resolve_neg(logvar)
    return Arguments(mu, logvar, mu_p, x_p, seed, eps, config)


def _check_pair(where: str, mu: Any, logvar: Any, eps: Any, prior: Any) -> tuple[Tensor, Tensor, Any, Any]:
    plain = _is_plain_pair(mu, logvar)
    if not plain:
        checks.floating(where, "mu", mu)
        checks.floating(where, "logvar", logvar)
    if eps is not None or prior is not None or mu.dtype != logvar.dtype:
        mu, logvar, eps, prior = _promote(mu, logvar, eps, prior)
    if not plain:
        checks.like_mu(where, "logvar", logvar, mu)
    return mu, logvar, eps, prior


def _is_plain_pair(mu: Any, logvar: Any) -> bool:
    """Return True in the usual case: two dense float tensors of one dtype, shape and device."""
    return (
        isinstance(mu, Tensor)
        and isinstance(logvar, Tensor)
        and mu.dtype in FLOATS
        and mu.dtype is logvar.dtype
        and mu.shape == logvar.shape
        and mu.device == logvar.device
        and mu.layout is torch.strided
        and logvar.layout is torch.strided
    )


def _promote(mu: Tensor, logvar: Tensor, eps: Any, prior: Any) -> tuple[Tensor, Tensor, Any, Any]:
    """Promote mixed floats to the widest inside autocast; a 0-dim prior is a number, which does not promote."""
    pair = list(prior) if isinstance(prior, (tuple, list)) else []
    promoting = [mu, logvar, eps, *(p for p in pair if isinstance(p, Tensor) and p.dim() > 0)]
    dtypes = {t.dtype for t in promoting if isinstance(t, Tensor) and t.dtype in FLOATS}
    device = mu.device.type
    if len(dtypes) < 2 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return mu, logvar, eps, prior
    dtype = reduce(torch.promote_types, dtypes)
    pair = [p.to(dtype) if isinstance(p, Tensor) and p.dim() > 0 else p for p in pair]
    eps = eps.to(dtype) if isinstance(eps, Tensor) else eps
    return mu.to(dtype), logvar.to(dtype), eps, tuple(pair) if pair else prior


def _make_config(compiling: bool, where: str, ndim: int, z: bool, kl: bool, sample_shape: Any, *options: Any) -> Config:
    event_ndim, param, min_std, clamp, packed = options
    sample_shape = tuple(sample_shape) if isinstance(sample_shape, list) else sample_shape
    clamp = tuple(clamp) if isinstance(clamp, list) else clamp
    symbolic = sample_shape != () and isinstance(sample_shape, tuple) and torch.SymInt in map(type, sample_shape)
    make = _check_config if compiling or symbolic else _cached_config  # torch.compile warns about a cache
    return make(where, ndim, z, kl, sample_shape, event_ndim, param, min_std, clamp, packed)


def _check_config(
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
) -> Config:
    min_std, clamp = check_scale(where, param, min_std, clamp)
    sample_shape = checks.sizes(where, "sample_shape", sample_shape)
    event_ndim = _check_event_ndim(where, event_ndim, ndim) if kl else 0
    return Config(z, kl, sample_shape, event_ndim, param, min_std, clamp, packed)


_cached_config = lru_cache(maxsize=1024)(_check_config)


def _check_event_ndim(where: str, event_ndim: Any, ndim: int) -> int:
    if event_ndim is None:
        return max(ndim - 1, min(ndim, 1))
    do = "Pass how many trailing dims of mu the KL sums over."
    value = checks.integer(where, "event_ndim", event_ndim, do)
    if not 0 <= value <= ndim:
        raise ValueError(f"{where}: event_ndim must lie in [0, {ndim}], the number of dims of mu; got {value}. {do}")
    return value


def check_scale(where: str, param: Any, min_std: Any, clamp: Any) -> tuple[float, tuple[float, float] | None]:
    """Check how the second argument is read; return min_std and clamp as the kernels take them."""
    if param not in PARAMS:
        raise ValueError(
            f"{where}: param must be one of {', '.join(PARAMS)}; got {param!r}. It says how the second argument reads."
        )
    floor = checks.number(where, "min_std", min_std, "Pass a small positive number, as 1e-4.")
    if not 0 <= floor < math.inf:
        raise ValueError(f"{where}: min_std must be finite and not negative; got {floor}. Pass 1e-4, for example.")
    if floor and param != "softplus":
        raise ValueError(
            f'{where}: min_std goes with param="softplus" only; got min_std {floor} with param {param!r}. '
            "Leave min_std out, or use clamp."
        )
    if clamp is None:
        return floor, None
    if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
        raise TypeError(f"{where}: clamp must be a pair (low, high); got {clamp!r}. Pass clamp=(-30.0, 20.0).")
    low, high = (checks.number(where, "each bound of clamp", b, "An infinite one is no bound.") for b in clamp)
    if not low <= high:
        raise ValueError(f"{where}: clamp must have low <= high; got {(low, high)}. Swap or correct the bounds.")
    return floor, (low, high)


def _take_prior(where: str, prior: Any, mu: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the two tensors of the prior, each in its own shape."""
    if not isinstance(prior, (tuple, list)) or len(prior) != 2:
        raise TypeError(
            f"{where}: prior must be None or a pair (mu_p, second_p); got {type(prior).__name__}. "
            "Pass prior=(mu_p, logvar_p)."
        )
    mu_p, x_p = prior
    return _prior_tensor(where, "mu_p", mu_p, mu, shape), _prior_tensor(where, "second_p", x_p, mu, shape)


def _prior_tensor(where: str, name: str, value: Any, mu: Tensor, shape: torch.Size) -> Tensor:
    if not isinstance(value, Tensor):
        number = checks.number(where, name, value, "A prior is two tensors, or Python numbers.")
        if not -math.inf < number < math.inf:
            raise ValueError(f"{where}: {name} must be finite; got {number}. A prior of infinite width has no KL.")
        dtype = compute_dtype(mu.dtype)
        if abs(number) > torch.finfo(dtype).max:
            raise ValueError(f"{where}: {name} must fit {dtype_name(dtype)}; got {number}. Use float64 throughout.")
        return torch.full((), number, dtype=dtype, device=mu.device)
    value = _as_number(value, mu)
    checks.floating(where, name, value)
    if value.dim() > 0:
        checks.like_mu(where, name, value, mu, shape=False)
    else:
        checks.on_device_of_mu(where, name, value, mu)
    checks.expands(where, name, value, shape)
    return resolve_neg(value)


def _as_number(t: Tensor, mu: Tensor) -> Tensor:
    """Treat a 0-dim prior as a number: it moves from the CPU to any device, and its dtype gives way to mu's."""
    if t.dim() > 0 or t.dtype == torch.bool or t.is_complex():
        return t
    if t.device != mu.device and t.device.type == "cpu":
        t = t.to(mu.device)
    return t.to(compute_dtype(mu.dtype)) if t.dtype != mu.dtype else t


def _take_eps(where: str, eps: Any, mu: Tensor, shape: tuple[int, ...]) -> Tensor:
    checks.floating(where, "eps", eps)
    checks.like_mu(where, "eps", eps, mu, shape=False)
    if tuple(eps.shape) != shape:
        raise ValueError(
            f"{where}: eps must have the shape of z, {shape}; got {tuple(eps.shape)}. "
            "It is sample_shape, then the shape of mu."
        )
    return resolve_neg(eps)
