"""The one autograd.Function: fused forward, fused backward that makes eps again; saves the inputs and the seed."""

from typing import Any

import torch
from torch import Tensor

from . import library, modes
from .spec import Call


class Latent(torch.autograd.Function):
    """(call, and its mu, x, mu_p, x_p for autograd to see) -> (z, kl), on the backend of mu's device."""

    @staticmethod
    def forward(ctx: Any, call: Call, *differentiable: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(*call[:-1])
        ctx.spec = call.spec
        ctx.set_materialize_grads(False)
        z, kl = library.kernels_of(call.mu).forward(call)
        return z, kl

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Tensor | None, ...]:
        call = Call._make((*ctx.saved_tensors, ctx.spec))
        wanted = ctx.needs_input_grad[1:]
        if torch.compiler.is_compiling():
            return None, *library.backward(call, dz, dkl, wanted)
        if torch.is_grad_enabled() or modes.batched(dz, dkl):
            return None, *library.differentiable_gradients(call, dz, dkl, wanted)
        return None, *library.gradients(call, dz, dkl, wanted)
