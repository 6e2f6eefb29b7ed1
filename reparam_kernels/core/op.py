"""The record of an op, and what is derived from it: registration with torch, autograd, fake tensors and vmap.

The record holds the op's arguments (a NamedTuple of tensors and, last, a NamedTuple of options), a formula in plain
torch, the shapes of its outputs, and a package with a module of kernels for each backend. Two registered ops, `name`
and `name_backward`, serve torch.compile, export and dispatch modes; an autograd.Function serves the eager path.
In a registered op, an output that is not asked for and a gradient that is not wanted are empty tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from . import backends, torch_modes

A = TypeVar("A", bound=Any)  # the type of the arguments
Outputs = tuple[Tensor | None, ...]

LIBRARY = torch.library.Library("reparam_kernels", "DEF")
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    str: "str",
    tuple[int, ...]: "SymInt[]?",  # AOTInductor passes an empty list as None
    tuple[float, float] | None: "float[]?",
}


class Shape(NamedTuple):
    sizes: tuple[int, ...]
    dtype: torch.dtype


class Op(Generic[A]):
    """One op. Its construction registers it with torch.

    name: the name of the registered op.
    arguments: a NamedTuple type; its first fields are `inputs`, its last is a NamedTuple of options.
    inputs: the names of the tensors that get gradients.
    outputs: the names of the outputs.
    formula: arguments -> outputs in plain torch, differentiable to any order; None for an output not asked for.
    saved: the names of what forward computes for backward alone: the last tensors among the arguments, None in a
        forward call.
    shapes: arguments -> a Shape for each output and each saved tensor, None for one not asked for.
    package: holds cpu.py and triton.py, each with forward(arguments) -> outputs and backward(arguments, output
        gradients, wanted) -> input gradients, contiguous. A gradient may have the shape to which its input expands.
        An op with saved tensors also has forward_saving(arguments) -> outputs, saved.
    with_noise: arguments -> arguments whose random numbers are tensors, the same numbers as the kernels would use.
    """

    def __init__(
        self,
        name: str,
        arguments: type[A],
        *,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        saved: tuple[str, ...] = (),
        formula: Callable[[A], Outputs],
        shapes: Callable[[A], tuple[Shape | None, ...]],
        package: str,
        with_noise: Callable[[A], A] = lambda arguments: arguments,
    ) -> None:
        self.name, self.arguments, self.formula, self.shapes = name, arguments, formula, shapes
        self.package, self.with_noise = package, with_noise
        hints = get_type_hints(arguments)
        *tensors, options = hints
        self.n_inputs, self.n_tensors, self.n_outputs = len(inputs), len(tensors), len(outputs)
        self.n_given = self.n_tensors - len(saved)
        self.options: Any = hints[options]
        self._option_types = list(get_type_hints(self.options).values())
        self.function = autograd_function(self)
        self._register({n: hints[n] for n in tensors} | get_type_hints(self.options), inputs, outputs, saved)

    # The three ways to run. execute.py chooses between them and the formula.

    def kernels(self, device: torch.device) -> Any:
        """Return the module of kernels for a device, or None if the formula runs there."""
        return backends.kernels(self.package, device)

    def eager(self, arguments: A) -> Outputs:
        """Run the kernels, under autograd."""
        return self.function.apply(arguments, *arguments[: self.n_inputs])  # type: ignore[no-any-return]

    def registered(self, arguments: A) -> Outputs:
        """Run the registered op."""
        outputs = as_tuple(self._forward_op(*self.flatten(arguments)))
        asked = zip(outputs, self.shapes(arguments), range(self.n_outputs), strict=False)
        return tuple(None if shape is None else t for t, shape, _ in asked)

    def by_formula(self, arguments: A) -> Outputs:
        """Run the formula with the kernels' noise as a constant. This is correct under any nesting of transforms."""
        return self.formula(self.with_noise(arguments))

    def forward_saving(self, arguments: A) -> tuple[Outputs, Outputs]:
        """Run the kernels; return the outputs and the saved tensors."""
        kernels = self.kernels(arguments[0].device)
        if self.n_given == self.n_tensors:
            return kernels.forward(arguments), ()
        return kernels.forward_saving(arguments)  # type: ignore[no-any-return]

    # Gradients.

    def gradients(self, arguments: A, grads: Outputs, wanted: Sequence[bool]) -> Outputs:
        """Compute the gradients to the inputs by the kernels, each in the shape and dtype of its input."""
        grads = tuple([g if g is None else resolve_neg(g) for g in grads])
        input_grads = self.kernels(arguments[0].device).backward(arguments, grads, wanted)
        pairs = zip(input_grads, arguments[: self.n_inputs], strict=True)
        return tuple([g if g is None or g.shape == t.shape else sum_to_shape(g, t) for g, t in pairs])

    def registered_gradients(self, arguments: A, grads: Outputs, wanted: Sequence[bool]) -> Outputs:
        """Compute the same gradients by the registered op."""
        input_grads = as_tuple(self._backward_op(*self.flatten(arguments), *grads, list(wanted)))
        return tuple(g if want else None for g, want in zip(input_grads, wanted, strict=True))

    def differentiable_gradients(self, arguments: A, grads: Outputs, wanted: Sequence[bool]) -> Outputs:
        """Compute the same gradients by autograd of the formula, so that autograd can differentiate them again."""
        n = self.n_inputs
        with torch.enable_grad():
            inputs = fresh_views(arguments[:n])
            outputs = self.by_formula(self.arguments._make((*inputs, *arguments[n:])))
            pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y is not None and g is not None]
            asked = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
            if not pairs:
                return (None,) * n
            ys, gs = zip(*pairs, strict=True)
            asked_grads = iter(torch.autograd.grad(ys, asked, gs, create_graph=True, allow_unused=True))
        return tuple(next(asked_grads) if want else None for want in wanted)

    # The arguments as torch's dispatcher takes them: one flat list.

    def flatten(self, arguments: A) -> tuple[Any, ...]:
        *tensors, options = arguments
        return *tensors, *(None if value == () else value for value in options)

    def unflatten(self, values: Sequence[Any]) -> A:
        """Rebuild the arguments. The dispatcher has turned their tuples into lists."""
        tensors, options = values[: self.n_tensors], values[self.n_tensors :]
        typed = (
            tuple(value or ()) if kind == tuple[int, ...] else tuple(value) if isinstance(value, list) else value
            for kind, value in zip(self._option_types, options, strict=True)
        )
        return self.arguments._make((*tensors, self.options._make(typed)))  # type: ignore[no-any-return]

    def _register(
        self, fields: dict[str, Any], inputs: tuple[str, ...], outputs: tuple[str, ...], saved: tuple[str, ...]
    ) -> None:
        arguments = ", ".join(f"{SCHEMA_TYPES[kind]} {field}" for field, kind in fields.items())
        grads = ", ".join(f"Tensor? d{output}" for output in outputs)
        forward, backward = self.name, f"{self.name}_backward"
        LIBRARY.define(f"{forward}({arguments}) -> {returns(outputs + saved)}")
        LIBRARY.define(f"{backward}({arguments}, {grads}, bool[] wanted) -> {returns(inputs)}")
        self._forward_op = getattr(torch.ops.reparam_kernels, forward)
        self._backward_op = getattr(torch.ops.reparam_kernels, backward)
        for op, rules in ((forward, ForwardRules(self)), (backward, BackwardRules(self))):
            qualified = f"reparam_kernels::{op}"
            torch.library.impl(LIBRARY, op, "CompositeExplicitAutograd")(rules.run)
            torch.library.register_fake(qualified, rules.fake, lib=LIBRARY)
            torch.library.register_autograd(qualified, rules.gradient, setup_context=rules.save, lib=LIBRARY)
            torch.library.register_vmap(qualified, vmap_by_loop(getattr(torch.ops.reparam_kernels, op)), lib=LIBRARY)


