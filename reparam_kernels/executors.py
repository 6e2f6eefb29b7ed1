"""Which way a call goes: straight to the kernels, as a registered op, or through the formula."""

import torch
from torch import Tensor

from . import backends, checks, library, modes
from .function import Latent
from .reference import formula
from .spec import Call

_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def run(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """(z, kl); None for what spec does not ask for."""
    eps_learns = call.eps is not None and call.eps.requires_grad
    if torch.compiler.is_compiling():
        if not backends.has_kernels(call.mu.device.type):
            return formula(call)
        return through_formula(call) if eps_learns or modes.compiling_a_transform() else library.forward(call)
    backend = backends.of(call.mu.device)
    if backend is None:
        return formula(call)
    if eps_learns or modes.transforming():
        return through_formula(call)
    if modes.recording() or not _PLAIN.issuperset(map(type, call[:-1])):
        refuse_distributed(call)
        return library.forward(call)
    if torch.is_grad_enabled() and learns(call):
        z, kl = Latent.apply(call, *call[:4])  # type: ignore[no-untyped-call]
    else:
        z, kl = backend.forward(call)
    return z, kl


def learns(call: Call) -> bool:
    """Some input requires a gradient."""
    mu, x, mu_p, x_p = call[:4]
    if mu.requires_grad or (x is not None and x.requires_grad):
        return True
    return mu_p is not None and x_p is not None and (mu_p.requires_grad or x_p.requires_grad)


def through_formula(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Plain torch around the noise, which is a constant: right under any nesting of transforms."""
    return formula(library.with_noise(call))


def refuse_distributed(call: Call) -> None:
    for t in call[:-1]:
        if any(base.__name__ == "DTensor" for base in type(t).__mro__):
            checks.fail(
                TypeError,
                "reparam_kernels",
                "mu and the tensors that go with it must be a tensor of this process",
                "DTensor",
                "Call on the local shard, t.to_local(), with a seed of its own for each rank.",
            )


def noise(out: Tensor, seed: Tensor) -> Tensor:
    """The noise of `seed`: in `out`, or where that cannot be written to, in a tensor like it."""
    if torch.compiler.is_compiling() or modes.transforming() or modes.recording() or backends.of(out.device) is None:
        return library.noise(seed, out.shape).to(out.dtype)
    fresh = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    library.kernels_of(out).randn(fresh, seed)
    return fresh if fresh is out else out.copy_(fresh)
