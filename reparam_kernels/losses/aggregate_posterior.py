"""Losses of the aggregate posterior q(z), the mixture of the posteriors of all data: its KL in three parts.

rk.mixture_log_prob estimates log q(z) from a minibatch, with the weights that are here.
"""

import math

import torch
from torch import Tensor


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
