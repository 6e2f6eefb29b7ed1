"""Which way a call goes: straight to the kernels, or through the formula. Every private torch name is here."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .function import Latent
from .reference import formula
from .spec import Call

_PLAIN = (Tensor, torch.nn.Parameter)
_transform = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack


def run(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """(z, kl); None for what spec does not ask for."""
    backend = backends.of(call.mu.device)
    if backend is None or not is_plain(call):
        return formula(call)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call[:4]):
        z, kl = Latent.apply(call, *call[:4])  # type: ignore[no-untyped-call]
    else:
        z, kl = backend.forward(call)
    return z, kl


def is_plain(call: Call) -> bool:
    """Plain tensors, no transform or mode under way, no gradient to eps: the kernels are all there is to do."""
    return (
        type(call.mu) in _PLAIN
        and _transform() is None
        and _dispatch_modes() == 0
        and forward_ad._current_level < 0
        and (call.eps is None or not call.eps.requires_grad)
    )
