"""The kernels as three registered ops, for whatever follows torch's ops instead of running Python.

Each has a schema, a rule of shapes, a gradient and a rule for vmap. What a call does not ask for is an empty tensor.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .reference import formula
from .spec import Call, Spec, accumulate_dtype, positive, unpacked

_OPS = torch.library.Library("reparam_kernels", "DEF")
_TENSORS = "Tensor mu, Tensor? x, Tensor? mu_p, Tensor? x_p, Tensor? seed, Tensor? eps"
_SPEC = "bool z, bool kl, SymInt[]? sample_shape, int event_ndim, str param, float min_std, float[]? clamp, int? packed"
_OPS.define(f"forward({_TENSORS}, {_SPEC}) -> (Tensor, Tensor)")
_OPS.define(
    f"backward({_TENSORS}, {_SPEC}, Tensor? dz, Tensor? dkl, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
_OPS.define("noise(Tensor seed, SymInt[] size, SymInt samples) -> Tensor")
_ops = torch.ops.reparam_kernels


def forward(call: Call) -> tuple[Tensor | None, Tensor | None]:
    """(z, kl), as one op."""
    z, kl = _ops.forward(*call[:-1], *options_of(call.spec))
    return z if call.spec.z else None, kl if call.spec.kl else None


def noise(seed: Tensor, size: Sequence[int], samples: int = 1) -> Tensor:
    """eps in float32, as one op; each seed names an equal part of what follows the samples."""
    return _ops.noise(seed, size, samples)  # type: ignore[no-any-return]


def backward(call: Call, dz: Tensor | None, dkl: Tensor | None, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The gradients to mu, x, mu_p and x_p, as one op."""
    found = _ops.backward(*call[:-1], *options_of(call.spec), dz, dkl, wanted)
    return [grad if want else None for grad, want in zip(found, wanted, strict=True)]


def with_noise(call: Call) -> Call:
    """The call with its eps as a tensor, made by the kernels; the same numbers that they would have used."""
    if call.seed is None or not call.spec.z:
        return call
    shape = (*call.spec.sample_shape, *unpacked(call)[0].shape)
    eps = noise(call.seed, shape, math.prod(call.spec.sample_shape))
    return call._replace(seed=None, eps=eps)


def gradients(
    call: Call, dz: Tensor | None, dkl: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients to mu, x, mu_p and x_p by the kernels; packed: to the moments, None, mu_p and x_p."""
    dz, dkl = (g if g is None else positive(g) for g in (dz, dkl))
    dmu, dx, dmu_p, dx_p = kernels_of(call.mu).backward(call, dz, dkl, wanted)
    if call.mu_p is not None:
        dmu_p, dx_p = reduced(dmu_p, call.mu_p), reduced(dx_p, call.x_p)
    return dmu, dx, dmu_p, dx_p


def differentiable_gradients(
    call: Call, dz: Tensor | None, dkl: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The same as a function that autograd can differentiate again: the formula's own gradients."""
    with torch.enable_grad():
        call = Call._make((*aliases(call[:4]), *call[4:]))
        inputs = [t for t, want in zip(call[:4], wanted, strict=True) if want and t is not None]
        outputs = formula(with_noise(call))
        pairs = [(y, g) for y, g in zip(outputs, (dz, dkl), strict=True) if y is not None and g is not None]
        if not pairs:
            return [None] * 4
        ys, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, inputs, grads, create_graph=True, allow_unused=True))
    return [next(found) if want else None for want in wanted]


