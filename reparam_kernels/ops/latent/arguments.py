"""The arguments of the latent op, and the checks that make them from what the user passes."""

import math
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks, dtensor
from ...core import window as windows
from ...core.dtypes import FLOATS, compute_dtype, dtype_name
from ...core.op import resolve_neg
from ...core.seeds import make_seed
from ...core.window import Window

DO_EVENT_NDIM = "Pass how many trailing dims of mu the sum runs over."
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
    log_q: bool = False
    minus_log_p: bool = False  # log_q is the log-ratio log q(z) - log p(z)
    tanh: bool = False  # z = tanh(mu + sigma eps)
    path_derivative: bool = False  # log_q has gradients by way of z alone
    whole: tuple[int, ...] = ()  # the window of mu, as in core/window.py
    start: tuple[int, ...] = ()

    @property
    def window(self) -> Window:
        return self.whole, self.start

    def without_window(self) -> "Config":
        """For what is kept by its options. A window is of one call."""
        return self._replace(whole=(), start=()) if self.whole else self


class Density(NamedTuple):
    """What the user passes for log_q."""

    minus_log_p: bool = False
    squash: Any = None
    path_derivative: Any = False


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


def make_arguments(
    where: str,
    mu: Any,
    logvar: Any,
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
    density: Density | None = None,
    window: Any = None,
) -> Arguments:
    """Check the arguments of a public function, whose name for errors is `where`, and return them as the op takes them.

    packed: mu holds the moments, and logvar is None. density: log_q is asked for.
    """
    if seed is not None or generator is not None or eps is not None:
        checks.one_source(where, seed, generator, eps)
        windows.no_eps(where, window, eps)
    drawn, compiling = seed is None, torch.compiler.is_compiling()
    ndim = -1 if compiling or eps is not None or prior is not None else checks.plain_pair_ndim(mu, logvar)
    shape: Any = None
    if ndim < 0:
        mu, logvar, eps, prior = _check_tensors(where, mu, logvar, eps, prior, packed)
        shape = mu.shape if packed is None else _unpacked_shape(mu, packed)
        ndim = len(shape)
    config = _make_config(
        compiling, where, ndim, z, kl, sample_shape, event_ndim, param, min_std, clamp, packed, density
    )
    mu_p, x_p = (None, None) if prior is None else _take_prior(where, prior, mu, shape)
    if not z:
        seed = None
    elif window is not None:
        dims, samples = tuple(shape or mu.shape), config.sample_shape
        seed, (whole, start) = windows.place(where, seed, generator, mu.device, dims, window, samples)
        config = config._replace(whole=whole, start=start)
    elif eps is None:
        items = None if seed is None or ndim == 0 else (shape or mu.shape)[0]
        seed = make_seed(where, seed, generator, mu.device, items)
    else:
        eps = _take_eps(where, eps, mu, config.sample_shape + tuple(shape))
    if seed is not None and shape is not None and dtensor.is_dtensor(mu) and not compiling:
        dtensor.one_seed(where, mu, seed, drawn)
    return Arguments(mu, logvar, mu_p, x_p, seed, eps, config)


def _check_tensors(
    where: str, mu: Any, logvar: Any, eps: Any, prior: Any, packed: int | None
) -> tuple[Tensor, Tensor | None, Any, Any]:
    """Check mu and logvar, and return the tensors, promoted if autocast mixes them and without lazy negations."""
    if packed is not None:
        checks.floating(where, "moments", mu)
        return resolve_neg(mu), None, eps, prior
    plain = _is_plain_pair(mu, logvar)
    if not plain:
        checks.floating(where, "mu", mu)
        checks.floating(where, "logvar", logvar)
    if eps is not None or prior is not None or mu.dtype != logvar.dtype:
        mu, logvar, eps, prior = _promote(mu, logvar, eps, prior)
    if not plain:
        checks.like_mu(where, "logvar", logvar, mu)
    return resolve_neg(mu), resolve_neg(logvar), eps, prior


def _is_plain_pair(mu: Any, logvar: Any) -> bool:
    """Return True for what plain_pair_ndim takes. A compiled call guards each function that it traced: here, one."""
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


