"""Plans a launch on the host: coalesces strides, packs short rows, chooses tiles, proves what a kernel may assume.

A LaunchSpec describes a launch without its pointers and seeds, and plan_launch makes a Plan from it. The compile-time
half of a plan, which is its Tiling and the sizes that Triton specialises, follows from how the tensors are laid out and
from the width of a row, not from the number of rows. So one compiled kernel serves every batch of a width. The rest
are numbers that the kernel takes at run time.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.window import Window, index_strides
from . import tiles
from .tiles import Counts, Strides, Tiling

GRID_LIMIT = 2**31 - 1  # programs along x; y and z hold only 65535
HIP_GRID_LIMIT = 2**24 - 1  # HIP limits the threads along x to less than 2^32, and a program has up to 4 waves of 64
GRID_2D_WIDTH = 2**30  # programs along x of a grid that has more
HIP_GRID_2D_WIDTH = 2**22


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


Levels = tuple[tuple[int, int], ...]  # of strides between the rows of a window: the first and the last dim of each


class WindowClass(NamedTuple):
    """What a plan depends on of a window. The numbers of the window are not part of it."""

    cut: tuple[bool, ...]  # the dims in which the tensor is smaller than the whole
    aligned: tuple[bool, ...]  # the dims whose strides in the whole are multiples of four
    origin_aligned: bool  # the index of the first element is one too
    samples_aligned: bool  # the elements from one sample to the next are, or there is one sample
    short: bool  # each seed has fewer than 2^34 elements, with those of a tile

    def depth(self) -> int:
        """Return how many dims have to number the rows, so that each row is contiguous in the whole."""
        return max((dim for dim, is_cut in enumerate(self.cut) if is_cut), default=0)


def origin(window: Window, steps: Sequence[int]) -> int:
    """Return the index of the first element."""
    return sum(first * stride for first, stride in zip(window[1], steps, strict=True))


def classify_window(window: Window, shape: tuple[int, ...], seeds: int, samples: int) -> WindowClass | None:
    if not window[0]:
        return None
    steps, group = index_strides(window[0], seeds), math.prod(window[0]) // max(seeds, 1)
    return WindowClass(
        cut=tuple(size != of for size, of in zip(shape, window[0], strict=True)),
        aligned=tuple(stride % 4 == 0 for stride in steps),
        origin_aligned=origin(window, steps) % 4 == 0,
        samples_aligned=samples <= 1 or group % 4 == 0,
        short=group * max(samples, 1) < 2**34 - 2**14,
    )


def window_levels(window: WindowClass | None, seeds: int, depth: int) -> Levels:
    """Return the levels of strides between the rows, the innermost first."""
    levels: list[tuple[int, int]] = []
    if window is None:
        return ()
    for dim in range(depth - 1, -1, -1):
        if levels and not window.cut[dim + 1] and not (seeds > 1 and dim == 0):
            levels[-1] = dim, levels[-1][1]
        else:
            levels.append((dim, dim))
    return tuple(levels)


def window_numbers(window: Window, shape: tuple[int, ...], seeds: int, levels: Levels) -> tuple[int, ...]:
    """Return what index_in_whole of tiles.py reads.

    It is the index of the first element, the elements from one sample to the next, and the size and stride of each
    level.
    """
    steps = index_strides(window[0], seeds)
    numbers = [origin(window, steps), math.prod(window[0]) // max(seeds, 1)]
    for first, last in levels:
        numbers += [math.prod(shape[first : last + 1]), steps[last]]
    return tuple(numbers)


class LaunchSpec(NamedTuple):
    """Everything that a plan depends on."""

    kernel: str  # "randn", "forward" or "backward"
    compiler: str  # "cuda", "hip" or "other"; "" if the kernels are interpreted
    dtype: torch.dtype
    shape: tuple[int, ...]  # of mu
    samples: int
    seeds: int  # 1, or one for each item
    kl_ndim: int | None  # how many dims of mu the KL sums keep; None: no KL, or an elementwise one
    noise_source: str  # "none", "tensor" or "seed"
    param: str
    has_prior: bool
    operands: tuple[View | None, ...]  # read or written through their strides
    other_tensors: tuple[View | None, ...]  # contiguous
    sample_stride: int  # between the samples of dz
    window: WindowClass | None
    by_channels: bool = False  # the rows are channels, by channels_can_be_rows


class Layout(NamedTuple):
    """The rows of a launch. Each lies in one run of every operand and has one seed, and one KL unless it is packed.

    The first `depth` dims of mu number the rows, the others make a row. If depth is 0, everything is one row.
    """

    depth: int
    rows: int
    cols: int
    width: int  # divides cols, whatever the batch and, in three dims, the length in the middle
    rows_per_outer: int | None  # None: no operand needs it
    strides: tuple[Strides | None, ...]  # of each operand
    copied: tuple[bool, ...]  # the operands that have to be made contiguous first
    row_len: int = 0  # 0: rows are not packed
    packed_rows: int = 0
    packed_strided: bool = False
    channels: int = 0  # of an item, if the rows are channels


class Plan(NamedTuple):
    """A launch without its tensors."""

    layout: Layout
    tiling: Tiling
    counts: Counts
    grid: tuple[int, ...]
    rows: int
    cols: int
    total: int  # elements of mu
    chunks: int  # programs to a row
    num_warps: int
    max_registers: int | None
    window_levels: Levels

    def numbers(self) -> tuple[Any, ...]:
        """Return the arguments of every kernel that follow its tensors."""
        return self.rows, self.cols, self.total, self.chunks, self.counts

    def compile_options(self) -> dict[str, Any]:
        options = {"num_warps": self.num_warps, "enable_fp_fusion": False}  # contraction would change the bits
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


def cdiv(a: int, b: int) -> int:  # Triton's own takes microseconds
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


class Run(NamedTuple):
    """A tensor in row-major order: the dims from `depth` on are runs `stride` apart, of elements col_stride apart."""

    depth: int  # 0: the tensor is one run
    stride: int
    col_stride: int
    copied: bool = False


def coalesce(view: View) -> Run:
    """Return the runs of a tensor. A tensor with more than two levels of stride has to be copied.

    A dim of size 1 counts like any other if that leaves two levels, so a batch of one has the runs of a larger one.
    """
    for skip_ones in (False, True):
        levels: list[tuple[int, int]] = []  # stride, and the first dim
        for dim, (size, stride) in enumerate(zip(view.shape, view.stride, strict=True)):
            if size == 1 and (skip_ones or dim == len(view.shape) - 1):
                continue
            if levels and levels[-1][0] == size * stride:
                levels[-1] = (stride, levels[-1][1])
            else:
                levels.append((stride, dim))
        if len(levels) == 2:
            return Run(levels[1][1], levels[0][0], levels[1][0])
        if len(levels) < 2:
            return Run(0, 0, levels[0][0] if levels else 1)
    return Run(0, 0, 1, copied=True)


MOST_CHANNELS = 16  # of a tile: a float32 of each fills two sectors of memory


def channel_strides(view: View) -> Strides | None:
    """Return the strides of a tensor [items, channels, *positions] whose positions lie at equal distances."""
    positions = [(size, stride) for size, stride in zip(view.shape[2:], view.stride[2:], strict=True) if size != 1]
    if not positions or any(stride != size * inner for (_, stride), (size, inner) in pairwise(positions)):
        return None
    row, col = view.stride[1], positions[-1][1]
    return Strides(view.stride[0], None if row == 1 else row, None if col == 1 and row != 1 else col)


def channels_can_be_rows(spec: LaunchSpec) -> bool:
    """Return True if the channels of mu or x lie next to each other, and a kernel can read the operands by channels."""
    if len(spec.shape) < 3 or spec.samples != 1 or (spec.kl_ndim or 0) > 2 or spec.operands[0] is None:
        return False
    channels = spec.shape[1]
    if channels % MOST_CHANNELS and channels not in (2, 4, 8):
        return False
    if spec.window is not None and spec.window.depth() > 2:
        return False
    views = [view for view in spec.operands if view is not None]
    strides = [channel_strides(view) for view in views if view.shape == spec.shape]
    return len(strides) == len(views) and None not in strides and any(s and s.row is None for s in strides[:2])


def channel_layout(spec: LaunchSpec) -> Layout:
    """Make each channel of each item a row."""
    channels, positions = spec.shape[1], math.prod(spec.shape[2:])
    strides = tuple(None if view is None else channel_strides(view) for view in spec.operands)
    copied = (False,) * len(strides)
    return Layout(2, spec.shape[0] * channels, positions, positions, channels, strides, copied, channels=channels)


def channel_vector_size(spec: LaunchSpec, layout: Layout, rows: int) -> int:
    """Return the widest vector, up to 16 bytes, along the channels or the positions of every operand."""
    sizes = [rows]
    for s in layout.strides:
        if s is not None:
            sizes += [stride for stride in s if stride is not None]
    vec = 16 // spec.dtype.itemsize
    while vec > 1 and not (
        all(size % vec == 0 for size in sizes)
        and all(v is None or v.alignment % min(vec * v.itemsize, 16) == 0 for v in spec.operands)
    ):
        vec //= 2
    return vec


def make_layout(spec: LaunchSpec) -> Layout:
    """Make rows as long as the operands' runs, the seeds and the KL sums allow."""
    if spec.by_channels:
        return channel_layout(spec)
    shape = spec.shape
    runs = [None if view is None else coalesce(view) for view in spec.operands]
    least = 0 if spec.window is None else spec.window.depth()
    depth = max(spec.kl_ndim or 0, int(spec.seeds > 1), least, *(run.depth for run in runs if run is not None))
    # the last operand with another depth decides: that of the gradients, which cannot be copied
    outer_depth = next((run.depth for run in reversed(runs) if run and run.depth not in (0, depth)), None)
    rows, cols = math.prod(shape[:depth]), math.prod(shape[depth:])
    rows_per_outer = None if outer_depth is None else math.prod(shape[outer_depth:depth])
    strides: list[Strides | None] = []
    copied = []
    for run in runs:
        copied.append(run is not None and (run.copied or run.depth not in (0, depth, outer_depth)))
        if run is None:
            strides.append(None)
            continue
        _, stride, col, _ = Run(0, 0, 1) if copied[-1] else run
        if copied[-1] or run.depth == 0:
            row = None if depth == 0 or col == 1 else cols * col
            outer = (rows_per_outer or 1) * cols * col
        elif run.depth == depth:
            row, outer = stride, (rows_per_outer or 1) * stride
        else:
            row, outer = None if col == 1 else cols * col, stride
        strides.append(Strides(None if rows_per_outer is None else outer, row, col))
    if depth == 0 and len(shape) < 2:
        width = cols
    else:
        width = math.gcd(cols, shape[-1] if len(shape) == 3 else math.prod(shape[1:]))
    return Layout(depth, rows, cols, width, rows_per_outer, tuple(strides), tuple(copied))


