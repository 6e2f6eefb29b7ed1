"""Plans a launch on the host: coalesces strides, packs short rows, chooses tiles, proves what a kernel may assume.

A LaunchKey describes a launch without its pointers and seeds. plan_launch makes a Plan from nothing but the key, so
plans are cached by their keys. run_time_numbers gives the grid and the sizes of a launch.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tiles
from .tiles import Shape, Tiling

GRID_LIMIT = 2**31 - 1  # programs along x; y and z hold only 65535
HIP_GRID_LIMIT = 2**24 - 1  # HIP limits the threads along x to less than 2^32, and a program has up to 4 waves of 64
GRID_2D_WIDTH = 2**22  # programs along x of a grid that has more


class TileConfig(NamedTuple):
    """The size of a program. It is not tuned at run time, so results and the time of a first call do not vary."""

    block_elements: int
    block_elements_float64: int
    num_warps: int
    max_registers: int | None  # a thread of the plain forward kernel in half precision; others need fewer


CUDA = TileConfig(2048, 512, 4, 88)
HIP = TileConfig(2048, 512, 4, None)


class View(NamedTuple):
    """The properties of a tensor that a plan depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int
    alignment: int  # of its address, in bytes, at most 16


def view_of(t: Tensor) -> View:
    address = t.data_ptr()
    return View(tuple(t.shape), t.stride(), t.element_size(), min(address & -address, 16) or 16)


def views_of(tensors: Sequence[Tensor | None]) -> tuple[View | None, ...]:
    return tuple(None if t is None else view_of(t) for t in tensors)


class LaunchKey(NamedTuple):
    """Everything that a plan depends on."""

    kernel: str  # "randn", "forward" or "backward"
    compiler: str  # "cuda", "hip" or "other"; "" if the kernels are interpreted
    dtype: torch.dtype
    numel: int
    samples: int
    seeds: int
    kl_numel: int | None  # the number of KL sums; None: no KL, or an elementwise one
    noise_source: str  # "none", "tensor" or "seed"
    param: str
    has_prior: bool
    operands: tuple[View | None, ...]  # read or written through their strides
    other_tensors: tuple[View | None, ...]  # contiguous
    sample_stride: int  # between the samples of dz


class Strides(NamedTuple):
    """The strides of a tiles.Operand. copied: the tensor has to be made contiguous first."""

    outer: int
    row: int
    col: int
    copied: bool = False


class Layout(NamedTuple):
    """The rows of a launch. Each lies in one run of every operand and has one seed, and one KL unless it is packed."""

    numel: int
    rows: int
    cols: int
    rows_per_outer: int
    strides: tuple[Strides | None, ...]  # of each operand
    row_len: int = 0  # 0: rows are not packed
    packed_rows: int = 0
    packed_strided: bool = False


class Plan(NamedTuple):
    """The compile-time half of a launch."""

    layout: Layout
    tiling: Tiling
    chunks: int  # programs to a row
    num_warps: int
    max_registers: int | None

    def compile_options(self) -> dict[str, Any]:
        options = {"num_warps": self.num_warps, "enable_fp_fusion": False}  # contraction would change the bits
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


def cdiv(a: int, b: int) -> int:  # Triton's own takes microseconds
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


class Run(NamedTuple):
    """A tensor in row-major order: runs of `size` elements col_stride apart, one run every `stride`."""

    size: int
    stride: int
    col_stride: int
    copied: bool = False


