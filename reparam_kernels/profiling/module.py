"""`profile --module`: a training step of the user's own, beside another one, and the part of it that our ops take."""

import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import measure, options
from .launches import activities, counted, ncu
from .measure import Quantiles
from .report import seconds, size

PASSES = ("forward", "forward+backward")


class Step(NamedTuple):
    timings: dict[str, Quantiles]  # pass -> seconds
    saved: int
    peak: int


class ModuleProfile(NamedTuple):
    step: Step
    others: dict[str, Step]  # with --before: that step, and this one again, which shows the noise of the measurement
    ranges: dict[str, tuple[int, float]]  # our ops -> calls and seconds in a step, under the profiler
    profiled: float  # seconds of that step
    launches: Counter[str]  # of the step, by name; empty on the CPU


def load(option: str, spec: str) -> Callable[[], Tensor]:
    """Import `package.module:make` and return what make() returns: a function that computes the loss."""
    where = f"profile {option}"
    name, _, attribute = spec.partition(":")
    if not attribute:
        raise SystemExit(f"{where}: must be package.module:make; got {spec!r}. Name the function after a colon.")
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"{where}: {spec} must be importable from this folder; got {error}.") from error
    loss = make()
    value = loss() if callable(loss) else loss
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
        raise SystemExit(
            f"{where}: {attribute}() must return a function of no arguments that returns the loss, a scalar that "
            f"requires a gradient; got {type(value).__name__} from it. For example: "
            "def make(): model, x = Model(), torch.rand(64, 784); return lambda: model.loss(x)"
        )
    return loss  # type: ignore[no-any-return]


def profile(
    loss: Callable[[], Tensor],
    before: Callable[[], Tensor] | None,
    device: torch.device,
    rounds: int,
    trace: Path | None,
) -> ModuleProfile:
    """Measure a step and, in turns with it, the one before the change; look into the first."""
    losses = {"this step": loss}
    if before is not None:
        losses |= {"before": before, "this step again": loss}
    steps = measured(losses, device, rounds)
    with torch.profiler.profile(activities=activities(device), acc_events=True) as recorded:
        loss().backward()  # type: ignore[no-untyped-call]
        torch.get_device_module(device).synchronize()
    if trace is not None:
        recorded.export_chrome_trace(str(trace))
    found: dict[str, tuple[int, float]] = {}
    total = 0.0
    for event in recorded.key_averages():
        total += event.self_cpu_time_total / 1e6
        if event.key.startswith("reparam_kernels"):
            found[event.key] = (event.count, event.cpu_time_total / 1e6)
    return ModuleProfile(steps.pop("this step"), steps, found, total, counted(recorded.events()))


def measured(losses: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[str, Step]:
    """Measure steps, which take turns."""

    def with_backward(loss: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: loss().backward()  # type: ignore[no-untyped-call]

    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, loss in losses.items():
        calls |= {(name, PASSES[0]): loss, (name, PASSES[1]): with_backward(loss)}
    *_, timings = measure.interleave(calls, rounds, device.type)
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    steps = {}
    for name, loss in losses.items():
        by_pass = {which: timings[name, which] for which in PASSES}
        quantiles = {which: timing.cpu if one_thread else timing.wall for which, timing in by_pass.items()}
        saved = measure.saved_bytes(lambda *_, loss=loss: (loss(),), parameters(loss()))
        steps[name] = Step(quantiles, saved, measure.peak_bytes(calls[name, PASSES[1]], device.type))
    return steps


def parameters(loss: Tensor) -> list[Tensor]:
    """Find the leaves that get gradients from a loss."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())


def text(p: ModuleProfile, spec: str, conditions: dict[str, Any], command: list[str]) -> str:
    """Format all; command is that of the profile, for Nsight Compute to repeat."""
    lines = [spec, options.text(conditions), ""]
    lines += [*step_table("this step", p.step), ""]
    for name, step in p.others.items():
        lines += [*step_table(name, step, over=p.step), ""]
    if not p.ranges:
        return "\n".join([*lines, "No op of reparam_kernels ran in this step."])
    lines.append(f"{'ops of reparam_kernels':48} {'calls':>5} {'time':>9} {'of step':>8}")
    for name, (calls, spent) in sorted(p.ranges.items(), key=lambda item: -item[1][1]):
        lines.append(f"  {name[:46]:46} {calls:5} {seconds(spent):>9} {spent / p.profiled:8.0%}")
    lines.append("  Host time of one step under torch.profiler, which makes every op slower.")
    if p.launches:
        lines.append(f"launches of a step: {p.launches.total()}")
        line = ncu(p.launches, command)
        lines += [f"the counters of our kernels, by Nsight Compute:\n{line}"] if line else []
    return "\n".join(lines)


def step_table(title: str, step: Step, over: Step | None = None) -> list[str]:
    lines = [f"{title:22} {'median':>9}   {'10 % to 90 %':>19}" + ("  / this step" if over else "")]
    for name, q in step.timings.items():
        ratio = f"  {q.q50 / over.timings[name].q50:11.2f}" if over else ""
        lines.append(f"  {name:20} {seconds(q.q50):>9}   {f'{seconds(q.q10)} to {seconds(q.q90)}':>19}{ratio}")
    lines.append(f"  kept for backward, beyond the parameters: {size(step.saved)}; peak: {size(step.peak)}")
    return lines


def as_dict(p: ModuleProfile, spec: str, conditions: dict[str, Any]) -> dict[str, Any]:
    def of_step(step: Step) -> dict[str, Any]:
        timings = {name: q._asdict() for name, q in step.timings.items()}
        return {"seconds": timings, "bytes_kept": step.saved, "bytes_peak": step.peak}

    return {
        "module": spec,
        "conditions": conditions,
        **of_step(p.step),
        **{name: of_step(step) for name, step in p.others.items()},
        "ops": {name: {"calls": calls, "seconds": spent} for name, (calls, spent) in p.ranges.items()},
        "launches": p.launches,
    }