def has_lengths(spec: LaunchSpec, layout: Layout) -> bool:
    """Return True if a row spans the last two of three dims, the first of which may be a length that varies."""
    return len(spec.shape) == 3 and layout.depth == 1


def pack_short_rows(layout: Layout, block_elements: int) -> Layout:
    """Pack short rows, each with its own KL, into rows that fill a tile."""
    for multiple in (16, 8, 4):  # of elements, so that vectors and groups of four stay whole
        unit = multiple // math.gcd(multiple, layout.cols)
        count = block_elements // layout.cols // unit * unit
        if count > 1:
            break
    else:
        return layout

    def packed(s: Strides) -> Strides:
        pitch = layout.cols * s.col if s.row is None else s.row
        return Strides(pitch, pitch * count, s.col)

    strides = [None if s is None else packed(s) for s in layout.strides]
    strided = any(s is not None and s.outer != layout.cols * s.col for s in strides)
    if not strided:
        strides = [None if s is None else s._replace(outer=None) for s in strides]
    return layout._replace(
        rows=cdiv(layout.rows, count),
        cols=layout.cols * count,
        strides=tuple(strides),
        row_len=layout.cols,
        packed_rows=count,
        packed_strided=strided,
    )


def noise_mode(spec: LaunchSpec, layout: Layout) -> int:
    if spec.noise_source == "none":
        return int(tiles.NOISE_NONE.value)
    if spec.noise_source == "tensor":
        return int(tiles.NOISE_FROM_TENSOR.value)
    if spec.window is not None:
        levels = window_levels(spec.window, spec.seeds, layout.depth)
        rows_aligned = spec.window.origin_aligned and all(spec.window.aligned[last] for _, last in levels)
        samples_aligned = spec.window.samples_aligned
    else:
        one_row_a_seed = layout.depth == int(spec.seeds > 1)
        rows_aligned = one_row_a_seed or (layout.cols if layout.row_len else layout.width) % 4 == 0
        samples_aligned = spec.samples == 1 or math.prod(spec.shape) // spec.seeds % 4 == 0
    if not samples_aligned:
        return int(tiles.NOISE_PER_ELEMENT.value)
    return int((tiles.NOISE_ALIGNED if rows_aligned else tiles.NOISE_UNALIGNED).value)


