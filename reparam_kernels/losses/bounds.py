"""Bounds of the log-likelihood from several weighted samples of each data point.

log_w has shape (K, B, ...), with K samples of each point: log_w = log p(x, z) - log q(z).
"""

import math

import torch
from torch import Tensor


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
        ValueError: if log_w has no dim of samples, or log_q or z another shape.

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
    check_shape("dreg", "log_q", log_q.shape, log_w)
    check_shape("dreg", "z without its event dims", z.shape[: log_w.dim()], log_w)
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
    check_samples("vimco", log_w, least=2)
    check_shape("vimco", "log_q", log_q.shape, log_w)
    fixed, k = log_w.detach(), log_w.shape[0]
    own = torch.eye(k, dtype=torch.bool, device=log_w.device).reshape(k, k, *[1] * (log_w.dim() - 1))
    without = torch.where(own, ((fixed.sum(0) - fixed) / (k - 1)).unsqueeze(1), fixed)  # [left out, K, B, ...]
    signal = torch.logsumexp(fixed, 0) - torch.logsumexp(without, 1)
    score = (signal * (log_q - log_q.detach())).sum(0).mean()  # 0, with the gradient of the score
    return iwae(log_w) - score


def check_samples(where: str, log_w: Tensor, least: int = 1) -> None:
    if log_w.dim() < 1 or log_w.shape[0] < least:
        raise ValueError(
            f"{where}: log_w must have the samples in its first dim, {least} or more; got shape {tuple(log_w.shape)}. "
            "Draw with sample_shape=(K,)."
        )


def check_shape(where: str, name: str, shape: torch.Size, log_w: Tensor) -> None:
    if shape != log_w.shape:
        raise ValueError(
            f"{where}: {name} must have the shape of log_w; got {name} {tuple(shape)}, log_w {tuple(log_w.shape)}. "
            "Draw with sample_shape=(K,), and sum log_w and log_q over the event."
        )
