"""`profile` without a module: the ops on the user's shapes, beside other ways to write them and the device's limits."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reparam_kernels as rk

from . import measure, truth
from .case import Case
from .launches import launches
from .measure import Quantiles
from .providers import ours, providers

PASSES = ("forward with grad", "forward+backward")  # of measure.passes, those of a training step
ALONE = ("ours", "ours again", "eager", "distributions")
WITH_COMPILE = (*ALONE, "ours compiled", "compile", "compile fallback")


class Limits(NamedTuple):
    """What the device can do, measured in this run: bytes read and written in a second, and normals drawn."""

    copy_bytes: float
    noise_elements: float


class Profile(NamedTuple):
    case: Case
    timings: dict[str, dict[str, Quantiles]]  # pass -> provider -> seconds
    saved: dict[str, int]  # provider -> bytes kept for backward, beyond the inputs
    peak: dict[str, int]  # provider -> bytes
    layers: dict[str, dict[str, float]]  # pass -> part -> seconds
    limits: Limits
    launches: dict[str, dict[str, Counter[str]]]  # provider -> pass -> kernel -> launches; empty on the CPU

    def bound(self, which: str) -> dict[str, float]:
        """The least seconds that the memory traffic and the noise of a pass take on this device."""
        passes = PASSES.index(which) + 1
        moved = sum(self.case.words()[:passes]) * self.case.dtype.itemsize
        drawn = passes * self.case.numel if self.case.draws else 0
        return {"copy": moved / self.limits.copy_bytes, "noise": drawn / self.limits.noise_elements}


def profile(case: Case, with_compile: bool, rounds: int) -> Profile:
    leaves = case.leaves()
    functions = providers(case, WITH_COMPILE if with_compile else ALONE)
    calls = truth.checked(case, functions, leaves, "--compile")
    timings = {which: times({n: c[which] for n, c in calls.items()}, rounds, case) for which in PASSES}
    return Profile(
        case,
        timings,
        {name: measure.saved_bytes(f, leaves) for name, f in functions.items()},
        {name: measure.peak_bytes(c["forward+backward"], case.device.type) for name, c in calls.items()},
        layers(case, {which: timings[which]["ours"].q50 for which in PASSES}, rounds),
        limits(case),
        {name: {which: launches(c[which], case.device) for which in PASSES} for name, c in calls.items()},
    )


def times(calls: dict[str, Callable[[], Any]], rounds: int, case: Case) -> dict[str, Quantiles]:
    """CPU time for one thread, which other programs disturb less; wall time for more; device time on a GPU."""
    *_, timings = measure.interleave(calls, rounds, case.device.type)
    wall = case.device.type == "cpu" and torch.get_num_threads() > 1
    return {name: timing.wall if wall else timing.cpu for name, timing in timings.items()}


def layers(case: Case, whole: dict[str, float], rounds: int) -> dict[str, dict[str, float]]:
    """Estimate where our time goes, by differences: what a call of one element costs, and each part by itself."""
    small = case._replace(shape=(1,) * len(case.shape))
    one_element = measure.passes(ours(small), small.leaves())
    kept, one = (torch.empty(n, dtype=case.dtype, device=case.device) for n in (case.numel * case.draws, 1))
    written = {PASSES[0]: case.outputs(), PASSES[1]: case.outputs() + case.inputs()}

    def fresh(numel: int) -> Callable[[], Any]:
        return lambda: torch.empty(numel, dtype=case.dtype, device=case.device).zero_()

    in_place = {which: torch.empty(n, dtype=case.dtype, device=case.device) for which, n in written.items()}
    calls = {
        "call": one_element["forward"],
        **{which: one_element[which] for which in PASSES},
        "noise": lambda: rk.randn(kept.shape, out=kept, dtype=case.dtype, device=case.device),
        "noise of one": lambda: rk.randn(1, out=one, dtype=case.dtype, device=case.device),
        **{f"fresh {which}": fresh(n) for which, n in written.items()},
        **{f"in place {which}": t.zero_ for which, t in in_place.items()},
    }
    found = {name: q.q50 for name, q in times(calls, max(rounds // 2, 5), case).items()}
    noise = (found["noise"] - found["noise of one"]) * case.draws
    parts = {}
    for i, which in enumerate(PASSES, 1):
        row = {
            "call: Python, checks, launch": found["call"],
            "autograd": found[which] - found["call"],
            "allocation of outputs": found[f"fresh {which}"] - found[f"in place {which}"],
            "noise": i * noise,
        }
        row = {name: max(seconds, 0.0) for name, seconds in row.items()}
        parts[which] = row | {"arithmetic and memory": max(whole[which] - sum(row.values()), 0.0)}
    return parts


def limits(case: Case) -> Limits:
    """Measure both rates on tensors beyond the caches."""
    out = torch.empty(1 << 24 if case.device.type != "cpu" else 1 << 22, device=case.device)

    def draw() -> Tensor:
        return rk.randn(out.shape, out=out, device=case.device)

    seconds = min(measure.once(draw, 1, case.device.type)[1] for _ in range(10))
    return Limits(measure.copy_bandwidth(str(case.device)), out.numel() / seconds)
