"""The log-density of points under a mixture of diagonal Gaussians, without a tensor of all pairs."""

from torch import Tensor

from ...core.execute import execute
from .arguments import make_arguments
from .op import MIXTURE


def mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    log_weights: Tensor | float | None = None,
    of: str = "joint",
    event_ndim: int | None = None,
    param: str = "logvar",
    min_std: float = 0.0,
    clamp: tuple[float, float] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-density of each point under a mixture of N diagonal Gaussians, in one pass over the components.

        joint[b]   = log sum_n exp(w[b, n] + sum_d log N(z[b, d]; mu[n, d], sigma[n, d]^2))
        dims[b, d] = log sum_n exp(w[b, n] + log N(z[b, d]; mu[n, d], sigma[n, d]^2))

    No tensor with a number for each pair of a point and a component is made.

    Args:
        z: points, (*batch, *event); any strides; float16, bfloat16, float32 or float64.
        mu: the means of the components, (N, *event), of z's dtype and device.
        logvar: their log variances, or what `param` says; as mu.
        log_weights: w: None for -log N; a number; (N,), shared by all points; or (*batch, N). Of mu's dtype, or
            float32. They are never normalised. -inf excludes a component.
        of: "joint", the density of a whole event; "dims", that of each of its elements alone; or "both".
        event_ndim: how many trailing dims the event has. It follows from mu; a number here is a check.
        param, min_std, clamp: as for reparameterize.

    Returns:
        joint, of shape batch, or dims, of the shape of z, or both in a tuple; in nats; float32 (float64 for float64).
        If all components are excluded, -inf with gradients of 0.

    Raises:
        TypeError, ValueError: if the events, weights, dtypes, devices or options do not fit, or there is no component.
            Nothing is broadcast, cast or moved silently; inside torch.autocast mixed floats promote to the widest.

    Source:
        Tomczak and Welling, "VAE with a VampPrior", 2018, equation 9; Chen, Li, Grosse, Duvenaud, "Isolating Sources
        of Disentanglement in Variational Autoencoders", 2018, section 4.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> z, mu, logvar = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, 3)
        >>> rk.mixture_log_prob(z, mu, logvar)
        tensor([-2.7568, -2.7568])
    """
    arguments = make_arguments(
        "mixture_log_prob",
        z,
        mu,
        logvar,
        log_weights=log_weights,
        of=of,
        event_ndim=event_ndim,
        param=param,
        min_std=min_std,
        clamp=clamp,
    )
    joint, dims = execute(MIXTURE, arguments)
    return (joint, dims) if of == "both" else dims if joint is None else joint  # type: ignore[return-value]
