"""Fused Gaussian reparameterisation and KL for variational autoencoders.

The noise is a function of a seed: it is regenerated in the backward pass, never stored.
"""

from . import distributions, integrations, losses, reference, testing
from .core.backends import backend_for
from .core.seeds import draw_seed
from .diagonal_gaussian import DiagonalGaussian
from .head import GaussianHead
from .ops.latent import (
    kl_divergence,
    reparameterize,
    reparameterize_kl,
    reparameterize_log_prob,
    reparameterize_mc_kl,
)
from .ops.mixture import mixture_log_prob
from .ops.noise import NOISE_VERSION, randn, randn_like

__version__ = "0.2.0"

__all__ = [
    "NOISE_VERSION",
    "DiagonalGaussian",
    "GaussianHead",
    "backend_for",
    "distributions",
    "draw_seed",
    "integrations",
    "kl_divergence",
    "losses",
    "mixture_log_prob",
    "randn",
    "randn_like",
    "reference",
    "reparameterize",
    "reparameterize_kl",
    "reparameterize_log_prob",
    "reparameterize_mc_kl",
    "testing",
]
