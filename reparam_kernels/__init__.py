"""Fused Gaussian reparameterisation and KL for variational autoencoders.

The noise is a function of a seed: it is regenerated in the backward pass, never stored.
"""

from . import distributions, integrations, losses, reference
from .core.backends import backend_for
from .diagonal_gaussian import DiagonalGaussian
from .head import GaussianHead
from .ops.latent import kl_divergence, reparameterize, reparameterize_kl
from .ops.mixture import mixture_log_prob
from .ops.noise import NOISE_VERSION, randn

__all__ = [
    "NOISE_VERSION",
    "DiagonalGaussian",
    "GaussianHead",
    "backend_for",
    "distributions",
    "integrations",
    "kl_divergence",
    "losses",
    "mixture_log_prob",
    "randn",
    "reference",
    "reparameterize",
    "reparameterize_kl",
]