def aliases(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each as a node of its own: one input may be another, or be computed from it, and counts once all the same."""
    return [t if t is None else t.view_as(t) for t in tensors]


def kernels_of(mu: Tensor) -> ModuleType:
    backend = backends.of(mu.device)
    assert backend is not None  # the executors came here because there is one
    return backend


def reduced(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient to an expanded prior, summed to its own shape in an order that does not depend on threads."""
    if grad is None or like is None or grad.shape == like.shape:
        return grad
    if like.numel() != 1:
        return grad.sum_to_size(like.shape).to(like.dtype)
    parts = grad.reshape(-1)
    while parts.numel() > 1024:  # torch splits a sum to one number over its threads, shorter ones it does not
        whole = parts.numel() // 1024 * 1024
        parts = torch.cat([parts[:whole].view(-1, 1024).sum(1), parts[whole:].sum(0, keepdim=True)])
    return parts.sum().to(like.dtype).reshape(like.shape)


# ---- kernels


def call_of(tensors: Sequence[Tensor | None], options: Sequence[Any]) -> Call:
    """A call from an op's arguments; a subclass of Tensor that got this far is read as its memory."""
    plain = [t.as_subclass(Tensor) if t is not None and type(t) is not Tensor else t for t in tensors]
    return Call._make((*plain, spec_of(options)))


def options_of(spec: Spec) -> Spec:
    """As the ops take them: AOTInductor hands an empty list on as None, so None it is."""
    return spec._replace(sample_shape=spec.sample_shape or None)  # type: ignore[arg-type]


def spec_of(options: Sequence[Any]) -> Spec:
    """The options as they were before the dispatcher made lists of tuples."""
    spec = Spec(*options)
    clamp = None if spec.clamp is None else (spec.clamp[0], spec.clamp[1])
    return spec._replace(sample_shape=tuple(spec.sample_shape or ()), clamp=clamp)


@torch.library.impl(_OPS, "forward", "CompositeExplicitAutograd")
def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    call = call_of(args[:6], args[6:])
    z, kl = kernels_of(call.mu).forward(call)
    return tuple(call.mu.new_empty(0) if t is None else t for t in (z, kl))  # type: ignore[return-value]


@torch.library.impl(_OPS, "backward", "CompositeExplicitAutograd")
def _backward(*args: Any) -> tuple[Tensor, ...]:
    call, (dz, dkl, wanted) = call_of(args[:6], args[6:14]), args[14:]
    found = gradients(call, dz, dkl, wanted)
    asked = zip(found, call[:4], wanted, strict=True)
    return tuple(
        call.mu.new_empty(0) if not want or like is None else like.new_zeros(like.shape) if grad is None else grad
        for grad, like, want in asked
    )


@torch.library.impl(_OPS, "noise", "CompositeExplicitAutograd")
def _noise(seed: Tensor, size: Sequence[int], samples: int) -> Tensor:
    """eps in float32: `size` begins with the samples, and each seed names an equal part of the rest."""
    seed = seed.as_subclass(Tensor)
    if backends.of(seed.device) is None:
        return reference.noise(seed, tuple(size), samples).float()
    part = math.prod(size) // max(samples * seed.numel(), 1)
    parts = seed.new_empty((seed.numel(), samples, part), dtype=torch.float32)
    kernels_of(seed).randn(parts, seed)
    return parts.movedim(0, 1).reshape(-1).view(size)  # contiguous, whatever movedim leaves


# ---- shapes


@torch.library.register_fake("reparam_kernels::forward", lib=_OPS)
def _forward_shapes(*args: Any) -> tuple[Tensor, Tensor]:
    call = Call._make((*args[:6], spec_of(args[6:])))
    mu, spec = unpacked(call)[0], call.spec
    z = mu.new_empty((*spec.sample_shape, *mu.shape)) if spec.z else mu.new_empty(0)
    if not spec.kl:
        return z, mu.new_empty(0)
    return z, mu.new_empty(mu.shape[: mu.dim() - spec.event_ndim], dtype=accumulate_dtype(mu.dtype))


@torch.library.register_fake("reparam_kernels::backward", lib=_OPS)
def _backward_shapes(*args: Any) -> tuple[Tensor, ...]:
    wanted = args[-1]
    found = zip(args[:4], wanted, strict=True)
    return tuple(args[0].new_empty(0) if not want or t is None else t.new_empty(t.shape) for t, want in found)


@torch.library.register_fake("reparam_kernels::noise", lib=_OPS)
def _noise_shape(seed: Tensor, size: Sequence[int], samples: int) -> Tensor:
    return seed.new_empty(size, dtype=torch.float32)


# ---- gradients


def _save_forward(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]
    ctx.set_materialize_grads(False)


def _forward_gradient(ctx: Any, dz: Tensor | None, dkl: Tensor | None) -> tuple[Any, ...]:
    call = Call._make((*ctx.saved_tensors, spec_of(ctx.options)))
    incoming = dz if call.spec.z else None, dkl if call.spec.kl else None
    return *backward(call, *incoming, ctx.needs_input_grad[:4]), *[None] * 10


def _save_backward(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6], *inputs[14:16])
    ctx.options, ctx.wanted = inputs[6:14], inputs[16]
    ctx.set_materialize_grads(False)


def _backward_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        *first, seed, eps, dz, dkl = ctx.saved_tensors
        *first, dz, dkl = inputs = aliases((*first, dz, dkl))
        call = Call._make((*first, seed, eps, spec_of(ctx.options)))
        outputs = differentiable_gradients(call, dz, dkl, ctx.wanted)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y is not None and g is not None and y.requires_grad]
    needed = [*ctx.needs_input_grad[:4], *ctx.needs_input_grad[14:16]]
    asked = [t for t, need in zip(inputs, needed, strict=True) if t is not None and need]
    found: Any = iter([None] * len(asked))
    if pairs and asked:
        ys, gs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, asked, gs, create_graph=create_graph, allow_unused=True))
    *to_inputs, to_dz, to_dkl = (next(found) if need else None for need in needed)
    return *to_inputs, *[None] * 10, to_dz, to_dkl, None


torch.library.register_autograd("reparam_kernels::forward", _forward_gradient, setup_context=_save_forward, lib=_OPS)
torch.library.register_autograd("reparam_kernels::backward", _backward_gradient, setup_context=_save_backward, lib=_OPS)


# ---- vmap of an op itself, as an exported program under vmap meets it


@torch.library.register_vmap("reparam_kernels::noise", lib=_OPS)
def _noise_vmap(info: Any, in_dims: Any, seed: Tensor, size: Sequence[int], samples: int) -> tuple[Tensor, int]:
    """The batch becomes more parts, each with its own seed."""
    seeds = seed.movedim(in_dims[0], 0)
    n = math.prod(size) // max(samples, 1)
    eps = noise(seeds.reshape(-1).contiguous(), (samples, seeds.shape[0], n), samples)
    return eps.movedim(1, 0).contiguous().view(seeds.shape[0], *size), 0


def _one_by_one(op: Any) -> Any:
    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        def item(i: int) -> Any:
            return op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))

        found = tuple(map(torch.stack, zip(*map(item, range(info.batch_size)), strict=True)))
        return found, (0,) * len(found)

    return rule


torch.library.register_vmap("reparam_kernels::forward", _one_by_one(_ops.forward), lib=_OPS)
torch.library.register_vmap("reparam_kernels::backward", _one_by_one(_ops.backward), lib=_OPS)
