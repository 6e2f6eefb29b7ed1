"""The record of an op, and what is derived from it: registration with torch, autograd, fake tensors and vmap.

The record holds the op's arguments (a NamedTuple of tensors and, last, a NamedTuple of options), a formula in plain
torch, the shapes of its outputs, and a package with a module of kernels for each backend. Two registered ops, `name`
and `name_backward`, serve torch.compile, export and dispatch modes; an autograd.Function serves the eager path.
In a registered op, an output that is not asked for and a gradient that is not wanted are empty tensors.

Below autograd a registered op becomes its launch, the op `<name>_launch`, which is what a compiled graph holds. A
launch has no autograd, for which torch would run Python at each call. It takes the options as one string, since torch
converts each argument twice, and returns only the tensors that are asked for.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from . import backends, torch_modes
from .formats import empty_like, format_of

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


_PLAIN = frozenset((Tensor, type(None), str, list))  # what a launch is given, but for a tensor of a subclass
SIZES = tuple[int, ...]  # the type of an option that may be symbolic, so a launch takes it apart from the others


class Shape(NamedTuple):
    sizes: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format = torch.contiguous_format


class Op(Generic[A]):
    """One op. Its construction registers it with torch.

    name: the name of the registered op.
    arguments: a NamedTuple type; its first fields are `inputs`, its last is a NamedTuple of options.
    inputs: the names of the tensors that get gradients.
    outputs: the names of the outputs.
    formula: arguments -> outputs in plain torch, differentiable to any order; None for an output not asked for.
    gradient_formula: arguments, output gradients -> the outputs from which autograd computes the gradients to the
        inputs. Where an output gradient is 0 and a slope is not finite, it holds the inputs constant. Default: formula.
    saved: the names of what forward computes for backward alone: the last tensors among the arguments, None in a
        forward call.
    kept: arguments -> the same with each tensor that backward does not read replaced by one that it does, so that
        autograd keeps fewer.
    shapes: arguments -> a Shape for each output and each saved tensor, None for one not asked for.
    package: holds cpu.py and triton.py, each with forward(arguments) -> outputs and backward(arguments, output
        gradients, wanted) -> input gradients. An op with saved tensors also has forward_saving(arguments) -> outputs,
        saved.
    expands: the inputs that may be smaller than their gradients from the kernels, which are then summed.
    keeps_format: the kernels give each gradient in the format of its input, by formats.py; else contiguous.
    with_noise: arguments -> arguments whose random numbers are tensors, the same numbers as the kernels would use.
    shard: arguments with DTensors -> those of this process's part, and a function that makes DTensors of its outputs.
        Default: DTensors are refused.
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
        gradient_formula: Callable[[A, Outputs], Outputs] | None = None,
        expands: tuple[str, ...] = (),
        keeps_format: bool = False,
        kept: Callable[[A], A] = lambda arguments: arguments,
        with_noise: Callable[[A], A] = lambda arguments: arguments,
        shard: Callable[[A], tuple[A, Callable[[Outputs], Outputs]]] | None = None,
    ) -> None:
        self.name, self.arguments, self.formula, self.shapes = name, arguments, formula, shapes
        self.package, self.with_noise, self.shard = package, with_noise, shard
        self.gradient_formula, self.kept, self.keeps_format = gradient_formula, kept, keeps_format
        hints = get_type_hints(arguments)
        *tensors, options = hints
        self._expands = [inputs.index(name) for name in expands]
        self.n_inputs, self.n_tensors, self.n_outputs = len(inputs), len(tensors), len(outputs)
        self.n_given = self.n_tensors - len(saved)
        self.options: Any = hints[options]
        self._option_types = get_type_hints(self.options)
        self._sizes = [name for name, kind in self._option_types.items() if kind == SIZES]
        self._read_options = lru_cache(maxsize=1024)(self._parse_options)
        self._apply, self._apply_formula = kernels_function(self), formula_function(self)
        self._register({n: hints[n] for n in tensors} | get_type_hints(self.options), inputs, outputs, saved)

    # The ways to run. execute.py chooses between them and the formula.

    def kernels(self, device: torch.device) -> Any:
        """Return the module of kernels for a device, or None if the formula runs there."""
        return backends.kernels(self.package, device)

    def eager(self, arguments: A) -> Outputs:
        """Run the kernels, under autograd."""
        return self._apply(arguments, *arguments[: self.n_inputs])  # type: ignore[no-any-return]

    def registered(self, arguments: A) -> Outputs:
        """Run the registered op."""
        outputs = as_tuple(self._forward_op(*self.flatten(arguments)))
        asked = zip(outputs, self.shapes(arguments), range(self.n_outputs), strict=False)
        return tuple(None if shape is None else t for t, shape, _ in asked)

    def by_formula(self, arguments: A) -> Outputs:
        """Run the formula with the kernels' noise as a constant. This is correct under any nesting of transforms."""
        return self.formula(self.with_noise(arguments))

    def in_place_of_kernels(self, arguments: A) -> Outputs:
        """Run the formula with noise of its own. In plain eager code its gradients follow the rule of the kernels."""
        inputs, others = arguments[: self.n_inputs], arguments[self.n_inputs : -1]
        plain = not (torch.compiler.is_compiling() or torch_modes.in_transform() or torch_modes.in_dispatch_mode())
        learns = torch.is_grad_enabled() and any_requires_grad(inputs) and not any_requires_grad(others)
        if self.gradient_formula is None or not plain or not learns:
            return self.formula(arguments)
        return self._apply_formula(arguments, *inputs)  # type: ignore[no-any-return]

    def forward_saving(self, arguments: A) -> tuple[Outputs, Outputs]:
        """Run the kernels; return the outputs and the saved tensors."""
        kernels = self.kernels(arguments[0].device)
        if self.n_given == self.n_tensors:
            return kernels.forward(arguments), ()
        return kernels.forward_saving(arguments)  # type: ignore[no-any-return]

    # Gradients.

    def empty_gradient(self, t: Tensor) -> Tensor:
        """Return an uninitialised gradient to an input."""
        return empty_like(t) if self.keeps_format else torch.empty_like(t, memory_format=torch.contiguous_format)

    def gradients(self, arguments: A, grads: Outputs, wanted: Sequence[bool]) -> Outputs:
        """Compute the gradients to the inputs by the kernels, each in the shape and dtype of its input."""
        for g in grads:
            if g is not None and g.is_neg():
                return self.gradients(arguments, tuple([g if g is None else resolve_neg(g) for g in grads]), wanted)
        input_grads: Outputs = self.kernels(arguments[0].device).backward(arguments, grads, wanted)
        for i in self._expands:
            g = input_grads[i]
            if g is not None and g.shape != arguments[i].shape:
                summed = sum_to_shape(g, arguments[i])
                if self.keeps_format and format_of(arguments[i]) is not torch.contiguous_format:
                    summed = empty_like(arguments[i]).copy_(summed)
                input_grads = (*input_grads[:i], summed, *input_grads[i + 1 :])
        return input_grads

    def registered_gradients(self, arguments: A, grads: Outputs, wanted: Sequence[bool]) -> Outputs:
        """Compute the same gradients by the registered op."""
        input_grads = as_tuple(self._backward_op(*self.flatten(arguments), *grads, list(wanted)))
        return tuple(g if want else None for g, want in zip(input_grads, wanted, strict=True))

    def differentiable_gradients(self, arguments: A, grads: Outputs, wanted: Sequence[bool]) -> Outputs:
        """Compute the same gradients by autograd of the formula, so that autograd can differentiate them again."""
        n, create_graph = self.n_inputs, torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = fresh_views(arguments[:n])
            variables = self.arguments._make((*inputs, *arguments[n:]))
            # autograd cannot differentiate outputs that depend on batched gradients
            rule = None if torch_modes.is_batched_grad(*grads) else self.gradient_formula
            outputs = self.formula(variables) if rule is None else rule(variables, grads)
            pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y is not None and g is not None]
            asked = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
            if not pairs:
                return (None,) * n
            ys, gs = zip(*pairs, strict=True)
            asked_grads = iter(torch.autograd.grad(ys, asked, gs, create_graph=create_graph, allow_unused=True))
        given = zip(inputs, wanted, strict=True)
        return tuple(next(asked_grads) if want and t is not None else None for t, want in given)

    # The arguments as torch's dispatcher takes them: one flat list.

    def flatten(self, arguments: A) -> tuple[Any, ...]:
        *tensors, options = arguments
        return *tensors, *(None if value == () else value for value in options)

    def unflatten(self, values: Sequence[Any]) -> A:
        """Rebuild the arguments. The dispatcher has turned their tuples into lists."""
        options = self._make_options(values[self.n_tensors :])
        return self.arguments._make((*values[: self.n_tensors], options))  # type: ignore[no-any-return]

    def _make_options(self, values: Sequence[Any]) -> Any:
        typed = (
            tuple(value or ()) if kind == SIZES else tuple(value) if isinstance(value, list) else value
            for kind, value in zip(self._option_types.values(), values, strict=True)
        )
        return self.options._make(typed)

    # The arguments as a launch takes them: the tensors, the options as one string, and those of them that are sizes.

    def to_launch(self, values: Sequence[Any], wanted: Sequence[bool] = ()) -> tuple[Any, ...]:
        """Return a launch's arguments for the flat list, and for which gradients are wanted."""
        options = dict(zip(self._option_types, values[self.n_tensors :], strict=True))
        text = json.dumps([[None if name in self._sizes else options[name] for name in options], list(wanted)])
        return *values[: self.n_tensors], text, *(options[name] for name in self._sizes)

    def from_launch(self, values: Sequence[Any]) -> tuple[A, tuple[bool, ...]]:
        """Rebuild the arguments, and which gradients are wanted."""
        n = self.n_tensors
        options, wanted = self._read_options(values[n])
        if any(values[n + 1 :]):
            given = zip(self._sizes, values[n + 1 :], strict=True)
            options = options._replace(**{name: tuple(sizes) for name, sizes in given if sizes})
        return self.arguments._make((*values[:n], options)), wanted

    def _parse_options(self, text: str) -> tuple[Any, tuple[bool, ...]]:
        options, wanted = json.loads(text)
        return self._make_options(options), tuple(wanted)

    def _register(
        self, fields: dict[str, Any], inputs: tuple[str, ...], outputs: tuple[str, ...], saved: tuple[str, ...]
    ) -> None:
        flat = [f"{SCHEMA_TYPES[kind]} {field}" for field, kind in fields.items()]
        launch = [*flat[: self.n_tensors], "str options", *(f"{SCHEMA_TYPES[SIZES]} {name}" for name in self._sizes)]
        grads = [f"Tensor? d{output}" for output in outputs]
        forward, backward = ForwardRules(self), BackwardRules(self)
        self._forward_op = define(self.name, flat, outputs + saved, launch, forward)
        last = [*grads, "bool[] wanted"]
        self._backward_op = define(f"{self.name}_backward", [*flat, *last], inputs, [*launch, *grads], backward)


