"""The latent layer: a sample of N(mu, sigma^2), with its KL divergence or its log-density in the same pass."""

from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor

from ...core.execute import execute
from ...core.window import Window
from .arguments import Density, make_arguments
from .op import LATENT
from .priors import as_pair

if TYPE_CHECKING:
    from ...diagonal_gaussian import DiagonalGaussian

Prior = Union[tuple[Tensor | float, Tensor | float], torch.distributions.Normal, "DiagonalGaussian"]


def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    window: Window | None = None,
    sample_shape: tuple[int, ...] = (),
    param: str = "logvar",
    min_std: float = 0.0,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """Draw z ~ N(mu, sigma^2) with gradients to mu and logvar, in one pass; the noise is not stored.

        z = mu + sigma * eps,  sigma = exp(logvar / 2),  eps = randn(*z.shape, seed=seed)

    Args:
        mu: mean, any shape and strides; float16, bfloat16, float32 or float64.
        logvar: log variance, or what `param` says; shape, dtype and device of mu.
        seed: int in [-2**63, 2**64), taken modulo 2**64, or an int64 tensor on mu's device of one element or of
            mu.shape[0] elements: one for each leading item, the element index restarting in each. Default: drawn from
            the generator, as by draw_seed.
        generator: the torch.Generator that the seed is drawn from; default torch's own, which torch.manual_seed seeds.
        eps: use this noise (mu's dtype, z's shape) instead. At most one of seed, generator, eps.
        window: (whole_shape, start) if mu is a part of a larger tensor: the shape of that, and the index of the part's
            first element. The noise is that of a call on the whole, at the places of the part; a seed tensor has one
            element or whole_shape[0]. Not with eps.
        sample_shape: leading sample dims; z has shape sample_shape + mu.shape.
        param: "logvar"; "logstd", sigma = exp(x); "std", sigma = x; "softplus", sigma = log(1 + exp(x)) + min_std.
        min_std: floor of sigma, for "softplus".
        clamp: (low, high), applied to the second argument first; the gradient is kept at a bound, and 0 outside.

    Returns:
        z, of mu's dtype: computed in float32 (float64 for float64), rounded once. It is channels_last if mu is and
        there are no sample dims, else contiguous.

    Raises:
        TypeError, ValueError: if the shapes, dtypes, devices or options do not fit. Nothing is broadcast, cast or moved
            silently; inside torch.autocast mixed floats promote to the widest.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> mu, logvar = torch.zeros(2, 2), torch.zeros(2, 2)
        >>> rk.reparameterize(mu, logvar, seed=7)
        tensor([[ 2.9158e-04, -3.0485e-01],
                [ 1.7888e+00,  1.0679e+00]])
    """
    arguments = make_arguments(
        "reparameterize", mu, logvar, True, False, seed, generator, eps, sample_shape,
        None, None, param, min_std, clamp, window=window,
    )  # fmt: skip
    return execute(LATENT, arguments)[0]  # type: ignore[return-value]


