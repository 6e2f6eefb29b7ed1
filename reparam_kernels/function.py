"""The one autograd.Function: fused forward, fused backward that makes eps again; saves the inputs and the seed."""

from typing import Any

import torch
from torch import Tensor

from . import backends
from .reference import formula
from .spec import Call


class Latent(torch.autograd.Function):
    """(mu, x, mu_p, x_p, seed, eps, spec) -> (z, kl), on the backend of mu's device."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor | None, Tensor | None]:
        *tensors, ctx.spec = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        z, kl = backends.of(tensors[0].device).forward(Call(*call))
        return z, kl

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
        call = Call(*(*ctx.saved_tensors, ctx.spec))
        if torch.is_grad_enabled():
            return (*differentiable_backward(call, ctx.needs_input_grad, dz, dkl), None, None, None)
        wanted = ctx.needs_input_grad[:4]
        dz, dkl = (None if g is None else g.resolve_neg() for g in (dz, dkl))
        dmu, dx, dmu_p, dx_p = backends.of(call.mu.device).backward(call, dz, dkl, wanted)
        return dmu, dx, reduced(dmu_p, call.mu_p), reduced(dx_p, call.x_p), None, None, None


def reduced(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient to an expanded prior, summed to its own shape in an order that does not depend on threads."""
    if grad is None or like is None or grad.shape == like.shape:
        return grad
    if like.numel() > 1:
        return grad.sum_to_size(like.shape).to(like.dtype)
    parts = grad.reshape(-1)
    while parts.numel() > 1024:  # torch splits a sum to one number over its threads, shorter ones it does not
        whole = parts.numel() // 1024 * 1024
        parts = torch.cat([parts[:whole].view(-1, 1024).sum(1), parts[whole:].sum(0, keepdim=True)])
    return parts.sum().to(like.dtype).reshape(like.shape)


def differentiable_backward(
    call: Call, wanted: tuple[bool, ...], dz: Tensor | None, dkl: Tensor | None
) -> list[Tensor | None]:
    """The gradients as a function that autograd can differentiate again: the formula's own."""
    inputs = [t for t, want in zip(call[:4], wanted, strict=False) if want and t is not None]
    pairs = [(y, g) for y, g in zip(formula(call), (dz, dkl), strict=True) if y is not None and g is not None]
    if not pairs:
        return [None] * 4
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted[:4]]
