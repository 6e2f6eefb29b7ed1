"""KL terms that training loops often get wrong, in plain torch over the fused ops.

kl is the output of rk.kl_divergence or the second output of rk.reparameterize_kl. It is elementwise with event_ndim=0
and summed over all dims but the first by default.
"""

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .ops.latent import Prior, kl_divergence
from .ops.latent.priors import as_pair

__all__ = [
    "balanced_kl",
    "capacity",
    "capacity_loss",
    "cyclical_beta",
    "dreg",
    "free_bits_after_mean",
    "free_bits_per_dimension",
    "free_bits_per_sample",
    "iwae",
    "linear_beta",
    "masked_mean",
    "minibatch_log_weights",
    "stratified_log_weights",
    "total_correlation",
    "vimco",
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


def iwae(log_w: Tensor) -> Tensor:
    """Compute the loss of an importance-weighted autoencoder: minus the bound, averaged over the batch.

        loss = -mean_b log (1 / K sum_k exp(log_w[k, b])),  log_w = log p(x, z) - log q(z)

    Args:
        log_w: (K, B, ...), the log-weight of each sample. With log q(z) from rk.reparameterize_log_prob and
            path_derivative=True its gradient is that of "sticking the landing", which for K > 1 is biased: see dreg.

    Returns:
        A scalar. With K = 1 it is minus the evidence lower bound.

    Raises:
        ValueError: if log_w has no dim of samples.

    Source:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.losses.iwae(torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
        tensor(-1.5000)
    """
    check_samples("iwae", log_w)
    return -(torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])).mean()


def dreg(log_w: Tensor, z: Tensor, log_q: Tensor) -> Tensor:
    """Compute the IWAE loss with the doubly reparameterised gradient for the encoder.

        loss = iwae(log_w),  d loss / d encoder = -mean_b sum_k w[k, b]^2 d log_w[k, b] / dz dz / d encoder,
        w = softmax_k(log_w)

    The decoder keeps the gradient of iwae. The encoder's has less variance and no bias. A hook on z alone, as it is
    often written, leaves out what reaches the encoder by way of log_q; here both have one.

    Args:
        log_w: (K, B, ...), log p(x, z) - log_q.
        z, log_q: from rk.reparameterize_log_prob with sample_shape=(K,) and path_derivative=True, and log_w computed
            from them.

    Returns:
        A scalar, whose value is that of iwae. Call backward once: it puts hooks on z and log_q.

    Raises:
        ValueError: if log_w has no dim of samples, or log_q another shape.

    Source:
        Tucker, Lawson, Gu, Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2019.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> mu, logvar = torch.zeros(4, 2, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
        >>> z, log_q = rk.reparameterize_log_prob(mu, logvar, sample_shape=(3,), path_derivative=True)
        >>> log_p = -(z**2).sum(-1)
        >>> rk.losses.dreg(log_p - log_q, z, log_q).backward()
        >>> mu.grad.shape
        torch.Size([4, 2])
    """
    check_samples("dreg", log_w)
    if log_q.shape != log_w.shape or z.shape[: log_w.dim()] != log_w.shape:
        raise ValueError(
            f"dreg: log_q must have the shape of log_w, {tuple(log_w.shape)}, with which that of z begins; got log_q "
            f"{tuple(log_q.shape)}, z {tuple(z.shape)}. Pass what rk.reparameterize_log_prob returns."
        )
    w = log_w.detach().softmax(0)
    for t, factor in ((z, w.reshape(*w.shape, *[1] * (z.dim() - w.dim()))), (log_q, w)):
        if t.requires_grad:
            t.register_hook(lambda grad, factor=factor: (grad * factor).to(grad.dtype))  # type: ignore[no-untyped-call]
    return iwae(log_w)


def vimco(log_w: Tensor, log_q: Tensor) -> Tensor:
    """Compute the IWAE loss with the gradient of VIMCO, for draws that have no gradient, such as codes.

        loss = iwae(log_w),  d loss / d encoder = -mean_b sum_k [(L - L_k) d log_q[k, b] + w[k, b] d log_w[k, b]],
        w = softmax_k(log_w),  L the bound,  L_k the bound in which log_w[k] is the mean of the others

    Args:
        log_w: (K, B, ...), log p(x, z) - log_q, with K at least 2.
        log_q: the log-density or log-probability of each draw, of the shape of log_w, with a gradient to the encoder.

    Returns:
        A scalar, whose value is that of iwae.

    Raises:
        ValueError: if log_w has fewer than two samples, or log_q another shape.

    Source:
        Mnih and Rezende, "Variational Inference for Monte Carlo Objectives", 2016.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> log_q = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
        >>> loss = rk.losses.vimco(-1.0 - log_q, log_q)
        >>> loss.backward()
        >>> log_q.grad.shape
        torch.Size([2, 1])
    """
    check_samples("vimco", log_w)
    k = log_w.shape[0]
    if k < 2 or log_q.shape != log_w.shape:
        raise ValueError(
            f"vimco: log_w must have at least two samples, and log_q its shape; got log_w {tuple(log_w.shape)}, log_q "
            f"{tuple(log_q.shape)}. Draw more, or sum log_q over the event."
        )
    fixed = log_w.detach()
    own = torch.eye(k, dtype=torch.bool, device=log_w.device).reshape(k, k, *[1] * (log_w.dim() - 1))
    without = torch.where(own, ((fixed.sum(0) - fixed) / (k - 1)).unsqueeze(1), fixed)  # [left out, K, B, ...]
    signal = torch.logsumexp(fixed, 0) - torch.logsumexp(without, 1)
    score = (signal * (log_q - log_q.detach())).sum(0).mean()  # 0, with the gradient of the score
    return iwae(log_w) - score