def kl_divergence(
    mu: Tensor,
    logvar: Tensor,
    *,
    event_ndim: int | None = None,
    prior: Prior | None = None,
    param: str = "logvar",
    min_std: float = 0.0,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """Compute KL(N(mu, sigma^2) || N(0, I)), or against a prior, accurate however small it is.

        kl = sum (delta^2 + expm1(d) - d) / 2,  delta = (mu - mu_p) / sigma_p,  d = 2 log(sigma / sigma_p)

    Args:
        mu, logvar, param, min_std, clamp: as for reparameterize.
        event_ndim: how many trailing dims of mu the KL sums over. Default: all but the first (all, for 1-D). 0: the
            elementwise KL.
        prior: None for N(0, I), or (mu_p, second_p): tensors that expand to the shape of mu, or Python numbers; read
            with the same param and min_std, never clamped; gradients in their own shape. Or a DiagonalGaussian or a
            torch.distributions.Normal: its parameters are converted to `param`, which rounds them once to their dtype;
            to softplus nothing is converted.

    Returns:
        kl in nats, float32 (float64 for float64), of shape mu.shape[:mu.dim() - event_ndim]. Relative error at most
        1e-6, near zero too.

    Raises:
        TypeError, ValueError: as reparameterize; also if a prior does not expand, or a number is not finite.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, appendix B.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> rk.kl_divergence(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1.5000, 1.5000])
    """
    arguments = make_arguments(
        "kl_divergence", mu, logvar, False, True, None, None, None, (),
        event_ndim, as_pair("kl_divergence", prior, param, min_std), param, min_std, clamp,
    )  # fmt: skip
    return execute(LATENT, arguments)[1]  # type: ignore[return-value]


def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    window: Window | None = None,
    sample_shape: tuple[int, ...] = (),
    event_ndim: int | None = None,
    prior: Prior | None = None,
    param: str = "logvar",
    min_std: float = 0.0,
    clamp: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw z and compute its KL in one pass: the whole latent layer of a variational autoencoder.

        z = mu + sigma * eps,  kl = KL(N(mu, sigma^2) || prior)

    Args:
        The keywords of reparameterize and of kl_divergence. kl never has sample dims.

    Returns:
        (z, kl), as the two functions return them.

    Raises:
        TypeError, ValueError: as the two functions.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, equation 10.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> z, kl = rk.reparameterize_kl(torch.ones(2, 3), torch.zeros(2, 3), seed=7)
        >>> z.shape, kl
        (torch.Size([2, 3]), tensor([1.5000, 1.5000]))
    """
    arguments = make_arguments(
        "reparameterize_kl", mu, logvar, True, True, seed, generator, eps, sample_shape,
        event_ndim, as_pair("reparameterize_kl", prior, param, min_std), param, min_std, clamp, window=window,
    )  # fmt: skip
    z, kl, _ = execute(LATENT, arguments)
    return z, kl  # type: ignore[return-value]


def reparameterize_log_prob(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    window: Window | None = None,
    sample_shape: tuple[int, ...] = (),
    event_ndim: int | None = None,
    squash: str | None = None,
    path_derivative: bool = False,
    param: str = "logvar",
    min_std: float = 0.0,
    clamp: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw z and compute the log-density of the distribution that it comes from, in one pass.

        u = mu + sigma * eps,  z = u or tanh(u)
        log_q = sum [-eps^2 / 2 - log sigma - log(2 pi) / 2 - J],  J = 0 or log(1 - tanh(u)^2)

    Args:
        mu, logvar, seed, generator, eps, window, sample_shape, param, min_std, clamp: as for reparameterize. u has the
            bits of its z.
        event_ndim: how many trailing dims of mu log_q sums over, as for kl_divergence.
        squash: None, or "tanh" for z = tanh(u), as in the policies of soft actor-critic. log_q is then the density of
            the squashed z, computed from u: a saturated z gives neither infinity nor NaN.
        path_derivative: True leaves out the gradient of log_q to the parameters of the density and keeps that by way of
            z. Its mean is the same, and its variance vanishes as q approaches the target ("sticking the landing").

    Returns:
        (z, log_q): z as from reparameterize; log_q in nats, float32 (float64 for float64), of shape sample_shape +
        mu.shape[:mu.dim() - event_ndim]. It is that of z before z is rounded to a half dtype.

    Raises:
        TypeError, ValueError: as reparameterize and kl_divergence.

    Source:
        Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016; Roeder, Wu, Duvenaud, "Sticking the
        Landing", 2017; Haarnoja et al., "Soft Actor-Critic", 2018, appendix C.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> z, log_q = rk.reparameterize_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), sample_shape=(5,), seed=7)
        >>> want = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        >>> log_q.shape, torch.allclose(log_q, want)
        (torch.Size([5, 2]), True)
    """
    arguments = make_arguments(
        "reparameterize_log_prob", mu, logvar, True, False, seed, generator, eps, sample_shape,
        event_ndim, None, param, min_std, clamp,
        density=Density(squash=squash, path_derivative=path_derivative), window=window,
    )  # fmt: skip
    z, _, log_q = execute(LATENT, arguments)
    return z, log_q  # type: ignore[return-value]


def reparameterize_mc_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    window: Window | None = None,
    sample_shape: tuple[int, ...] = (),
    event_ndim: int | None = None,
    prior: Prior | None = None,
    path_derivative: bool = False,
    param: str = "logvar",
    min_std: float = 0.0,
    clamp: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw z and compute the Monte Carlo estimate of its KL, log q(z) - log p(z), in one pass.

        kl = sum [eps w + w^2 / 2 - d],  w = (mu - mu_p) / sigma_p + expm1(d) eps,  d = log(sigma / sigma_p)

    Args:
        mu, logvar, seed, generator, eps, window, sample_shape, param, min_std, clamp: as for reparameterize.
        event_ndim, prior: as for kl_divergence.
        path_derivative: as for reparameterize_log_prob; the prior keeps its gradients.

    Returns:
        (z, kl): z as from reparameterize; kl in nats, float32 (float64 for float64), of shape sample_shape +
        mu.shape[:mu.dim() - event_ndim]. Its mean over samples is kl_divergence; one estimate may be negative.

    Raises:
        TypeError, ValueError: as reparameterize and kl_divergence.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, equation 6; the form without cancellation follows
        from (z - mu_p) / sigma_p = eps + w.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> mu, logvar = torch.ones(1, 3), torch.zeros(1, 3)
        >>> z, kl = rk.reparameterize_mc_kl(mu, logvar, sample_shape=(100000,), seed=7)
        >>> kl.mean(0), rk.kl_divergence(mu, logvar)
        (tensor([1.5020]), tensor([1.5000]))
    """
    arguments = make_arguments(
        "reparameterize_mc_kl", mu, logvar, True, False, seed, generator, eps, sample_shape,
        event_ndim, as_pair("reparameterize_mc_kl", prior, param, min_std), param, min_std, clamp,
        density=Density(minus_log_p=True, path_derivative=path_derivative), window=window,
    )  # fmt: skip
    z, _, kl = execute(LATENT, arguments)
    return z, kl  # type: ignore[return-value]
