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
        return backends.of(tensors[0].device).forward(Call(*call))

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
        call = Call(*ctx.saved_tensors, ctx.spec)
        if torch.is_grad_enabled():
            return (*differentiable_backward(call, ctx.needs_input_grad, dz, dkl), None, None, None)
        wanted = ctx.needs_input_grad[:4]
        return (*backends.of(call.mu.device).backward(call, dz, dkl, wanted), None, None, None)


def differentiable_backward(
    call: Call, wanted: tuple[bool, ...], dz: Tensor | None, dkl: Tensor | None
) -> list[Tensor | None]:
    """The gradients as a function that autograd can differentiate again: the formula's own."""
    inputs = [t for t, want in zip(call[:4], wanted, strict=False) if want]
    pairs = [(y, g) for y, g in zip(formula(call), (dz, dkl), strict=True) if y is not None and g is not None]
    if not pairs:
        return [None] * 4
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted[:4]]
