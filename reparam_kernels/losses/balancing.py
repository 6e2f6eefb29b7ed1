"""The KL with one weight for the prior's gradient and another for the posterior's."""

from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from ..ops.latent import Prior, kl_divergence
from ..ops.latent.priors import as_pair


class BalancedKL(NamedTuple):
    """What rk.losses.balanced_kl gives with return_parts=True: the loss, and what DreamerV2 and DreamerV3 log."""

    loss: Tensor
    value: Tensor
    dyn: Tensor
    rep: Tensor


@overload
def balanced_kl(
    mu: Tensor,
    logvar: Tensor,
    prior: Prior,
    *,
    to_prior: float = 0.8,
    to_posterior: float = 0.2,
    floor: float = 0.0,
    return_parts: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def balanced_kl(
    mu: Tensor,
    logvar: Tensor,
    prior: Prior,
    *,
    to_prior: float = 0.8,
    to_posterior: float = 0.2,
    floor: float = 0.0,
    return_parts: Literal[True],
    **options: Any,
) -> BalancedKL: ...


def balanced_kl(
    mu: Tensor,
    logvar: Tensor,
    prior: Prior,
    *,
    to_prior: float = 0.8,
    to_posterior: float = 0.2,
    floor: float = 0.0,
    return_parts: bool = False,
    **options: Any,
) -> Tensor | BalancedKL:
    """Compute KL(q || p) with one weight for the gradient to the prior and another for that to the posterior.

        kl = to_prior dyn + to_posterior rep,  dyn = max(floor, KL(sg(q) || p)),  rep = max(floor, KL(q || sg(p)))

    Args:
        mu, logvar, prior: as for rk.kl_divergence.
        to_prior, to_posterior: the weights, 0.8 and 0.2 in DreamerV2. DreamerV3 uses other weights and floor=1.
        floor: free nats for each value, before any mean.
        return_parts: True returns the parts of the loss too, for a log.
        options: event_ndim, param, min_std, clamp, as for rk.kl_divergence.

    Returns:
        kl, of the shape that rk.kl_divergence gives. With return_parts, a named tuple (loss, value, dyn, rep), each of
        that shape: loss is kl; value is KL(q || p) without floor, weights and gradient; dyn has a gradient to the prior
        alone, and rep to the posterior alone.

    Raises:
        TypeError, ValueError: as rk.kl_divergence.

    Source:
        Hafner, Lillicrap, Norouzi, Ba, "Mastering Atari with Discrete World Models", 2021 (DreamerV2);
        Hafner, Pasukonis, Ba, Lillicrap, "Mastering Diverse Domains through World Models", 2023 (DreamerV3).

    Example:
        >>> import torch, reparam_kernels as rk
        >>> mu, logvar, prior = torch.ones(2, 3), torch.zeros(2, 3), (torch.zeros(3), torch.zeros(3))
        >>> rk.losses.balanced_kl(mu, logvar, prior)
        tensor([1.5000, 1.5000])
        >>> parts = rk.losses.balanced_kl(mu, logvar, prior, floor=2.0, return_parts=True)
        >>> parts.loss, parts.value, parts.dyn
        (tensor([2., 2.]), tensor([1.5000, 1.5000]), tensor([2., 2.]))
    """
    pair = as_pair("balanced_kl", prior, options.get("param", "logvar"), options.get("min_std", 0.0))
    held = tuple(t.detach() if isinstance(t, Tensor) else t for t in pair)
    prior_side = kl_divergence(mu.detach(), logvar.detach(), prior=pair, **options)
    posterior_side = kl_divergence(mu, logvar, prior=held, **options)  # type: ignore[arg-type]
    dyn, rep = prior_side.clamp(min=floor), posterior_side.clamp(min=floor)
    loss = to_prior * dyn + to_posterior * rep
    return BalancedKL(loss, posterior_side.detach(), dyn, rep) if return_parts else loss
