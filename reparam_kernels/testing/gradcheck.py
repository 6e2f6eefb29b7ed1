"""gradcheck of a whole model: autograd's slopes beside finite differences, in float64 and with a fixed seed."""

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .copies import copied, floating_tensors


class Slope(NamedTuple):
    """One comparison, along one entry of a tensor or, if entry is None, along a random direction through it."""

    tensor: str
    entry: tuple[int, ...] | None
    autograd: float
    numerical: float
    verdict: str  # "equal", "kink" or "wrong"

    @property
    def mismatch(self) -> float:
        return abs(self.autograd - self.numerical)


class GradcheckReport(NamedTuple):
    """The comparisons of gradcheck. As text, a table with a line for each tensor."""

    slopes: list[Slope]
    not_reached: tuple[str, ...] = ()  # the tensors that no output depends on

    @property
    def wrong(self) -> list[Slope]:
        return [s for s in self.slopes if s.verdict == "wrong"]

    def __str__(self) -> str:
        names = list(dict.fromkeys(s.tensor for s in self.slopes))
        width = max(map(len, [*names, "tensor"]))
        lines = [f"{'tensor':{width}}  slopes  kinks  wrong  largest mismatch"]
        for name in names:
            own = [s for s in self.slopes if s.tensor == name]
            kinks, wrong = (sum(s.verdict == verdict for s in own) for verdict in ("kink", "wrong"))
            largest = max((s.mismatch for s in own if s.verdict != "kink"), default=0.0)
            lines.append(f"{name:{width}}  {len(own):6}  {kinks:5}  {wrong:5}  {largest:16.1e}")
        lines += [f"not reached by autograd: {name}" for name in self.not_reached]
        for s in sorted(self.wrong, key=lambda s: -s.mismatch)[:10]:
            place = "a random direction" if s.entry is None else f"entry {list(s.entry)}"
            lines.append(f"wrong: {s.tensor}, {place}: autograd {s.autograd:.6g}, numerical {s.numerical:.6g}")
        return "\n".join(lines)


def gradcheck(
    function: Callable[..., Any],
    *inputs: Any,
    seed: int = 0,
    entries: int = 16,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
) -> GradcheckReport:
    """Compare autograd's gradients of a model or function with finite differences, under a fixed seed.

        |df/dp - (f(p + eps) - f(p - eps)) / (2 eps)| <= atol + rtol |df/dp|

    The check runs on a float64 copy of the model and of the inputs. Each evaluation starts from
    torch.manual_seed(seed), so that the noise and the masks of dropout repeat and the model is a function of its
    parameters. f is the only output if that is a scalar, and otherwise the sum of all outputs with fixed random
    weights. A slope at a kink, such as ReLU's at 0, is reported and is no error if autograd's lies between the slopes
    of the two sides. The model, its buffers and torch's generators stay as they are. A function whose backward is not
    its gradient by design fails, such as a straight-through estimator or the power iteration of spectral_norm in
    training mode.

    Args:
        function: an nn.Module, or a function. Every parameter of a module that requires a gradient is checked.
        inputs: its arguments. Those that require a gradient are checked too.
        seed: int, of torch's generators.
        entries: how many entries of each tensor are compared, chosen at random. A random direction through the whole
            tensor is compared besides.
        eps, atol, rtol: the step and the tolerances, as for torch.autograd.gradcheck.

    Returns:
        A GradcheckReport. Its `slopes` holds every comparison, `not_reached` names the tensors for which autograd has
        no gradient, and str() makes a table. An entry takes two evaluations or more.

    Raises:
        AssertionError: if a gradient is wrong. The text is the report.
        TypeError: if an output is not float64.
        ValueError: if nothing requires a gradient, or if f is not finite or differs between two evaluations.

    Source:
        torch.autograd.gradcheck, which takes a function of tensors that is deterministic.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> class Encoder(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return rk.reparameterize_kl(*super().forward(x).chunk(2, -1))
        >>> rk.testing.gradcheck(Encoder(3, 4), torch.ones(2, 3)).wrong
        []
    """
    f = SeededFunction(function, inputs, seed)
    center, magnitude = f()
    if center.item() != f()[0].item():
        raise ValueError(
            "gradcheck: the function must give the same value for the same seed; got "
            f"{center.item()} and {f()[0].item()}. Draw all random numbers from torch's default generators."
        )
    grads = torch.autograd.grad(center, list(f.variables.values()), allow_unused=True)
    generator = torch.Generator().manual_seed(seed)
    slopes = []
    for (name, variable), grad in zip(f.variables.items(), grads, strict=True):
        for entry, direction in directions(variable, entries, generator):
            slope = 0.0 if grad is None else (grad * direction).sum().item()

            def along(step: float, name: str = name, direction: Tensor = direction) -> float:
                return f(name, step * direction)[0].item()

            numerical, verdict = compare(slope, along, center.item(), magnitude, eps, atol, rtol)
            slopes.append(Slope(name, entry, slope, numerical, verdict))
    not_reached = (name for name, grad in zip(f.variables, grads, strict=True) if grad is None)
    report = GradcheckReport(slopes, tuple(not_reached))
    if report.wrong:
        raise AssertionError(f"gradcheck: gradients must equal finite differences; got\n{report}")
    return report


