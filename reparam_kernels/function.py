"""The one autograd.Function: fused forward, fused backward that makes eps again; saves the inputs and the seed."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends
from .reference import formula
from .spec import Call


class Latent(torch.autograd.Function):
    """(call, and its mu, x, mu_p, x_p for autograd to see) -> (z, kl), on the backend of mu's device."""

    @staticmethod
    def forward(ctx: Any, call: Call, *differentiable: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(*call[:-1])
        ctx.spec = call.spec
        ctx.set_materialize_grads(False)
        z, kl = kernels_of(call.mu).forward(call)
        return z, kl

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
        call = Call._make((*ctx.saved_tensors, ctx.spec))
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return (None, *differentiable_backward(call, wanted, dz, dkl))
        if dz is not None and dz.is_neg():
            dz = dz.resolve_neg()
        if dkl is not None and dkl.is_neg():
            dkl = dkl.resolve_neg()
        dmu, dx, dmu_p, dx_p = kernels_of(call.mu).backward(call, dz, dkl, wanted)
        if call.mu_p is not None:
            dmu_p, dx_p = reduced(dmu_p, call.mu_p), reduced(dx_p, call.x_p)
        return None, dmu, dx, dmu_p, dx_p


def kernels_of(mu: Tensor) -> ModuleType:
    backend = backends.of(mu.device)
    assert backend is not None  # the executors came here because there is one
    return backend


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
    inputs = [t for t, want in zip(call[:4], wanted, strict=True) if want and t is not None]
    pairs = [(y, g) for y, g in zip(formula(call), (dz, dkl), strict=True) if y is not None and g is not None]
    if not pairs:
        return [None] * 4
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]
