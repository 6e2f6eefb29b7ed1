"""Fused Gaussian reparameterisation and KL for variational autoencoders.

The noise is a function of a seed: it is regenerated in the backward pass, never stored.
"""

from . import distributions, integrations, losses, reference
from .core.backends import backend_for
from .diagonal_gaussian import DiagonalGaussian
from .head import GaussianHead
from .ops.latent import kl_divergence, reparameterize, reparameterize_kl
from .ops.noise import NOISE_VERSION, randn

__version__ = "0.1.0"

__all__ = [
    "NOISE_VERSION",
    "DiagonalGaussian",
    "GaussianHead",
    "backend_for",
    "distributions",
    "integrations",
    "kl_divergence",
    "losses",
    "randn",
    "reference",
    "reparameterize",
    "reparameterize_kl",
]
