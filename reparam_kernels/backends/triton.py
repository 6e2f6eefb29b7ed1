"""Launches the Triton kernels: sees every tensor as rows x cols, chooses the tile, allocates the outputs."""

import contextlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..checks import PARAMS
from ..spec import Call, Spec, accumulate_dtype, expanded_prior, prior_gradient, unpacked
from . import kernels
from .kernels import ALIGNED, BY_BOTH, BY_CHUNKS, BY_ROWS, FOLDED, GIVEN, LANEWISE, LED, NONE

LIMIT = 2**31 - 1  # programs along x; y and z hold only 65535
FOLD = 2**30  # programs along x of a grid with more


class Rows(NamedTuple):
    """An operand by rows: row r starts at r // nest * outer + r % nest * step, its elements `col` apart."""

    tensor: Tensor | None
    outer: int
    step: int
    col: int


ABSENT = Rows(None, 0, 0, 0)


class Run(NamedTuple):
    """A tensor in row-major order: runs of `size` elements `col` apart, one run every `stride`."""

    tensor: Tensor
    size: int
    stride: int
    col: int


def runs(t: Tensor) -> Run:
    """The runs of a tensor; one with more than two levels of stride is copied."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(t.shape, t.stride(), strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return runs(t.contiguous())
    if len(levels) == 2:
        return Run(t, levels[1][0], levels[0][1], levels[1][1])
    return Run(t, t.numel(), 0, levels[0][1] if levels else 0)


def cdiv(a: int, b: int) -> int:  # Triton's own take microseconds
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


class Layout:
    """Rows short enough that each lies in one run of every operand, under one seed, and in one KL."""

    def __init__(self, n: int, tensors: Sequence[Tensor | None], group: int, kl_cols: int | None) -> None:
        seen = [None if t is None else runs(t) for t in tensors]
        inner = [run.size for run in seen if run is not None and run.size != n]
        # every length here is a product of trailing dims, so the shortest divides the others
        self.cols = min([n, group, *inner, *([] if kl_cols is None else [kl_cols])])
        self.rows = n // self.cols
        wide = [size for size in inner if size != self.cols]
        self.nest = max(wide) // self.cols if wide else 1
        self.operands = [ABSENT if run is None else self._rows(run, n) for run in seen]
        self.n, self.inner, self.per, self.skip = n, 0, 0, 0

    def merge(self, lanes: int) -> None:
        """Short rows, each with a KL of its own, run together in rows that fill a tile: `per` runs of `inner`."""
        for whole in (16, 8, 4):  # rows that keep vectors and groups of four together
            unit = whole // math.gcd(whole, self.cols)
            per = min(lanes // self.cols // unit * unit, self.rows)
            if per > 1:
                break
        else:
            return
        self.inner, self.per = self.cols, per
        self.operands = [Rows(o.tensor, o.step, o.step * per, o.col) for o in self.operands]
        self.skip = any(o.outer != self.inner * o.col for o in self.operands if o.tensor is not None)
        self.rows, self.cols = cdiv(self.rows, per), self.cols * per

    def _rows(self, run: Run, n: int) -> Rows:
        step = self.cols * run.col
        if run.size == n:
            return Rows(run.tensor, self.nest * step, step, run.col)
        if run.size == self.cols:
            return Rows(run.tensor, self.nest * run.stride, run.stride, run.col)
        if run.size == self.nest * self.cols:
            return Rows(run.tensor, run.stride, step, run.col)
        whole = run.tensor.contiguous()
        return Rows(whole, self.nest * self.cols, self.cols, 1)


def noise_mode(layout: Layout, seeds: int, samples: int, call: Call, noisy: bool) -> int:
    if not noisy:
        return int(NONE.value)
    if call.eps is not None:
        return int(GIVEN.value)
    within = layout.rows == seeds or layout.cols % 4 == 0
    across = samples == 1 or layout.n // seeds % 4 == 0
    return int((ALIGNED if within and across else LED if across else LANEWISE).value)


class Table(NamedTuple):
    """How a launch is cut: fixed for a kind of device, so that results and first-call time are."""

    lanes: int  # a program
    lanes_wide: int  # in float64
    warps: int
    registers: int | None  # a thread of the plain forward kernel in half precision, at most; the others keep below


CUDA = Table(2048, 512, 4, 88)
HIP = Table(2048, 512, 4, None)


class Plan(NamedTuple):
    """The tiles of a launch, and what the compiler may take for granted of them."""

    layout: Layout
    grid: tuple[int, ...]
    chunks: int  # programs to a row
    per_seed: int
    constants: dict[str, Any]  # of the kernel, and num_warps


def kind() -> str:
    """Who compiles the kernels: "cuda", "hip" or "other"; "" where they are interpreted."""
    if triton.knobs.runtime.interpret:
        return ""
    return "hip" if torch.version.hip else "cuda" if torch.version.cuda else "other"


def table() -> Table:
    return HIP if kind() == "hip" else CUDA


def lanes_of(dtype: torch.dtype) -> int:
    return table().lanes_wide if dtype == torch.float64 else table().lanes


def plan(
    layout: Layout,
    noise: int,
    lanes: int,
    samples: int,
    seeds: int,
    also: Sequence[Tensor | None],
    apart: int,
    dtype: torch.dtype,
) -> Plan:
    """also: more tensors that the lanes visit, row-major; apart: the stride between the samples of dz."""
    warps = table().warps
    if noise == LANEWISE.value:
        lanes = min(lanes, table().lanes // 4)
    led = noise == LED.value
    used = layout.cols + 3 * led
    block = max(power_of_2(used), 4)
    if block > lanes:  # the widest of the blocks that waste the fewest lanes
        block = min((lanes, lanes // 2, lanes // 4), key=lambda b: cdiv(used, b) * b)
    rows, chunks = max(min(lanes // block, power_of_2(layout.rows)), 1), cdiv(used, block)
    blocks = cdiv(layout.rows, rows)
    folded = blocks * chunks > LIMIT
    exact = layout.rows * layout.cols == layout.n and blocks * rows == layout.rows and chunks * block == layout.cols
    by = FOLDED if folded else BY_ROWS if chunks == 1 else BY_CHUNKS if layout.rows == 1 else BY_BOTH
    reach = [abs(o.step) * rows + abs(o.col) * block + abs(o.outer) * max(layout.per, 1) for o in layout.operands]
    constants = {
        "NOISE": noise,
        "SEEDS": seeds > 1,
        "NEAR": layout.n // seeds * samples + 4 * block < 2**34,
        "NVIDIA": kind() == "cuda",
        "SHORT": max(*reach, layout.rows + rows, (rows - 1) * layout.cols) < 2**31,
        "WHOLE": exact and not led and not folded,
        "VEC": 1 if led else vector(layout, also, apart, dtype.itemsize),
        "GRID": int(by.value),
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": max(rows * block * warps // lanes, 1),
        "enable_fp_fusion": False,  # rounding is part of the contract
    }
    grid = (FOLD, cdiv(blocks * chunks, FOLD)) if folded else (blocks * chunks,)
    return Plan(layout, grid, chunks, layout.rows // seeds, constants)


def vector(layout: Layout, also: Sequence[Tensor | None], apart: int, itemsize: int) -> int:
    """The most elements, up to 16 bytes, at multiples of which every row of every tensor starts and ends."""
    held = [t for t in (*(o.tensor for o in layout.operands), *also) if t is not None]
    sizes = [layout.cols, layout.n, apart, *(layout.inner,) * layout.skip]
    for o in layout.operands:
        sizes += [o.step, o.outer] if layout.skip or layout.nest > 1 else [o.step]
    vec = 16 // itemsize
    while vec > 1 and not (
        all(size % vec == 0 for size in sizes)
        and all(t.data_ptr() % min(vec * t.element_size(), 16) == 0 for t in held)
    ):
        vec //= 2
    return vec


@lru_cache(maxsize=256)
def constants(spec: Spec, dtype: torch.dtype) -> dict[str, Any]:
    """The options as compile-time constants; softplus(unit) + min_std = 1, unit in two parts of the dtype."""
    unit = math.log(math.expm1(1 - spec.min_std)) if spec.min_std < 1 else -math.inf
    high = torch.tensor(unit, dtype=accumulate_dtype(dtype), device="cpu").item()
    low, top = spec.clamp or (0.0, 0.0)
    return {
        "PARAM": PARAMS.index(spec.param),
        "MIN_STD": spec.min_std,
        "UNIT_HI": high,
        "UNIT_LO": unit - high if spec.min_std < 1 else 0.0,
        "UNIT_SLOPE": -math.expm1(spec.min_std - 1) if spec.min_std < 1 else 0.0,
        "CLAMP": spec.clamp is not None,
        "LOW": low,
        "HIGH": top,
        "WIDE": dtype == torch.float64,
    }


def on(device: torch.device) -> Any:
    """The tensor's device made current, as a launch needs."""
    return torch.get_device_module(device).device(device) if device.type != "cpu" else contextlib.nullcontext()