def vector_size(spec: LaunchSpec, layout: Layout) -> int:
    """Return the widest vector, up to 16 bytes, at multiples of which every row of every tensor starts and ends.

    A row is known to end at a multiple of its width, and so not by the number of rows.
    """
    sizes = [layout.width]
    if spec.samples > 1:
        sizes.append(spec.sample_stride)
    tensors = [view for view in spec.other_tensors if view is not None]
    for view, strides, copied in zip(spec.operands, layout.strides, layout.copied, strict=True):
        if view is not None and strides is not None and not layout.channels:
            tensors.append(view._replace(alignment=16) if copied else view)
            sizes += [stride for stride in (strides.outer, strides.row) if stride is not None]
    vec = 16 // spec.dtype.itemsize
    while vec > 1 and not (
        all(size % vec == 0 for size in sizes)
        and all(view.alignment % min(vec * view.itemsize, 16) == 0 for view in tensors)
    ):
        vec //= 2
    return vec


def block_of(spec: LaunchSpec, layout: Layout, positions: int, block_elements: int) -> int:
    """Return how many columns a tile has."""
    if layout.depth == 0:
        return block_elements
    if layout.channels:
        return min(max(next_power_of_2(positions), 4), block_elements // min(layout.channels, MOST_CHANNELS))
    block = max(next_power_of_2(positions), 4)
    if has_lengths(spec, layout):  # few blocks, since each is compiled
        return min(b for b in (32, 128, 512, block_elements) if b >= min(block, block_elements))
    if block > block_elements:  # the widest of the blocks that waste the fewest positions
        choices = (block_elements, block_elements // 2, block_elements // 4)
        block = min(choices, key=lambda b: cdiv(positions, b) * b)
    return block


def make_tiling(spec: LaunchSpec, layout: Layout, block_elements: int) -> tuple[Tiling, int]:
    """Return the tiling and the number of chunks to a row."""
    noise = noise_mode(spec, layout)
    unaligned = noise == tiles.NOISE_UNALIGNED.value
    positions = layout.cols + 3 * unaligned
    block = block_of(spec, layout, positions, block_elements)
    rows, chunks = block_elements // block, cdiv(positions, block)
    if layout.channels:
        rows = min(layout.channels, MOST_CHANNELS)
    blocks = cdiv(layout.rows, rows)
    grid_2d = blocks * chunks > (HIP_GRID_LIMIT if spec.compiler == "hip" else GRID_LIMIT)
    if grid_2d:
        grid = tiles.GRID_2D
    elif layout.depth == 0:
        grid = tiles.GRID_CHUNKS
    elif layout.row_len or (chunks == 1 and (rows > 1 or not has_lengths(spec, layout))):
        grid = tiles.GRID_ROWS
    else:
        grid = tiles.GRID_BOTH
    fixed = layout.depth > 0 and not layout.row_len and not has_lengths(spec, layout)
    reach = [0]
    for s in layout.strides:
        if s is not None and layout.channels:
            reach.append((1 if s.row is None else abs(s.row)) * rows + (1 if s.col is None else abs(s.col)) * block)
        elif s is not None:
            row = layout.cols * s.col if s.row is None else s.row
            reach.append(abs(row) * rows + abs(s.col) * block + abs(s.outer or 0) * max(layout.packed_rows, 1))
    numel = math.prod(spec.shape)
    tiling = Tiling(
        ROWS=rows,
        BLOCK=block,
        GRID=int(grid.value),
        VEC=1 if unaligned else vector_size(spec, layout),
        EVEN=fixed and chunks * block == layout.cols and not unaligned,
        OFFSET_32BIT=max(*reach, layout.rows + rows, (rows - 1) * layout.cols) < 2**31,
        COUNTER_32BIT=(
            numel // spec.seeds * spec.samples + 4 * block < 2**34 if spec.window is None else spec.window.short
        ),
        NOISE=noise,
        PER_ITEM_SEED=spec.seeds > 1,
        ONE_KL=not spec.kl_ndim,
        INLINE_PTX=spec.compiler == "cuda",
        HAS_OUTER_STRIDE=layout.rows_per_outer is not None,
        ROW_LEN=layout.row_len,
        PACKED_ROWS=layout.packed_rows,
        PACKED_STRIDED=layout.packed_strided,
        WINDOW=spec.window is not None,
        WINDOW_LEVELS=len(window_levels(spec.window, spec.seeds, layout.depth)),
        CHANNELS=layout.channels,
        CHANNEL_VEC=channel_vector_size(spec, layout, rows) if layout.channels else 1,
    )
    return tiling, chunks


def register_limit(spec: LaunchSpec, tiling: Tiling, config: TileConfig) -> int | None:
    """Limit the registers of the plain forward kernel in half precision, which would else lower its occupancy."""
    plain = spec.kernel == "forward" and spec.noise_source != "none" and not spec.has_prior
    plain = plain and spec.param in ("logvar", "logstd") and not tiling.PER_ITEM_SEED
    limited = plain and spec.dtype.itemsize == 2 and tiling.VEC == 8 and spec.compiler == "cuda"
    return config.max_registers if limited else None


def plan_launch(spec: LaunchSpec) -> Plan:
    config = HIP if spec.compiler == "hip" else CUDA
    layout = make_layout(spec)
    numel = math.prod(spec.shape)
    block_elements = config.block_elements_float64 if spec.dtype == torch.float64 else config.block_elements
    if spec.param == "softplus" and spec.has_prior and spec.compiler != "hip":
        block_elements //= 2  # else registers spill
    each_has_kl = 0 < layout.depth == spec.kl_ndim and layout.rows_per_outer is None and not has_lengths(spec, layout)
    one_stream = spec.seeds == 1 and spec.window is None
    if each_has_kl and one_stream and (spec.noise_source != "seed" or spec.samples == 1 or numel % 4 == 0):
        layout = pack_short_rows(layout, block_elements)
    if noise_mode(spec, layout) == tiles.NOISE_PER_ELEMENT.value:
        block_elements = min(block_elements, config.block_elements // 4)
    tiling, chunks = make_tiling(spec, layout, block_elements)
    programs = cdiv(layout.rows, tiling.ROWS) * chunks
    grid_2d = tiling.GRID == tiles.GRID_2D.value
    width = HIP_GRID_2D_WIDTH if spec.compiler == "hip" else GRID_2D_WIDTH
    grid = (width, cdiv(programs, width)) if grid_2d else (programs,)
    counts = Counts(
        samples=spec.samples,
        rows_per_seed=layout.rows // spec.seeds if spec.seeds > 1 else 1,
        rows_per_kl=math.prod(spec.shape[spec.kl_ndim : layout.depth]) if spec.kl_ndim else 1,
        rows_per_outer=layout.rows_per_outer or 1,
    )
    num_warps = max(tiling.ROWS * tiling.BLOCK * config.num_warps // block_elements, 1)
    limit = register_limit(spec, tiling, config)
    levels = window_levels(spec.window, spec.seeds, layout.depth)
    return Plan(layout, tiling, counts, grid, layout.rows, layout.cols, numel, chunks, num_warps, limit, levels)
