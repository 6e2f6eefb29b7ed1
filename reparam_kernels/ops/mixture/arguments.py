"""The arguments of the mixture op, and the checks that make them from what the user passes."""

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import FLOATS, compute_dtype, dtype_name
from ...core.op import Shape, resolve_neg
from ..latent.arguments import check_scale

OF = ("joint", "dims", "both")


class Config(NamedTuple):
    """The options of a call."""

    of: str
    param: str
    min_std: float
    clamp: tuple[float, float] | None


class Arguments(NamedTuple):
    """The validated tensors and options of a call. x is the second argument, which config.param says how to read.

    The saved sums hold, for each element of their output, the largest term and log2 of the sum of the terms divided by
    it. All of a term's logarithms are in base 2.
    """

    z: Tensor  # [*batch, *event]
    mu: Tensor  # [N, *event]
    x: Tensor  # [N, *event]
    log_weights: Tensor | None  # [], [N] or [*batch, N]; None: -log N
    joint_sums: Tensor | None  # [2, *batch]
    dims_sums: Tensor | None  # [2, *batch, *event]
    config: Config


def batch_of(arguments: Arguments) -> torch.Size:
    return arguments.z.shape[: arguments.z.dim() - arguments.mu.dim() + 1]


def weights_by_component(arguments: Arguments) -> Tensor | None:
    """Expand one weight for all components to one weight for each."""
    weights = arguments.log_weights
    return weights.expand(arguments.mu.shape[0]) if weights is not None and weights.dim() == 0 else weights


def shapes(arguments: Arguments) -> tuple[Shape | None, ...]:
    """Return the shapes and dtypes of joint and dims, and of the sums that backward needs."""
    of, dtype, batch = arguments.config.of, compute_dtype(arguments.z.dtype), tuple(batch_of(arguments))
    joint = Shape(batch, dtype) if of != "dims" else None
    dims = Shape(tuple(arguments.z.shape), dtype) if of != "joint" else None
    return joint, dims, *(None if s is None else Shape((2, *s.sizes), dtype) for s in (joint, dims))


def empty_outputs(
    arguments: Arguments, saving: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Allocate joint and dims, and, if `saving`, the sums that backward needs."""
    joint, dims, joint_sums, dims_sums = (
        None if s is None or (i >= 2 and not saving) else arguments.z.new_empty(s.sizes, dtype=s.dtype)
        for i, s in enumerate(shapes(arguments))
    )
    return joint, dims, joint_sums, dims_sums


def make_arguments(
    where: str,
    z: Any,
    mu: Any,
    logvar: Any,
    *,
    log_weights: Any = None,
    of: Any = "joint",
    event_ndim: Any = None,
    param: Any = "logvar",
    min_std: Any = 0.0,
    clamp: Any = None,
) -> Arguments:
    """Check the arguments of the public function, whose name for errors is `where`, and return them as the op does."""
    for name, t in (("z", z), ("mu", mu), ("logvar", logvar)):
        checks.floating(where, name, t)
    if isinstance(log_weights, Tensor):
        checks.floating(where, "log_weights", log_weights)
    z, mu, logvar, log_weights = _promote(z, mu, logvar, log_weights)
    checks.like_mu(where, "logvar", logvar, mu)
    checks.like_mu(where, "z", z, mu, shape=False)
    event = _check_event(where, z, mu, event_ndim)
    if not isinstance(of, str) or of not in OF:
        raise ValueError(
            f"{where}: of must be one of {', '.join(OF)}; got {of!r}. "
            "It says whether the density is that of a whole event, of each of its dims, or both."
        )
    min_std, clamp = check_scale(where, param, min_std, tuple(clamp) if isinstance(clamp, list) else clamp)
    weights = _take_weights(where, log_weights, z, mu, z.shape[: z.dim() - event])
    z, mu, logvar = resolve_neg(z), resolve_neg(mu), resolve_neg(logvar)
    return Arguments(z, mu, logvar, weights, None, None, Config(of, param, min_std, clamp))


def _promote(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Promote mixed floats to the widest inside autocast. The weights follow what they weigh."""
    dtypes = {t.dtype for t in (z, mu, logvar) if t.dtype in FLOATS}
    device = mu.device.type
    if len(dtypes) > 1 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = reduce(torch.promote_types, dtypes)
        z, mu, logvar = z.to(dtype), mu.to(dtype), logvar.to(dtype)
    return z, mu, logvar, log_weights


def _check_event(where: str, z: Tensor, mu: Tensor, event_ndim: Any) -> int:
    """Return the number of dims of an event."""
    if mu.dim() == 0 or mu.shape[0] == 0:
        raise ValueError(
            f"{where}: mu must have a leading dim of at least one component; got shape {tuple(mu.shape)}. "
            "Pass mu of shape (N, *event)."
        )
    ndim = mu.dim() - 1
    if event_ndim is not None:
        do = "Leave it out, or give mu the shape (N, *event)."
        value = checks.integer(where, "event_ndim", event_ndim, do)
        if value != ndim:
            raise ValueError(f"{where}: event_ndim must be {ndim}, the dims of mu after the first; got {value}. {do}")
    if z.shape[max(z.dim() - ndim, 0) :] != mu.shape[1:]:
        raise ValueError(
            f"{where}: z must end with the event of mu, {tuple(mu.shape[1:])}; got z {tuple(z.shape)}, "
            f"mu {tuple(mu.shape)}. Reshape one of them to (*batch, *event) and (N, *event)."
        )
    return ndim


def _take_weights(where: str, log_weights: Any, z: Tensor, mu: Tensor, batch: torch.Size) -> Tensor | None:
    if log_weights is None:
        return None
    dtype = compute_dtype(mu.dtype)
    if not isinstance(log_weights, Tensor):
        number = checks.number(where, "log_weights", log_weights, "Pass a number, or a tensor of N log-weights.")
        return torch.full((), number, dtype=dtype, device=mu.device)
    checks.on_device_of_mu(where, "log_weights", log_weights, mu)
    if log_weights.dtype not in (mu.dtype, dtype):
        names = " or ".join(dict.fromkeys((dtype_name(mu.dtype), dtype_name(dtype))))
        raise TypeError(
            f"{where}: log_weights must be {names}, as mu or as the result; got {dtype_name(log_weights.dtype)}. "
            "Convert them with .to()."
        )
    n = mu.shape[0]
    if log_weights.dim() > 0 and log_weights.shape not in ((n,), (*batch, n)):
        expected = f"({n},)" + (f" or {(*batch, n)}" if batch else "")
        raise ValueError(
            f"{where}: log_weights must have shape {expected}, one for each component; got {tuple(log_weights.shape)}. "
            "Expand or transpose them before the call."
        )
    return resolve_neg(log_weights)