def check_samples(where: str, log_w: Tensor) -> None:
    if log_w.dim() < 1 or log_w.shape[0] < 1:
        raise ValueError(
            f"{where}: log_w must have the samples in its first dim; got shape {tuple(log_w.shape)}. "
            "Draw with sample_shape=(K,)."
        )


def total_correlation(
    log_qzx: Tensor, log_qz: Tensor, log_qz_dims: Tensor, log_pz: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Split log q(z|x) - log p(z), whose mean is the KL, into mutual information, total correlation and the rest.

        mi = log q(z|x) - log q(z),  tc = log q(z) - sum_d log q(z_d),  dwkl = sum_d log q(z_d) - log p(z)

    Args:
        log_qzx: the log-density of each point under its own posterior, as of DiagonalGaussian.log_prob.
        log_qz, log_qz_dims: joint and dims of rk.mixture_log_prob(z, mu, logvar, of="both") over the posteriors.
        log_pz: the log-density of each point under the prior; of the shape of log_qzx, as log_qz.

    Returns:
        (mi, tc, dwkl), each with one value for each point. They add up to log_qzx - log_pz. Their means estimate the
        three terms. A single value, and with few components the mean of tc too, may be negative.

    Raises:
        ValueError: if the shapes do not fit.

    Source:
        Chen, Li, Grosse, Duvenaud, "Isolating Sources of Disentanglement in Variational Autoencoders", 2018,
        equation 2.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> one = torch.ones(2)
        >>> rk.losses.total_correlation(5 * one, 3 * one, torch.ones(2, 2), one)
        (tensor([2., 2.]), tensor([1., 1.]), tensor([1., 1.]))
    """
    shape = log_qzx.shape
    if log_qz.shape != shape or log_pz.shape != shape or log_qz_dims.shape[: len(shape)] != shape:
        raise ValueError(
            "total_correlation: log_qzx, log_qz and log_pz must have one shape, with which log_qz_dims begins; "
            f"got {tuple(shape)}, {tuple(log_qz.shape)}, {tuple(log_pz.shape)} and {tuple(log_qz_dims.shape)}. "
            "Sum log_qzx and log_pz over the event."
        )
    product = log_qz_dims.flatten(len(shape)).sum(-1) if log_qz_dims.dim() > len(shape) else log_qz_dims
    return log_qzx - log_qz, log_qz - product, product - log_pz


def minibatch_log_weights(batch: int, n_data: int) -> float:
    """Return the log-weight of each posterior in a minibatch-weighted estimate of the aggregate posterior.

        q(z) ~ 1 / (n_data batch) sum_j q(z | x_j)

    Args:
        batch: points in the minibatch.
        n_data: points in the data set, at least `batch`.

    Returns:
        A number, for log_weights of rk.mixture_log_prob. The estimate of log q(z) is too low, by about
        log batch if z is near its own posterior alone, and by up to log n_data if the posteriors overlap.

    Raises:
        ValueError: if the sizes are not 1 <= batch <= n_data.

    Source:
        Chen, Li, Grosse, Duvenaud, "Isolating Sources of Disentanglement in Variational Autoencoders", 2018,
        equation 3.

    Example:
        >>> import reparam_kernels as rk
        >>> round(rk.losses.minibatch_log_weights(10, 100), 4)
        -6.9078
    """
    check_sizes("minibatch_log_weights", batch, n_data, 1)
    return -math.log(batch * n_data)


def stratified_log_weights(batch: int, n_data: int) -> Tensor:
    """Return the log-weights of the posteriors in a minibatch-stratified estimate of the aggregate posterior.

        q(z_i) ~ q(z_i | x_i) / N + (N - M) / (N M) q(z_i | x_i+1) + 1 / M sum of the other q(z_i | x_j),  M = batch - 1

    The sum is an unbiased estimate of q(z_i) if the other points are drawn without replacement. In code that is often
    copied, the first two weights are not on the diagonal and beside it but in the first two columns.

    Args:
        batch: points in the minibatch, at least 2.
        n_data: N, points in the data set, at least `batch`.

    Returns:
        (batch, batch), float32, on torch's default device, for log_weights of rk.mixture_log_prob. Row i is for z_i.

    Raises:
        ValueError: if the sizes are not 2 <= batch <= n_data.

    Source:
        Chen, Li, Grosse, Duvenaud, "Isolating Sources of Disentanglement in Variational Autoencoders", 2018,
        appendix C.2.

    Example:
        >>> import reparam_kernels as rk
        >>> rk.losses.stratified_log_weights(3, 4).exp()
        tensor([[0.2500, 0.2500, 0.5000],
                [0.5000, 0.2500, 0.2500],
                [0.2500, 0.5000, 0.2500]])
    """
    check_sizes("stratified_log_weights", batch, n_data, 2)
    others = batch - 1
    own = torch.arange(batch)
    weights = torch.full((batch, batch), -math.log(others))
    weights[own, own] = -math.log(n_data)
    weights[own, (own + 1) % batch] = math.log((n_data - others) / (n_data * others))
    return weights


def check_sizes(where: str, batch: int, n_data: int, least: int) -> None:
    if not least <= batch <= n_data:
        raise ValueError(
            f"{where}: batch must lie in [{least}, n_data]; got batch {batch}, n_data {n_data}. "
            "Pass the sizes of the minibatch and of the whole data set."
        )


def risen(done: float, length: float) -> float:
    """Return the part of a rise that is done, at most 1. A rise of length 0 is over."""
    return min(1.0, done / length) if length > 0 else 1.0


def check_not_negative(where: str, name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{where}: {name} must not be negative; got {value}. Pass 0 for no rise.")
