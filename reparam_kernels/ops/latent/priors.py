"""Distributions as priors: their parameters, in the parameterisation of the posterior."""

from typing import Any

from torch import Tensor, distributions

from ...core.dtypes import compute_dtype
from .arguments import PARAMS
from .formula import log_sigma, sigma_of


def as_pair(where: str, prior: Any, param: str, min_std: float) -> Any:
    """Return (mu_p, second_p) of a distribution, and anything else as it is."""
    if prior is None or type(prior) is tuple:
        return prior
    if isinstance(prior, distributions.Normal):
        return prior.loc, converted(where, prior.scale, ("std", 0.0), (param, min_std))
    pair = getattr(prior, "_pair", None)  # of a DiagonalGaussian, which imports this module
    return prior if pair is None else pair(where, param, min_std)


def converted(where: str, x: Tensor, given: tuple[str, float], asked: tuple[str, float]) -> Tensor:
    """Convert a second argument from one (param, min_std) to another. The result is rounded once, to its dtype."""
    param = asked[0]
    if given == asked or param not in PARAMS:  # a wrong param has an error of its own
        return x
    if param == "softplus":  # which has no value for a sigma below min_std
        raise ValueError(
            f"{where}: a prior for a posterior with param softplus must have its param and min_std, {asked}; "
            f"got {given}. Give both distributions the same parameterisation."
        )
    wide = x.to(compute_dtype(x.dtype))
    scale = 2 if param == "logvar" else 1
    second = sigma_of(wide, *given) if param == "std" else scale * log_sigma(wide, *given)
    return second if x.dim() == 0 else second.to(x.dtype)
