"""The mixture op in plain torch and float64, with all B x N x D terms. The kernels are tested against it."""

import math

import torch
from torch import Tensor

from ...core.dtypes import compute_dtype
from ..latent.formula import clamped, log_sigma, widen
from .arguments import Arguments, weights_by_component


def log_sum_exp(terms: Tensor, dim: int) -> Tensor:
    """Compute log sum exp. If every term is -inf, the result is -inf and its gradients of any order are 0."""
    top = terms.detach().amax(dim, keepdim=True)
    top = torch.where(top.isinf(), 0.0, top)
    total = torch.exp(terms - top).sum(dim)
    empty = total == 0
    value = torch.log(torch.where(empty, 1.0, total)) + top.squeeze(dim)
    return torch.where(empty, -math.inf, value)


def formula(arguments: Arguments) -> tuple[Tensor | None, Tensor | None]:
    """Compute joint and dims, differentiable to any order."""
    config, event = arguments.config, arguments.mu.dim() - 1
    dtype = compute_dtype(arguments.z.dtype)
    z, mu, x = widen(arguments.z), widen(arguments.mu), widen(arguments.x)
    given = weights_by_component(arguments)
    weights = mu.new_full((mu.shape[0],), -math.log(mu.shape[0])) if given is None else widen(given)
    log_scale = log_sigma(clamped(x, config.clamp), config.param, config.min_std)
    e = (z.unsqueeze(-event - 1) - mu) * torch.exp(-log_scale)
    terms = -(e**2) / 2 - log_scale - math.log(2 * math.pi) / 2  # [*batch, N, *event]
    joint = dims = None
    if config.of != "dims":
        whole = terms.sum(dim=tuple(range(-event, 0))) if event else terms
        joint = log_sum_exp(weights + whole, -1).to(dtype).contiguous()
    if config.of != "joint":
        by_dim = weights.reshape(*weights.shape, *[1] * event) + terms
        dims = log_sum_exp(by_dim, -event - 1).to(dtype).contiguous()
    return joint, dims
