"""Which way a call goes: straight to the kernels, or through the formula. Every private torch name is here."""

import torch
from torch import Tensor

from . import backends
from .function import Latent
from .reference import formula
from .spec import Call

_PLAIN = (Tensor, torch.nn.Parameter)
_transforms_active = torch._C._functorch.peek_interpreter_stack
_forward_ad_level = torch.autograd.forward_ad
_dispatch_modes = torch._C._len_torch_dispatch_stack


def run(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """(z, kl); None for what spec does not ask for."""
    if takes_kernels(call):
        z, kl = Latent.apply(*call)  # type: ignore[no-untyped-call]
        return z, kl
    return formula(call)


def takes_kernels(call: Call) -> bool:
    """Plain tensors on a device with a kernel, no transform under way, no gradient to eps."""
    mu = call.mu
    return (
        type(mu) in _PLAIN
        and backends.has_kernels(mu.device)
        and _transforms_active() is None
        and _dispatch_modes() == 0
        and _forward_ad_level._current_level < 0
        and (call.eps is None or not call.eps.requires_grad)
    )