class ForwardRules:
    """The registered forward op: its implementation, fake and gradient."""

    def __init__(self, op: Op[Any]) -> None:
        self.op = op

    def run(self, *values: Any) -> Any:
        arguments = self.op.unflatten(list(map(as_plain_tensor, values)))
        outputs, saved = self.op.forward_saving(arguments)
        return one_or_all(arguments[0].new_empty(0) if t is None else t for t in (*outputs, *saved))

    def fake(self, *values: Any) -> Any:
        first = values[0]
        shapes = self.op.shapes(self.op.unflatten(values))
        return one_or_all(first.new_empty(0) if s is None else first.new_empty(s.sizes, dtype=s.dtype) for s in shapes)

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.save_for_backward(*inputs[: self.op.n_given], *as_tuple(output)[self.op.n_outputs :])
        ctx.options = inputs[self.op.n_tensors :]
        ctx.set_materialize_grads(False)

    def gradient(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        op, wanted = self.op, ctx.needs_input_grad[: self.op.n_inputs]
        tensors = ctx.saved_tensors
        shapes = op.shapes(op.unflatten((*tensors, *ctx.options)))
        saved = [None if s is None else t for t, s in zip(tensors[op.n_given :], shapes[op.n_outputs :], strict=True)]
        arguments = op.unflatten((*tensors[: op.n_given], *saved, *ctx.options))
        asked = tuple(None if s is None else g for g, s, _ in zip(grads, shapes, range(op.n_outputs), strict=False))
        input_grads = op.registered_gradients(arguments, asked, wanted)
        return *input_grads, *[None] * (len(ctx.needs_input_grad) - len(input_grads))


class BackwardRules:
    """The registered backward op. Its gradient is autograd's of the formula's gradient."""

    def __init__(self, op: Op[Any]) -> None:
        self.op = op

    def split(self, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[bool]]:
        """Return the forward's flat arguments, the output gradients, and which input gradients are wanted."""
        *rest, wanted = values
        return rest[: -self.op.n_outputs], rest[-self.op.n_outputs :], wanted

    def run(self, *values: Any) -> Any:
        flat, grads, wanted = self.split(list(map(as_plain_tensor, values)))
        arguments = self.op.unflatten(flat)
        input_grads = self.op.gradients(arguments, tuple(grads), wanted)
        inputs = arguments[: self.op.n_inputs]
        return one_or_all(
            arguments[0].new_empty(0) if not want or t is None else t.new_zeros(t.shape) if grad is None else grad
            for grad, t, want in zip(input_grads, inputs, wanted, strict=True)
        )

    def fake(self, *values: Any) -> Any:
        flat, _, wanted = self.split(values)
        inputs = zip(flat[: self.op.n_inputs], wanted, strict=True)
        return one_or_all(flat[0].new_empty(0) if not want or t is None else t.new_empty(t.shape) for t, want in inputs)

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        flat, grads, ctx.wanted = self.split(inputs)
        ctx.save_for_backward(*flat[: self.op.n_tensors], *grads)
        ctx.options = flat[self.op.n_tensors :]
        ctx.set_materialize_grads(False)

    def gradient(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        op, n = self.op, self.op.n_inputs
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            saved = ctx.saved_tensors
            variables = fresh_views((*saved[:n], *saved[op.n_tensors :]))
            arguments = op.unflatten((*variables[:n], *saved[n : op.n_tensors], *ctx.options))
            outputs = op.differentiable_gradients(arguments, tuple(variables[n:]), ctx.wanted)
        pairs = [
            (y, g) for y, g in zip(outputs, grads, strict=True) if y is not None and g is not None and y.requires_grad
        ]
        after = len(ctx.needs_input_grad) - 1 - op.n_outputs  # index of the first output gradient
        needed = [*ctx.needs_input_grad[:n], *ctx.needs_input_grad[after:-1]]
        asked = [t for t, need in zip(variables, needed, strict=True) if t is not None and need]
        asked_grads: Any = iter([None] * len(asked))
        if pairs and asked:
            ys, gs = zip(*pairs, strict=True)
            asked_grads = iter(torch.autograd.grad(ys, asked, gs, create_graph=create_graph, allow_unused=True))
        to_all = [next(asked_grads) if need else None for need in needed]
        return *to_all[:n], *[None] * (after - n), *to_all[n:], None


def autograd_function(op: Op[Any]) -> Any:
    """Make the autograd.Function of the eager path. It saves the arguments and nothing else."""

    def forward(ctx: Any, arguments: Any, *inputs: Tensor | None) -> Outputs:
        outputs, saved = op.forward_saving(arguments)
        ctx.save_for_backward(*arguments[: op.n_given], *saved)
        ctx.options = arguments[-1]
        ctx.set_materialize_grads(False)
        return outputs

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = op.arguments._make((*ctx.saved_tensors, ctx.options))
        wanted = ctx.needs_input_grad[1:]
        if torch.compiler.is_compiling():
            return None, *op.registered_gradients(arguments, grads, wanted)
        if torch.is_grad_enabled() or torch_modes.is_batched_grad(*grads):
            return None, *op.differentiable_gradients(arguments, grads, wanted)
        return None, *op.gradients(arguments, grads, wanted)

    base: Any = torch.autograd.Function
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(base)(f"reparam_kernels::{op.name}", (base,), methods)  # profilers show the name


def vmap_by_loop(op: Any) -> Any:
    """Make the vmap rule of a registered op, which an exported program needs: one call for each item."""

    def rule(info: Any, in_dims: Any, *values: Any) -> tuple[Any, Any]:
        def item(i: int) -> tuple[Tensor, ...]:
            chosen = (v.select(d, i) if isinstance(d, int) else v for v, d in zip(values, in_dims, strict=True))
            return as_tuple(op(*chosen))

        stacked = [torch.stack(items) for items in zip(*map(item, range(info.batch_size)), strict=True)]
        return one_or_all(stacked), one_or_all([0] * len(stacked))

    return rule


def returns(names: tuple[str, ...]) -> str:
    return f"({', '.join(['Tensor'] * len(names))})"


def one_or_all(values: Any) -> Any:
    """Return a tuple, or its element if there is one: an op with one output returns no tuple."""
    outputs = tuple(values)
    return outputs if len(outputs) > 1 else outputs[0]


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def as_plain_tensor(value: Any) -> Any:
    """View a tensor of a subclass as a plain Tensor, so that its memory is read."""
    return value.as_subclass(Tensor) if isinstance(value, Tensor) and type(value) is not Tensor else value


def resolve_neg(t: Tensor) -> Tensor:
    """Resolve a lazy negation; torch.compile makes none."""
    return t if torch.compiler.is_compiling() or not t.is_neg() else t.resolve_neg()


def fresh_views(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return views, so that inputs which are aliased or computed from each other are separate autograd nodes."""
    return [t if t is None else t.view_as(t) for t in tensors]


def sum_to_shape(grad: Tensor, like: Tensor) -> Tensor:
    """Sum a gradient to the shape of an input that was expanded, in an order that does not depend on threads."""
    if like.numel() != 1:
        return grad.sum_to_size(like.shape).to(like.dtype)
    parts = grad.reshape(-1)
    while parts.numel() > 1024:  # torch splits a longer sum to one number over its threads
        whole = parts.numel() // 1024 * 1024
        parts = torch.cat([parts[:whole].view(-1, 1024).sum(1), parts[whole:].sum(0, keepdim=True)])
    return parts.sum().to(like.dtype).reshape(like.shape)
