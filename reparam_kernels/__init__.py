"""Fused Gaussian reparameterisation and KL for variational autoencoders; the noise is named, never stored."""

from . import distributions, integrations, losses, reference
from .api import NOISE_VERSION, kl_divergence, randn, reparameterize, reparameterize_kl
from .backends import backend_for
from .distribution import DiagonalGaussian
from .head import GaussianHead

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