def coalesce(view: View) -> Run:
    """Return the runs of a tensor. A tensor with more than two levels of stride has to be copied."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(view.shape, view.stride, strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    numel = math.prod(view.shape)
    if len(levels) > 2:
        return Run(numel, 0, 1, copied=True)
    if len(levels) == 2:
        return Run(levels[1][0], levels[0][1], levels[1][1])
    return Run(numel, 0, levels[0][1] if levels else 0)


def strides_of(run: Run, numel: int, cols: int, rows_per_outer: int) -> Strides:
    row = cols * run.col_stride
    if run.size == numel:
        return Strides(rows_per_outer * row, row, run.col_stride, run.copied)
    if run.size == cols:
        return Strides(rows_per_outer * run.stride, run.stride, run.col_stride)
    if run.size == rows_per_outer * cols:
        return Strides(run.stride, row, run.col_stride)
    return Strides(rows_per_outer * cols, cols, 1, copied=True)


def make_layout(key: LaunchKey) -> Layout:
    """Make rows as long as the operands' runs, the seeds and the KL sums allow."""
    numel = key.numel
    runs = [None if view is None else coalesce(view) for view in key.operands]
    sizes = [run.size for run in runs if run is not None and run.size != numel]
    # every length here is a product of trailing dims, so the shortest divides the others
    cols = min([numel, numel // key.seeds, *sizes, *([] if key.kl_numel is None else [numel // key.kl_numel])])
    longer = [size for size in sizes if size != cols]
    rows_per_outer = max(longer) // cols if longer else 1
    strides = tuple(None if run is None else strides_of(run, numel, cols, rows_per_outer) for run in runs)
    return Layout(numel, numel // cols, cols, rows_per_outer, strides)


def pack_short_rows(layout: Layout, block_elements: int) -> Layout:
    """Pack short rows, each with its own KL, into rows that fill a tile."""
    for multiple in (16, 8, 4):  # of elements, so that vectors and groups of four stay whole
        unit = multiple // math.gcd(multiple, layout.cols)
        count = min(block_elements // layout.cols // unit * unit, layout.rows)
        if count > 1:
            break
    else:
        return layout
    strides = tuple(None if s is None else Strides(s.row, s.row * count, s.col, s.copied) for s in layout.strides)
    return layout._replace(
        rows=cdiv(layout.rows, count),
        cols=layout.cols * count,
        strides=strides,
        row_len=layout.cols,
        packed_rows=count,
        packed_strided=any(s is not None and s.outer != layout.cols * s.col for s in strides),
    )


def noise_mode(key: LaunchKey, layout: Layout) -> int:
    if key.noise_source == "none":
        return int(tiles.NOISE_NONE.value)
    if key.noise_source == "tensor":
        return int(tiles.NOISE_FROM_TENSOR.value)
    rows_aligned = layout.rows == key.seeds or layout.cols % 4 == 0
    samples_aligned = key.samples == 1 or key.numel // key.seeds % 4 == 0
    if not samples_aligned:
        return int(tiles.NOISE_PER_ELEMENT.value)
    return int((tiles.NOISE_ALIGNED if rows_aligned else tiles.NOISE_UNALIGNED).value)


def vector_size(key: LaunchKey, layout: Layout) -> int:
    """Return the widest vector, up to 16 bytes, at multiples of which every row of every tensor starts and ends."""
    sizes = [layout.cols, layout.numel, key.sample_stride]
    if layout.packed_strided:
        sizes.append(layout.row_len)
    tensors = [view for view in key.other_tensors if view is not None]
    for view, strides in zip(key.operands, layout.strides, strict=True):
        if view is not None and strides is not None:
            tensors.append(view._replace(alignment=16) if strides.copied else view)
            sizes.append(strides.row)
            if layout.packed_strided or layout.rows_per_outer > 1:
                sizes.append(strides.outer)
    vec = 16 // key.dtype.itemsize
    while vec > 1 and not (
        all(size % vec == 0 for size in sizes)
        and all(view.alignment % min(vec * view.itemsize, 16) == 0 for view in tensors)
    ):
        vec //= 2
    return vec


def make_tiling(key: LaunchKey, layout: Layout, block_elements: int) -> tuple[Tiling, int]:
    """Return the tiling and the number of chunks to a row."""
    noise = noise_mode(key, layout)
    unaligned = noise == tiles.NOISE_UNALIGNED.value
    positions = layout.cols + 3 * unaligned
    block = max(next_power_of_2(positions), 4)
    if block > block_elements:  # the widest of the blocks that waste the fewest positions
        choices = (block_elements, block_elements // 2, block_elements // 4)
        block = min(choices, key=lambda b: cdiv(positions, b) * b)
    rows, chunks = max(min(block_elements // block, next_power_of_2(layout.rows)), 1), cdiv(positions, block)
    blocks = cdiv(layout.rows, rows)
    grid_2d = blocks * chunks > (HIP_GRID_LIMIT if key.compiler == "hip" else GRID_LIMIT)
    if grid_2d:
        grid = tiles.GRID_2D
    elif chunks == 1:
        grid = tiles.GRID_ROWS
    else:
        grid = tiles.GRID_CHUNKS if layout.rows == 1 else tiles.GRID_BOTH
    whole = layout.rows * layout.cols == layout.numel and blocks * rows == layout.rows and chunks * block == layout.cols
    given = [s for s in layout.strides if s is not None]
    reach = [abs(s.row) * rows + abs(s.col) * block + abs(s.outer) * max(layout.packed_rows, 1) for s in given]
    tiling = Tiling(
        ROWS=rows,
        BLOCK=block,
        GRID=int(grid.value),
        VEC=1 if unaligned else vector_size(key, layout),
        EVEN=whole and not unaligned and not grid_2d,
        OFFSET_32BIT=max(*reach, layout.rows + rows, (rows - 1) * layout.cols) < 2**31,
        COUNTER_32BIT=key.numel // key.seeds * key.samples + 4 * block < 2**34,
        NOISE=noise,
        PER_ITEM_SEED=key.seeds > 1,
        INLINE_PTX=key.compiler == "cuda",
        HAS_OUTER_STRIDE=layout.rows_per_outer > 1,
        ROW_LEN=layout.row_len,
        PACKED_ROWS=layout.packed_rows,
        PACKED_STRIDED=layout.packed_strided,
    )
    return tiling, chunks


def register_limit(key: LaunchKey, tiling: Tiling, config: TileConfig) -> int | None:
    """Limit the registers of the plain forward kernel in half precision, which would else lower its occupancy."""
    plain = key.kernel == "forward" and key.noise_source != "none" and not key.has_prior
    plain = plain and key.param in ("logvar", "logstd") and not tiling.PER_ITEM_SEED
    limited = plain and key.dtype.itemsize == 2 and tiling.VEC == 8 and key.compiler == "cuda"
    return config.max_registers if limited else None


@lru_cache(maxsize=1024)
def plan_launch(key: LaunchKey) -> Plan:
    config = HIP if key.compiler == "hip" else CUDA
    layout = make_layout(key)
    block_elements = config.block_elements_float64 if key.dtype == torch.float64 else config.block_elements
    if key.param == "softplus" and key.has_prior and key.compiler != "hip":
        block_elements //= 2  # else registers spill
    short = key.kl_numel == layout.rows > 1 and layout.rows_per_outer == 1 and key.seeds == 1
    if short and (key.noise_source != "seed" or key.samples == 1 or key.numel % 4 == 0):
        layout = pack_short_rows(layout, block_elements)
    if noise_mode(key, layout) == tiles.NOISE_PER_ELEMENT.value:
        block_elements = min(block_elements, config.block_elements // 4)
    tiling, chunks = make_tiling(key, layout, block_elements)
    num_warps = max(tiling.ROWS * tiling.BLOCK * config.num_warps // block_elements, 1)
    return Plan(layout, tiling, chunks, num_warps, register_limit(key, tiling, config))


class Numbers(NamedTuple):
    """The run-time half of a launch, except pointers and seeds."""

    grid: tuple[int, ...]
    rows: int
    total: int  # elements of mu
    shape: Shape


def run_time_numbers(key: LaunchKey, plan: Plan) -> Numbers:
    layout = plan.layout
    programs = cdiv(layout.rows, plan.tiling.ROWS) * plan.chunks
    grid_2d = plan.tiling.GRID == tiles.GRID_2D.value
    grid = (GRID_2D_WIDTH, cdiv(programs, GRID_2D_WIDTH)) if grid_2d else (programs,)
    rows_per_kl = 1 if key.kl_numel is None or layout.row_len else layout.rows // key.kl_numel
    sizes = Shape(layout.cols, plan.chunks, key.samples, layout.rows // key.seeds, rows_per_kl, layout.rows_per_outer)
    return Numbers(grid, layout.rows, layout.numel, sizes)
