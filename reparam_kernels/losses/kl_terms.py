"""Losses of a KL that is already computed: free bits, a capacity, a mean over a mask."""

import torch
from torch import Tensor


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