def define(name: str, flat: list[str], results: tuple[str, ...], launch: list[str], rules: Any) -> Any:
    """Register an op and its launch, given the schemas of their arguments; return the op."""
    returned = f"({', '.join(['Tensor'] * len(results))})"
    LIBRARY.define(f"{name}({', '.join(flat)}) -> {returned}")
    LIBRARY.define(f"{name}_launch({', '.join(launch)}) -> Tensor[]")
    op, launch_op = (getattr(torch.ops.reparam_kernels, n) for n in (name, f"{name}_launch"))

    def in_full(make: Callable[..., list[Tensor]], values: tuple[Any, ...]) -> Any:
        """Make what a launch returns, and an empty tensor for each result that is not asked for."""
        launched = rules.to_launch(values)
        every = rules.asked(launched)
        made = iter(make(*launched))
        return one_or_all(next(made) if asked else values[0].new_empty(0) for asked in every)

    def lower(*values: Any) -> Any:
        return in_full(launch_op.default, values)

    def fake(*values: Any) -> Any:
        return in_full(rules.fake, values)

    for key in ("ADInplaceOrView", "CompositeExplicitAutograd"):  # below autograd; and where inference mode skips that
        torch.library.impl(LIBRARY, name, key)(lower)
    torch.library.impl(LIBRARY, f"{name}_launch", "CompositeExplicitAutograd")(rules.run)
    LIBRARY.impl(f"{name}_launch", torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"reparam_kernels::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"reparam_kernels::{name}_launch", rules.fake, lib=LIBRARY)
    qualified = f"reparam_kernels::{name}"
    torch.library.register_autograd(qualified, rules.gradient, setup_context=rules.save, lib=LIBRARY)
    torch.library.register_vmap(qualified, vmap_by_loop(op), lib=LIBRARY)
    return op


class ForwardRules:
    """The registered forward op: its launch, the launch's implementation and fake, and the op's gradient."""

    def __init__(self, op: Op[Any]) -> None:
        self.op = op

    def to_launch(self, values: Sequence[Any]) -> tuple[Any, ...]:
        return self.op.to_launch(values)

    def asked(self, values: Sequence[Any]) -> list[bool]:
        """Return which outputs a launch makes."""
        return [shape is not None for shape in self.op.shapes(self.op.from_launch(values)[0])]

    def run(self, *values: Any) -> list[Tensor]:
        arguments, _ = self.op.from_launch(plain_tensors(values))
        outputs, saved = self.op.forward_saving(arguments)
        return [t for t in (*outputs, *saved) if t is not None]

    def fake(self, *values: Any) -> list[Tensor]:
        shapes = self.op.shapes(self.op.from_launch(values)[0])
        return [empty_as(s, values[0]) for s in shapes if s is not None]

    def save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        kept = self.op.kept(self.op.unflatten(inputs))
        ctx.save_for_backward(*kept[: self.op.n_given], *as_tuple(output)[self.op.n_outputs :])
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
    """The same for the registered backward op. Its gradient is autograd's of the formula's gradient."""

    def __init__(self, op: Op[Any]) -> None:
        self.op = op

    def split(self, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[bool]]:
        """Return the forward's flat arguments, the output gradients, and which input gradients are wanted."""
        *rest, wanted = values
        return rest[: -self.op.n_outputs], rest[-self.op.n_outputs :], wanted

    def to_launch(self, values: Sequence[Any]) -> tuple[Any, ...]:
        flat, grads, wanted = self.split(values)
        return *self.op.to_launch(flat, wanted), *grads

    def asked(self, values: Sequence[Any]) -> list[bool]:
        """Return which gradients a launch makes."""
        arguments, wanted = self.op.from_launch(values[: -self.op.n_outputs])
        return [want and t is not None for t, want in zip(arguments, wanted, strict=False)]

    def run(self, *values: Any) -> list[Tensor]:
        op, values = self.op, plain_tensors(values)
        arguments, wanted = op.from_launch(values[: -op.n_outputs])
        grads = zip(op.gradients(arguments, values[-op.n_outputs :], wanted), arguments, wanted, strict=False)
        return [op.empty_gradient(t).zero_() if g is None else g for g, t, want in grads if want and t is not None]

    def fake(self, *values: Any) -> list[Tensor]:
        asked = zip(values, self.asked(values), strict=False)
        return [self.op.empty_gradient(t) for t, is_asked in asked if is_asked]

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
            outputs = op.differentiable_gradients(op.with_noise(arguments), tuple(variables[n:]), ctx.wanted)
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


def kernels_function(op: Op[Any]) -> Callable[..., Any]:
    """Return the apply of the eager path."""

    def gradients(arguments: Any, grads: Outputs, wanted: Sequence[bool]) -> Outputs:
        if torch.compiler.is_compiling():
            return op.registered_gradients(arguments, grads, wanted)
        if torch.is_grad_enabled() or torch_modes.is_batched_grad(*grads):
            return op.differentiable_gradients(op.with_noise(arguments), grads, wanted)
        return op.gradients(arguments, grads, wanted)

    return autograd_function(op, op.forward_saving, gradients)


def formula_function(op: Op[Any]) -> Callable[..., Any]:
    """Return the apply that runs the formula in place of the kernels."""
    nothing = (None,) * (op.n_tensors - op.n_given)
    return autograd_function(op, lambda arguments: (op.formula(arguments), nothing), op.differentiable_gradients)


def autograd_function(
    op: Op[Any],
    run: Callable[[Any], tuple[Outputs, Outputs]],
    gradients: Callable[[Any, Outputs, Sequence[bool]], Outputs],
) -> Callable[..., Any]:
    """Make an autograd.Function, and return its apply.

    It saves what backward reads of the arguments, and what `run` returns besides.
    """

    def forward(ctx: Any, arguments: Any, *inputs: Tensor | None) -> Outputs:
        outputs, saved = run(arguments)
        ctx.save_for_backward(*op.kept(arguments)[: op.n_given], *saved)
        ctx.options = arguments[-1]
        ctx.set_materialize_grads(False)
        return outputs

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = op.arguments._make((*ctx.saved_tensors, ctx.options))
        return None, *gradients(arguments, grads, ctx.needs_input_grad[1:])

    base: Any = torch.autograd.Function
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(base)(f"reparam_kernels::{op.name}", (base,), methods)  # profilers show the name
    # Function.apply first looks for a transform, in which this path does not run: a tenth of a small call.
    return super(base, function).apply  # type: ignore[no-any-return]


def vmap_by_loop(op: Any) -> Any:
    """Make the vmap rule of a registered op, which an exported program needs: one call for each item."""

    def rule(info: Any, in_dims: Any, *values: Any) -> tuple[Any, Any]:
        def item(i: int) -> tuple[Tensor, ...]:
            chosen = (v.select(d, i) if isinstance(d, int) else v for v, d in zip(values, in_dims, strict=True))
            return as_tuple(op(*chosen))

        stacked = [torch.stack(items) for items in zip(*map(item, range(info.batch_size)), strict=True)]
        return one_or_all(stacked), one_or_all([0] * len(stacked))

    return rule


def one_or_all(values: Any) -> Any:
    """Return a tuple, or its element if there is one: an op with one output returns no tuple."""
    outputs = tuple(values)
    return outputs if len(outputs) > 1 else outputs[0]


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def empty_as(shape: Shape, like: Tensor) -> Tensor:
    """Return an uninitialised tensor of a shape, on the device of another one."""
    return torch.empty(shape.sizes, dtype=shape.dtype, device=like.device, memory_format=shape.memory_format)


def plain_tensors(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """View tensors of subclasses as plain ones, so that their memory is read."""
    if _PLAIN.issuperset(map(type, values)):
        return values
    return tuple(v.as_subclass(Tensor) if isinstance(v, Tensor) else v for v in values)


def resolve_neg(t: Tensor) -> Tensor:
    """Resolve a lazy negation; torch.compile makes none."""
    return t if torch.compiler.is_compiling() or not t.is_neg() else t.resolve_neg()


def any_requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    for t in tensors:  # noqa: SIM110  a generator expression is slower
        if t is not None and t.requires_grad:
            return True
    return False


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