def layout_constants(layout: Layout) -> dict[str, int]:
    return {
        "NEST": layout.nest > 1,
        "INNER": layout.inner,
        "PER": layout.per,
        "SKIP": layout.inner if layout.skip else 0,
    }


def flat(operands: Sequence[Rows]) -> list[int]:
    return [stride for o in operands for stride in (o.outer, o.step, o.col)]


def randn(out: Tensor, seed: Tensor) -> None:
    """Fills `out`, contiguous, with the noise of `seed`."""
    if out.numel() == 0:
        return
    n, seeds = out.numel(), seed.numel()
    layout = Layout(n, [], n // seeds, None)
    cut = plan(layout, ALIGNED.value, lanes_of(torch.float32), 1, seeds, [out], 0, out.dtype)
    with on(out.device):
        kernels.randn_kernel[cut.grid](out, seed, layout.rows, layout.cols, cut.chunks, n, **cut.constants)


def cut(
    call: Call,
    mu: Tensor,
    tensors: Sequence[Tensor | None],
    kls: int | None,
    noisy: bool,
    also: Sequence[Tensor | None],
    apart: int = 0,
) -> Plan:
    """The plan of a forward or backward launch; kls: how many sums of KL there are."""
    n, samples = mu.numel(), math.prod(call.spec.sample_shape)
    seeds = call.seed.numel() if call.seed is not None and noisy else 1
    layout = Layout(n, tensors, n // seeds, None if kls is None else n // kls)
    lanes = lanes_of(mu.dtype)
    if call.spec.param == "softplus" and call.mu_p is not None and kind() != "hip":
        lanes //= 2  # or registers spill
    short = kls == layout.rows > 1 and layout.nest == 1 and seeds == 1
    if short and (not noisy or call.eps is not None or samples == 1 or n % 4 == 0):
        layout.merge(lanes)
    found = plan(layout, noise_mode(layout, seeds, samples, call, noisy), lanes, samples, seeds, also, apart, mu.dtype)
    found.constants["NUMBERS"] = all(t is not None and t.numel() == 1 for t in (call.mu_p, call.x_p))
    return found


def forward(call: Call) -> tuple[Tensor | None, Tensor | None]:
    mu, x = unpacked(call)
    spec, shape, n = call.spec, mu.shape, mu.numel()
    z = mu.new_empty(spec.sample_shape + shape) if spec.z else None
    kl = None
    if spec.kl:
        kl = mu.new_empty(shape[: len(shape) - spec.event_ndim], dtype=accumulate_dtype(mu.dtype))
    if n == 0:
        return z, kl if kl is None else kl.zero_()
    samples = math.prod(spec.sample_shape)
    kls = kl.numel() if kl is not None and spec.event_ndim > 0 else None
    eps = None if call.eps is None else call.eps.contiguous()
    operands = [mu, x, *expanded_prior(call, shape)]
    found = cut(call, mu, operands, kls, z is not None and samples > 0, [eps, z, kl if kls is None else None])
    layout = found.layout
    parts = 1 if kl is None or kls is None or layout.inner else layout.rows * found.chunks // kls
    target = kl if kl is None or parts == 1 else kl.new_empty(layout.rows * found.chunks)
    plain = call.mu_p is None and spec.param in ("logvar", "logstd") and z is not None
    plain = plain and found.constants["VEC"] == 8 and not found.constants["SEEDS"]
    if plain and mu.dtype.itemsize == 2 and kind() == "cuda":
        found.constants["maxnreg"] = table().registers
    with on(mu.device):
        kernels.forward_kernel[found.grid](
            *(o.tensor for o in layout.operands),
            call.seed,
            eps,
            z,
            target,
            layout.rows,
            layout.cols,
            found.chunks,
            n,
            samples,
            found.per_seed,
            layout.nest,
            *flat(layout.operands),
            **constants(spec, mu.dtype),
            **layout_constants(layout),
            **found.constants,
            ELEMENTWISE=kls is None,
        )
        if target is not kl and kl is not None:
            size = min(power_of_2(parts), 1024)
            kernels.row_sum_kernel[(kl.numel(),)](target, kl, parts, BLOCK=size, num_warps=4, enable_fp_fusion=False)
    return z, kl


def backward(
    call: Call, dz: Tensor | None, dkl: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients to mu, x, mu_p and x_p, the prior's in the shape of mu; packed: to the moments, None, mu_p, x_p."""
    mu, x = unpacked(call)
    spec, n = call.spec, mu.numel()
    want_mu, want_x, *want_prior = wanted
    packed = dmu = dx = None
    if call.x is None and want_mu:
        packed = call.mu.new_empty(call.mu.shape)
        dmu, dx = packed.chunk(2, spec.packed or 0)
    else:
        dmu = mu.new_empty(mu.shape) if want_mu else None
        dx = mu.new_empty(mu.shape) if want_x else None
    priors = zip((call.mu_p, call.x_p), want_prior, strict=True)
    dmu_p, dx_p = (prior_gradient(p, mu) if want and dkl is not None else None for p, want in priors)
    if n > 0:
        launch_backward(call, mu, x, dz, dkl, dmu, dx, dmu_p, dx_p)
    return (packed, None, dmu_p, dx_p) if call.x is None else (dmu, dx, dmu_p, dx_p)


def launch_backward(
    call: Call,
    mu: Tensor,
    x: Tensor,
    dz: Tensor | None,
    dkl: Tensor | None,
    dmu: Tensor | None,
    dx: Tensor | None,
    dmu_p: Tensor | None,
    dx_p: Tensor | None,
) -> None:
    spec, n = call.spec, mu.numel()
    samples = math.prod(spec.sample_shape)
    kls = dkl.numel() if dkl is not None and spec.event_ndim > 0 else None
    whole = None if dz is None or samples == 0 else dz.reshape(samples, *mu.shape)
    first = None if whole is None else whole[0]
    eps = None if call.eps is None else call.eps.contiguous()
    dkl = None if dkl is None else dkl.contiguous()
    operands = [mu, x, *expanded_prior(call, mu.shape), first, dmu if dmu is not None else dx]
    also = [eps, dx, dmu_p, dx_p, dkl if kls is None else None]
    found = cut(call, mu, operands, kls, first is not None, also, 0 if whole is None else whole.stride(0))
    layout = found.layout
    *inputs, dz_r, out_r = layout.operands
    if whole is not None and dz_r.tensor is not first:
        whole = whole.contiguous()  # the layout copied one sample; all of them lie like that now
    with on(mu.device):
        kernels.backward_kernel[found.grid](
            *(o.tensor for o in inputs),
            call.seed,
            eps,
            whole,
            dkl,
            dmu,
            dx,
            dmu_p,
            dx_p,
            layout.rows,
            layout.cols,
            found.chunks,
            n,
            samples,
            found.per_seed,
            1 if kls is None or layout.inner else layout.rows // kls,
            layout.nest,
            *flat(inputs),
            0 if whole is None else whole.stride(0),
            *flat([dz_r]),
            out_r.outer,
            out_r.step,
            **constants(spec, mu.dtype),
            **layout_constants(layout),
            **found.constants,
            ELEMENTWISE=kls is None,
        )