def _unpacked_shape(moments: Tensor, packed: int) -> torch.Size:
    return torch.Size((*moments.shape[:packed], moments.shape[packed] // 2, *moments.shape[packed + 1 :]))


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
    event_ndim, param, min_std, clamp, packed, density = options
    # before the cache, to which True is 1 and an array is no key
    if type(sample_shape) is not tuple or sample_shape:
        sample_shape = checks.sizes(where, "sample_shape", sample_shape)
    if event_ndim is not None and type(event_ndim) is not int:
        event_ndim = _as_event_ndim(where, event_ndim)
    plain_clamp = clamp is None or (type(clamp) is tuple and [*map(type, clamp)] == [float, float])
    if type(param) is not str or type(min_std) is not float or not plain_clamp:
        min_std, clamp = check_scale(where, param, min_std, clamp)
    if density is not None:
        _check_density(where, density)
    given = isinstance(sample_shape, tuple) and sample_shape != ()
    symbolic = given and any(type(n) is torch.SymInt for n in sample_shape)
    make = _check_config if compiling or symbolic else _cached_config  # torch.compile warns about a cache
    return make(where, ndim, z, kl, sample_shape, event_ndim, param, min_std, clamp, packed, density)


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
    density: Density | None,
) -> Config:
    min_std, clamp = check_scale(where, param, min_std, clamp)
    event_ndim = _check_event_ndim(where, event_ndim, ndim) if kl or density is not None else 0
    config = Config(z, kl, sample_shape, event_ndim, param, min_std, clamp, packed)
    if density is None:
        return config
    minus_log_p, squash, path_derivative = density
    return config._replace(
        log_q=True, minus_log_p=minus_log_p, tanh=squash is not None, path_derivative=path_derivative
    )


def _check_density(where: str, density: Density) -> None:
    if density.squash is not None and not (isinstance(density.squash, str) and density.squash == "tanh"):
        raise ValueError(
            f'{where}: squash must be None or "tanh"; got {density.squash!r}. Use a transform of torch for others.'
        )
    if not isinstance(density.path_derivative, bool):
        raise TypeError(
            f"{where}: path_derivative must be True or False; got {density.path_derivative!r}. "
            "True leaves out the gradient of log q to its own parameters."
        )


_cached_config = lru_cache(maxsize=1024)(_check_config)


def _check_event_ndim(where: str, event_ndim: Any, ndim: int) -> int:
    if event_ndim is None:
        return max(ndim - 1, min(ndim, 1))
    value = _as_event_ndim(where, event_ndim)
    if not 0 <= value <= ndim:
        raise ValueError(
            f"{where}: event_ndim must lie in [0, {ndim}], the number of dims of mu; got {value}. {DO_EVENT_NDIM}"
        )
    return value


def _as_event_ndim(where: str, event_ndim: Any) -> int:
    return checks.integer(where, "event_ndim", event_ndim, DO_EVENT_NDIM)


def check_options(where: str, event_ndim: Any, param: Any, min_std: Any, clamp: Any) -> None:
    """Check what does not depend on a tensor, for a module that keeps the options."""
    if event_ndim is not None:
        _as_event_ndim(where, event_ndim)
    check_scale(where, param, min_std, clamp)


def check_scale(where: str, param: Any, min_std: Any, clamp: Any) -> tuple[float, tuple[float, float] | None]:
    """Check how the second argument is read; return min_std and clamp as the kernels take them."""
    if not isinstance(param, str) or param not in PARAMS:
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
    bounds = checks.sequence(clamp)
    if bounds is None or len(bounds) != 2:
        raise TypeError(f"{where}: clamp must be a pair (low, high); got {clamp!r}. Pass clamp=(-30.0, 20.0).")
    low, high = (checks.number(where, "each bound of clamp", b, "An infinite one is no bound.") for b in bounds)
    if not low <= high:
        raise ValueError(f"{where}: clamp must have low <= high; got {(low, high)}. Swap or correct the bounds.")
    return floor, (low, high)


def _take_prior(where: str, prior: Any, mu: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the two tensors of the prior, each in its own shape."""
    if not isinstance(prior, (tuple, list)) or len(prior) != 2:
        raise TypeError(
            f"{where}: prior must be None, a pair (mu_p, second_p), a DiagonalGaussian or a Normal; "
            f"got {type(prior).__name__}. Pass prior=(mu_p, logvar_p)."
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