class SeededFunction:
    """A float64 copy of a module or function as a scalar function of its variables: the parameters and inputs."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...], seed: int) -> None:
        self.seed = seed
        self.inputs = [to_float64(value) for value in inputs]
        self.variables: dict[str, Tensor] = {
            f"input {i}": t for i, t in enumerate(self.inputs) if isinstance(t, Tensor) and t.requires_grad
        }
        self.function, self.module = function, None
        if isinstance(function, nn.Module):
            self.module = copied(function).double()
            known = {id(p) for p in self.module.parameters()}
            for module in self.module.modules():  # .double() leaves tensors that are no buffers as they are
                for name, value in vars(module).items():
                    if isinstance(value, (Tensor, list, tuple, dict)) and not name.startswith("_"):
                        setattr(module, name, to_float64(value, known))
            self.variables |= {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.variables:
            raise ValueError(
                "gradcheck: a parameter or an input must require a gradient; got none. "
                "Call requires_grad_() on the tensors to check."
            )
        self.devices = sorted({t.device.index for t in self.variables.values() if t.device.type == "cuda"})

    def __call__(self, name: str | None = None, shift: Tensor | float = 0.0) -> tuple[Tensor, float]:
        """Evaluate with one variable shifted. Return the value and the sum of the magnitudes of its terms."""
        with shifted(self.variables.get(name or ""), shift), torch.random.fork_rng(self.devices), float64_by_default():
            torch.manual_seed(self.seed)
            if self.module is None:
                output = self.function(*self.inputs)
            else:
                buffers = {n: b.clone() for n, b in self.module.named_buffers()}
                output = functional_call(self.module, buffers, tuple(self.inputs))
        return weighted_sum(list(floating_tensors(output)))


@contextmanager
def shifted(variable: Tensor | None, shift: Tensor | float) -> Iterator[None]:
    """Shift a variable in place, wherever the function holds it, and put its values back."""
    if variable is None:
        yield
        return
    before = variable.detach().clone()
    with torch.no_grad():
        variable += shift
    try:
        yield
    finally:
        with torch.no_grad():
            variable.copy_(before)


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Let a function that makes a tensor without a dtype make it in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def weighted_sum(outputs: list[Tensor]) -> tuple[Tensor, float]:
    if not outputs:
        raise TypeError("gradcheck: the function must return a floating output; got none. Return the loss.")
    for i, output in enumerate(outputs):
        if output.dtype != torch.float64:
            raise TypeError(
                f"gradcheck: every floating output must be float64; output {i} is {output.dtype}. "
                "Remove the conversion, or the autocast, inside the function."
            )
    if len(outputs) == 1 and outputs[0].dim() == 0:
        value, magnitude = outputs[0], outputs[0].abs()
    else:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.device) for t in outputs]
        terms = [(w * t).reshape(-1) for w, t in zip(weights, outputs, strict=True)]
        value, magnitude = torch.cat(terms).sum(), torch.cat(terms).abs().sum()
    if not value.isfinite():
        raise ValueError(
            f"gradcheck: the function must be finite; got {value.item()}. Choose inputs for which it is, or use anomaly"
            " detection to find where it is not."
        )
    return value, magnitude.item()


def directions(
    variable: Tensor, entries: int, generator: torch.Generator
) -> Iterator[tuple[tuple[int, ...] | None, Tensor]]:
    """Some entries, chosen at random, and a direction of unit length through all."""
    for flat in torch.randperm(variable.numel(), generator=generator)[:entries].tolist():
        direction = torch.zeros_like(variable)
        direction.view(-1)[flat] = 1.0
        yield tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), variable.shape)), direction
    direction = torch.randn(variable.shape, dtype=torch.float64, generator=generator).to(variable.device)
    yield None, direction / direction.norm()


def compare(
    slope: float,
    f: Callable[[float], float],
    center: float,
    magnitude: float,
    eps: float,
    atol: float,
    rtol: float,
) -> tuple[float, str]:
    """Return the numerical slope and the verdict on autograd's."""

    def tolerance(numerical: float, step: float) -> float:
        rounding = 8 * torch.finfo(torch.float64).eps * magnitude / step
        return atol + rtol * abs(numerical) + rounding

    first = math.nan
    for step in (eps, eps / 8, eps / 64):  # a shorter step leaves a kink nearby outside
        after, before = f(step), f(-step)
        numerical = (after - before) / (2 * step)
        first = numerical if math.isnan(first) else first
        if abs(slope - numerical) <= tolerance(numerical, step):
            return numerical, "equal"
    right, left = (after - center) / step, (center - before) / step
    slack = tolerance(max(abs(left), abs(right)), step)
    if abs(right - left) > slack and min(left, right) - slack <= slope <= max(left, right) + slack:
        return first, "kink"
    return first, "wrong"


def to_float64(value: Any, kept: Container[int] = ()) -> Any:
    """Copy the floating tensors of an argument, at any depth, as float64 leaves, but for those with an id in `kept`."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or id(value) in kept:
            return value
        return value.detach().to(torch.float64, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        items = [to_float64(v, kept) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: to_float64(v, kept) for key, v in value.items()}
    return value
