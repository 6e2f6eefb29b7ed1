"""KL terms that training loops often get wrong, in plain torch over the fused ops.

kl is the output of rk.kl_divergence or the second output of rk.reparameterize_kl. It is elementwise with event_ndim=0
and summed over all dims but the first by default.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .ops.latent import Prior, kl_divergence
from .ops.latent.priors import as_pair

__all__ = [
    "balanced_kl",
    "capacity",
    "capacity_loss",
    "cyclical_beta",
    "free_bits_after_mean",
    "free_bits_per_dimension",
    "free_bits_per_sample",
    "linear_beta",
    "masked_mean",
]


def free_bits_per_dimension(kl: Tensor, floor: float) -> Tensor:
    """Clamp each dimension's KL to at least `floor` nats after the mean over the batch, then sum.

        loss = sum_j max(floor, mean_b kl[b, j])

    Args:
        kl: (B, ...), elementwise, or summed over each group, for example the pixels of a channel.
        floor: nats for each dimension or group.

    Returns:
        A scalar. A dimension below the floor gets no gradient.

    Raises:
        ValueError: if kl has no dim besides the batch's.

    Source:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improved Variational Inference with Inverse
        Autoregressive Flow", 2016.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.losses.free_bits_per_dimension(torch.tensor([[0.1, 2.0], [0.3, 4.0]]), 0.5)
        tensor(3.5000)
    """
    if kl.dim() < 2:
        raise ValueError(
            "free_bits_per_dimension: kl must have the batch's dim and at least one more; "
            f"got shape {tuple(kl.shape)}. Compute it with event_ndim=0."
        )
    return kl.mean(0).clamp(min=floor).sum()


def free_bits_per_sample(kl: Tensor, floor: float) -> Tensor:
    """Clamp each sample's KL to at least `floor` nats before the mean over the batch.

        loss = mean_b max(floor, kl[b])

    Args:
        kl: one value for each sample, of any shape: the default of rk.kl_divergence.
        floor: nats for each sample.

    Returns:
        A scalar. A sample below the floor gets no gradient.

    Raises:
        Nothing of its own.

    Source:
        Hafner et al., "Learning Latent Dynamics for Planning from Pixels", 2019 (PlaNet).

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.losses.free_bits_per_sample(torch.tensor([1.0, 5.0]), 3.0)
        tensor(4.)
    """
    return kl.clamp(min=floor).mean()


def free_bits_after_mean(kl: Tensor, floor: float) -> Tensor:
    """Clamp the batch's mean KL to at least `floor` nats, so that all samples get a gradient, or none.

        loss = max(floor, mean_b kl[b])

    Args:
        kl: one value for each sample, of any shape; of one layer, if there are several.
        floor: nats for the mean.

    Returns:
        A scalar.

    Raises:
        Nothing of its own.

    Source:
        Hafner et al., "Dream to Control: Learning Behaviors by Latent Imagination", 2020 (Dreamer).

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.losses.free_bits_after_mean(torch.tensor([1.0, 3.0]), 3.0)
        tensor(3.)
    """
    return kl.mean().clamp(min=floor)


def balanced_kl(
    mu: Tensor,
    logvar: Tensor,
    prior: Prior,
    *,
    to_prior: float = 0.8,
    to_posterior: float = 0.2,
    floor: float = 0.0,
    **options: Any,
) -> Tensor:
    """Compute KL(q || p) with one weight for the gradient to the prior and another for that to the posterior.

        kl = to_prior max(floor, KL(sg(q) || p)) + to_posterior max(floor, KL(q || sg(p)))

    Args:
        mu, logvar, prior: as for rk.kl_divergence.
        to_prior, to_posterior: the weights, 0.8 and 0.2 in DreamerV2. DreamerV3 uses other weights and floor=1.
        floor: free nats for each value, before any mean.
        options: event_ndim, param, min_std, clamp, as for rk.kl_divergence.

    Returns:
        kl, of the shape that rk.kl_divergence gives.

    Raises:
        TypeError, ValueError: as rk.kl_divergence.

    Source:
        Hafner, Lillicrap, Norouzi, Ba, "Mastering Atari with Discrete World Models", 2021 (DreamerV2);
        Hafner, Pasukonis, Ba, Lillicrap, "Mastering Diverse Domains through World Models", 2023 (DreamerV3).

    Example:
        >>> import torch, reparam_kernels as rk
        >>> mu, logvar = torch.ones(2, 3), torch.zeros(2, 3)
        >>> rk.losses.balanced_kl(mu, logvar, prior=(torch.zeros(3), torch.zeros(3)))
        tensor([1.5000, 1.5000])
    """
    pair = as_pair("balanced_kl", prior, options.get("param", "logvar"), options.get("min_std", 0.0))
    held = tuple(t.detach() if isinstance(t, Tensor) else t for t in pair)
    prior_side = kl_divergence(mu.detach(), logvar.detach(), prior=pair, **options)
    posterior_side = kl_divergence(mu, logvar, prior=held, **options)  # type: ignore[arg-type]
    return to_prior * prior_side.clamp(min=floor) + to_posterior * posterior_side.clamp(min=floor)


def linear_beta(step: int, steps: int, beta: float = 1.0) -> float:
    """Return the KL's weight, which rises from 0 at step 0 to `beta` at `steps` and stays there.

        weight = beta min(1, step / steps)

    Args:
        step: steps done.
        steps: length of the warm-up; 0: the weight is beta from step 0 on.
        beta: the final weight.

    Returns:
        The weight, a float.

    Raises:
        ValueError: steps is negative.

    Source:
        Bowman, Vilnis, Vinyals, Dai, Jozefowicz, Bengio, "Generating Sentences from a Continuous Space", 2016; the
        weight beta is Higgins et al., "beta-VAE", 2017.

    Example:
        >>> import reparam_kernels as rk
        >>> [rk.losses.linear_beta(step, 4) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    check_not_negative("linear_beta", "steps", steps)
    return beta * risen(step, steps)


def cyclical_beta(step: int, steps: int, cycles: int = 4, ratio: float = 0.5, beta: float = 1.0) -> float:
    """Return the KL's weight, which rises from 0 to `beta` in the first `ratio` of each cycle, then stays level.

        weight = beta min(1, tau / ratio),  tau = (step mod (steps / cycles)) / (steps / cycles)

    Args:
        step: steps done.
        steps: length of the training; after it the weight is beta.
        cycles: the number of equal cycles, positive.
        ratio: the part of a cycle in which the weight rises, in [0, 1]; 0: the weight is always beta.
        beta: the highest weight.

    Returns:
        The weight, a float.

    Raises:
        ValueError: if steps or ratio is negative, or cycles is not positive.

    Source:
        Fu, Li, Liu, Gao, Celikyilmaz, Carin, "Cyclical Annealing Schedule: A Simple Approach to Mitigating KL
        Vanishing", 2019.

    Example:
        >>> import reparam_kernels as rk
        >>> [rk.losses.cyclical_beta(step, 8, cycles=2) for step in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    """
    check_not_negative("cyclical_beta", "steps", steps)
    check_not_negative("cyclical_beta", "ratio", ratio)
    if not cycles > 0:
        raise ValueError(f"cyclical_beta: cycles must be positive; got {cycles}. Pass 1 for a single rise.")
    if step >= steps:
        return beta
    return beta * risen(math.fmod(step * cycles, steps) / steps, ratio)


def capacity(step: int, steps: int, final: float) -> float:
    """Return the capacity C for capacity_loss, which rises from 0 at step 0 to `final` at `steps` and stays there.

        C = final min(1, step / steps)

    Args:
        step: steps done.
        steps: length of the rise; 0: C is final from step 0 on.
        final: the capacity at the end of the rise, in nats.

    Returns:
        C, a float.

    Raises:
        ValueError: steps is negative.

    Source:
        Burgess et al., "Understanding disentangling in beta-VAE", 2018.

    Example:
        >>> import reparam_kernels as rk
        >>> [rk.losses.capacity(step, 100, 25.0) for step in (0, 50, 200)]
        [0.0, 12.5, 25.0]
    """
    check_not_negative("capacity", "steps", steps)
    return final * risen(step, steps)


def capacity_loss(kl: Tensor, nats: float, gamma: float) -> Tensor:
    """Penalise the distance of the mean KL from a capacity. The mean is taken first.

        loss = gamma |mean_b kl[b] - nats|

    Args:
        kl: one value for each sample: the default of rk.kl_divergence.
        nats: the capacity, as from `capacity`.
        gamma: the weight; the paper has 1000.

    Returns:
        A scalar.

    Raises:
        Nothing of its own.

    Source:
        Burgess et al., "Understanding disentangling in beta-VAE", 2018.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.losses.capacity_loss(torch.tensor([1.0, 5.0]), 2.0, gamma=10.0)
        tensor(10.)
    """
    return gamma * (kl.mean() - nats).abs()


def masked_mean(kl: Tensor, mask: Tensor) -> Tensor:
    """Sum over the unmasked positions and divide by their number. Channels that share a mask add up.

        loss = sum(kl mask) / sum(mask), and 0 if the mask is 0 everywhere

    Args:
        kl: elementwise, for example (B, C, T).
        mask: ones and zeros, or weights, with the dims of kl and size 1 in those that share it, for example (B, 1, T).
            The divisor is the sum of the mask itself, so every position of (B, T) counts once, whatever C is.

    Returns:
        A scalar. Masked elements affect neither it nor a gradient, even if they are infinite or NaN.

    Raises:
        ValueError: if the mask does not broadcast to kl.

    Source:
        Kim, Kong, Son, "Conditional Variational Autoencoder with Adversarial Learning for End-to-End Text-to-Speech",
        2021 (VITS).

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.losses.masked_mean(torch.ones(2, 3, 4), torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]]]))
        tensor(3.)
    """
    if mask.dim() != kl.dim() or any(m not in (1, k) for m, k in zip(mask.shape, kl.shape, strict=True)):
        raise ValueError(
            "masked_mean: mask must have the dims of kl, each of kl's size or 1; "
            f"got kl {tuple(kl.shape)}, mask {tuple(mask.shape)}. "
            "Give it size 1 in the dims that share it, usually the channels."
        )
    masked = mask == 0
    total = (torch.where(masked, 0.0, kl) * mask).sum()
    return total / torch.where(masked.all(), 1, mask.sum())


def risen(done: float, length: float) -> float:
    """Return the part of a rise that is done, at most 1. A rise of length 0 is over."""
    return min(1.0, done / length) if length > 0 else 1.0


def check_not_negative(where: str, name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{where}: {name} must not be negative; got {value}. Pass 0 for no rise.")
