"""Measures time and memory. Each round runs every provider once in another order; quantiles are over the rounds.

A warm turn begins with one call that is not timed, so the state of caches and allocator that the last provider left
does not count for the next. In a cold turn, another provider's call comes before each timed call, as other work of a
training step would.
"""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name")  # of a provider


class Quantiles(NamedTuple):
    q10: float
    q50: float
    q90: float


class Timing(NamedTuple):
    cpu: Quantiles  # seconds of CPU time of this thread per call; on a GPU, of device time
    wall: Quantiles


def quantiles(samples: list[float]) -> Quantiles:
    s = sorted(samples)
    return Quantiles(*(s[round(q * (len(s) - 1))] for q in (0.1, 0.5, 0.9)))


def once(call: Callable[[], Any], repeats: int, device: str) -> tuple[float, float]:
    """Time one call in (CPU or device, wall) seconds: the mean of `repeats` after one that is not timed."""
    call()
    if device != "cpu":
        gpu = torch.get_device_module(device)
        gpu.synchronize()
        begin, end = (gpu.Event(enable_timing=True) for _ in range(2))
        wall = time.perf_counter()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        gpu.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats, (time.perf_counter() - wall) / repeats
    wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
    for _ in range(repeats):
        call()
    return (time.thread_time_ns() - cpu) / 1e9 / repeats, (time.perf_counter_ns() - wall) / 1e9 / repeats


def once_cold(call: Callable[[], Any], other: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Time one call on a CPU likewise, with an untimed call of another provider before each."""
    wall = cpu = 0
    for _ in range(repeats):
        other()
        start = time.perf_counter_ns(), time.thread_time_ns()
        call()
        cpu += time.thread_time_ns() - start[1]
        wall += time.perf_counter_ns() - start[0]
    return cpu / 1e9 / repeats, wall / 1e9 / repeats


def interleave(
    calls: dict[Name, Callable[[], Any]], rounds: int, device: str, cold: bool = False
) -> Iterator[dict[Name, Timing]]:
    """Yield nothing after each round, for a display of progress, and the results after the last."""
    repeats = {}
    for name, call in calls.items():  # warm-up, outside of the measurement
        for _ in range(3):
            call()
        repeats[name] = max(1, int(2e-3 / max(once(call, 1, device)[1], 1e-9)))
    samples: dict[Name, list[tuple[float, float]]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    for i in range(rounds):
        for name in shuffle.sample(list(calls), len(calls)):  # so that nobody always follows the same provider
            if cold:
                other = calls[shuffle.choice([n for n in calls if n != name])]
                samples[name].append(once_cold(calls[name], other, repeats[name]))
            else:
                samples[name].append(once(calls[name], repeats[name], device))
        if i < rounds - 1:
            yield {}
    yield {n: Timing(*(quantiles(list(column)) for column in zip(*s, strict=True))) for n, s in samples.items()}


def passes(f: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Return calls of the op: forward without and with a graph, and forward with backward to every leaf."""
    with torch.no_grad():
        grads = [torch.full_like(y, 0.5) for y in f(*leaves)]

    def forward() -> Any:
        with torch.no_grad():
            return f(*leaves)

    def with_grad() -> Any:
        return f(*leaves)

    def both() -> Any:
        return torch.autograd.grad(f(*leaves), leaves, grads)

    return {"forward": forward, "forward with grad": with_grad, "forward+backward": both}


def dense_parts(t: Tensor) -> list[Tensor]:
    """Return the dense tensors that hold a sparse one, or a dense tensor itself."""
    if t.layout is torch.strided:
        return [t]
    return [t._values(), t._indices()] if t.layout is torch.sparse_coo else [t.values()]


def saved_bytes(f: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> int:
    """Count the bytes that autograd keeps for backward beyond the inputs, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in leaves}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        for part in dense_parts(t):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = f(*leaves)
    for y in out:  # the caller holds the outputs, saved or not
        kept.pop(y.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Measure the peak memory of one call, beyond what was allocated before."""
    if device != "cpu":
        gpu = torch.get_device_module(device)
        gpu.reset_peak_memory_stats()
        before = gpu.memory_allocated()
        call()
        return int(gpu.max_memory_allocated() - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as prof:
        call()
    live = peak = 0
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def copy_bandwidth(device: str, size: int = 1 << 24) -> float:
    """Measure the bytes per second, read and written, of a copy of 64 MiB by one thread; the best of several."""
    a, b = torch.ones(size, device=device), torch.empty(size, device=device)
    return 8 * size / min(once(lambda: b.copy_(a), 1, device)[1] for _ in range(10))
