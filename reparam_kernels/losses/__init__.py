"""Losses of latent variable models, and their schedules, in plain torch over the fused ops.

kl is what rk.kl_divergence returns, or the second output of rk.reparameterize_kl. By default it has one value for each
sample, summed over all dims but the first; with event_ndim=0 it is elementwise.
"""

from .aggregate_posterior import minibatch_log_weights, stratified_log_weights, total_correlation
from .balancing import BalancedKL as BalancedKL
from .balancing import balanced_kl
from .bounds import dreg, iwae, vimco
from .kl_terms import (
    capacity_loss,
    free_bits_after_mean,
    free_bits_per_dimension,
    free_bits_per_sample,
    masked_mean,
)
from .schedules import capacity, cyclical_beta, linear_beta

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
