"""Tiles: the elements of a program, their addresses and their noise.

A kernel sees rows x cols elements and gives each program a tile of ROWS x BLOCK positions. Since one Philox counter
makes four normals, a tile starts with a whole group of four: if the noise of a row starts inside a group, the first
group_offset positions belong to the row before and are masked off.

If every short row has its own KL, PACKED_ROWS rows of ROW_LEN columns form one row of the kernel.

If the channels of some operand lie next to each other, as in a channels_last tensor, a row is the positions of one
channel of one item, and a tile has the same positions of several channels.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .philox import normal_at, normals

# NOISE says how eps is made: not at all; loaded from the caller's tensor; in groups of four that start with each row;
# in groups that may start before it; element by element, if the samples of a row start at different places of a group.
NOISE_NONE, NOISE_FROM_TENSOR, NOISE_ALIGNED, NOISE_UNALIGNED, NOISE_PER_ELEMENT = (tl.constexpr(i) for i in range(5))
# GRID says what a program id means: a block of rows; a chunk of the only row; a block of rows and a chunk; the same in
# a 2-D grid, if x cannot hold all programs.
GRID_ROWS, GRID_CHUNKS, GRID_BOTH, GRID_2D = (tl.constexpr(i) for i in range(4))


class Strides(NamedTuple):
    """How an operand is read by rows. Row r starts at r // rows_per_outer * outer + r % rows_per_outer * row."""

    outer: Any  # of packed rows: the stride from one to the next; None: not needed
    row: Any  # None: rows are contiguous; of channels: they lie next to each other
    col: Any  # None, of channels only: positions lie next to each other


class Counts(NamedTuple):
    """Sizes of a launch that Triton specialises, since they do not grow with the batch. One that is not needed is 1."""

    samples: Any
    rows_per_seed: Any
    rows_per_kl: Any
    rows_per_outer: Any


class Shape(NamedTuple):
    """The sizes of a launch."""

    rows: Any
    cols: Any
    total: Any  # elements of mu
    chunks: Any  # programs to a row
    samples: Any
    rows_per_seed: Any
    rows_per_kl: Any
    rows_per_outer: Any


class Tiling(NamedTuple):
    """How a launch is cut into tiles, and what the launcher has proved of it; compile-time constants."""

    ROWS: int
    BLOCK: int
    GRID: int
    VEC: int  # rows start and end at multiples of this many elements, in memory too
    EVEN: bool  # every column of a tile lies in its row
    OFFSET_32BIT: bool  # offsets within a tile fit 32 bits
    COUNTER_32BIT: bool  # each seed has fewer than 2^34 elements
    NOISE: int
    PER_ITEM_SEED: bool
    ONE_KL: bool  # no more than one KL for all rows
    INLINE_PTX: bool  # the compiler takes PTX
    HAS_OUTER_STRIDE: bool  # some operand needs rows_per_outer
    ROW_LEN: int  # 0: rows are not packed
    PACKED_ROWS: int
    PACKED_STRIDED: bool  # packed rows lie `outer` apart, not contiguous
    WINDOW: bool  # the elements lie in a larger whole, whose noise they take
    WINDOW_LEVELS: int  # of strides between the rows' indices in the whole
    CHANNELS: int = 0  # of an item, if rows are channels; a tile's ROWS are in one item
    CHANNEL_VEC: int = 1  # what VEC is, for the operands


class Tile(NamedTuple):
    """A program's elements. The scalars are 64-bit; row and col count from them, in 32 bits if OFFSET_32BIT."""

    first_row: Any
    chunk: Any
    first_col: Any
    row: Any  # [ROWS, 1]
    col: Any  # [1, BLOCK] or [ROWS, BLOCK]
    index: Any  # with a window: of the first element of each row, in the whole or in its item; [ROWS, 1]
    group_offset: Any
    mask: Any  # [ROWS, BLOCK]
    row_mask: Any  # [ROWS, 1]


@triton.jit
def make_shape(rows, cols, total, chunks, counts, TILING: tl.constexpr):
    """Put the sizes of a launch together. The length of a packed row is a constant."""
    CONSTANT: tl.constexpr = TILING.ROW_LEN * TILING.PACKED_ROWS
    if TILING.ROW_LEN:
        cols = CONSTANT
    return Shape(
        rows, cols, total, chunks, counts.samples, counts.rows_per_seed, counts.rows_per_kl, counts.rows_per_outer
    )


@triton.jit
def locate(rows, chunks, TILING: tl.constexpr):
    """Return a program's first row, its chunk of the columns, and the chunk's first column."""
    pid = tl.program_id(0)
    if TILING.GRID == GRID_ROWS:
        block, chunk = pid, 0 * pid
    elif TILING.GRID == GRID_CHUNKS:
        block, chunk = 0 * pid, pid
    elif TILING.GRID == GRID_BOTH:
        block, chunk = pid // chunks, pid % chunks
    else:
        pid = pid.to(tl.int64) + tl.program_id(1).to(tl.int64) * tl.num_programs(0)
        blocks = (rows + TILING.ROWS - 1).to(tl.int64) // TILING.ROWS
        pid = tl.minimum(pid, blocks * chunks - 1)  # such a grid has a few programs too many
        block, chunk = pid // chunks, pid % chunks
    return block.to(tl.int64) * TILING.ROWS, chunk.to(tl.int64), chunk.to(tl.int64) * TILING.BLOCK


@triton.jit
def divmod_rows(row, size, TILING: tl.constexpr):
    """Return row // size and row % size, in 32 bits if they fit, because 64-bit division is a subroutine."""
    if TILING.OFFSET_32BIT:
        row = row.to(tl.int32)
    return (row // size).to(tl.int64), (row % size).to(tl.int64)


@triton.jit
def seed_of(row, shape, TILING: tl.constexpr):
    """Return the index of a row's seed, and the row's index among the rows of that seed."""
    if TILING.PER_ITEM_SEED:
        return divmod_rows(row, shape.rows_per_seed, TILING)
    else:
        return 0, row


@triton.jit
def index_in_whole(window_ptr, row, TILING: tl.constexpr):
    """Return the index of the first element of each row, 64-bit. `window_numbers` of plan.py says what lies there."""
    LEVELS: tl.constexpr = TILING.WINDOW_LEVELS  # before triton 3.8 a field of a record is no constexpr
    index = tl.load(window_ptr) + row.to(tl.int64) * 0
    rest = row
    for level in tl.static_range(LEVELS):
        size, stride = tl.load(window_ptr + 2 + 2 * level), tl.load(window_ptr + 3 + 2 * level)
        if level == LEVELS - 1:
            index += rest.to(tl.int64) * stride
        else:
            if TILING.OFFSET_32BIT:
                size = size.to(tl.int32)
            rest, coordinate = divmod_rows(rest, size, TILING)
            index += coordinate * stride
    return index


@triton.jit
def make_tile(shape, window_ptr, TILING: tl.constexpr):
    """Make the tile of this program. window_ptr is None without a window."""
    first_row, chunk, first_col = locate(shape.rows, shape.chunks, TILING)
    row = tl.arange(0, TILING.ROWS)[:, None]
    if not TILING.OFFSET_32BIT:
        row = row.to(tl.int64)
    index = 0
    if TILING.WINDOW:
        index = index_in_whole(window_ptr, first_row + row, TILING)
    group_offset = 0
    if TILING.NOISE == NOISE_UNALIGNED and TILING.WINDOW:
        group_offset = (index % 4).to(tl.int32)
    elif TILING.NOISE == NOISE_UNALIGNED:
        _, row_of_seed = seed_of(first_row + row, shape, TILING)
        group_offset = (row_of_seed * shape.cols % 4).to(tl.int32)
    col = tl.arange(0, TILING.BLOCK)[None, :] - group_offset
    if TILING.ROWS == 1 or TILING.CHANNELS:
        row_mask = tl.full([TILING.ROWS, 1], True, tl.int1)  # the compiler drops it
    else:
        row_mask = row < tl.minimum(shape.rows - first_row, TILING.ROWS).to(tl.int32)
    mask = tl.broadcast_to(row_mask, [TILING.ROWS, TILING.BLOCK])
    if not TILING.EVEN:
        VEC: tl.constexpr = TILING.VEC
        left = tl.minimum(shape.cols - first_col, TILING.BLOCK)
        if TILING.ROW_LEN:
            left = tl.minimum(left, shape.total - first_row * shape.cols)
        mask &= col < tl.multiple_of(left.to(tl.int32), VEC)
        if TILING.NOISE == NOISE_UNALIGNED:
            mask &= col + tl.minimum(first_col, TILING.BLOCK).to(tl.int32) >= 0
    if not TILING.OFFSET_32BIT:
        col = col.to(tl.int64)
    return Tile(first_row, chunk, first_col, row, col, index, group_offset, mask, row_mask)


@triton.jit
def row_pointers(ptr, row_stride, col_stride, packed_stride, tile, TILING: tl.constexpr):
    """Add offsets within the tile to a 64-bit base. packed_stride is that of packed rows; None: contiguous."""
    VEC: tl.constexpr = TILING.VEC  # before triton 3.8 a field of a record is no constexpr
    offset = tl.multiple_of(tile.row * row_stride, [VEC, VEC]) + tile.col * col_stride
    if TILING.PACKED_STRIDED and packed_stride is not None:
        # the hint has to be on an operation of this function: one on an argument is lost
        gap = tl.multiple_of(packed_stride - TILING.ROW_LEN * col_stride, VEC)
        offset += tile.col // TILING.ROW_LEN * gap
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    first = tl.multiple_of(tile.first_row * row_stride, VEC)  # the sum folds to this if first_col is 0
    base = ptr + tl.multiple_of(first + tile.first_col * col_stride, VEC)
    return tl.multiple_of(base, min(VEC * SIZE, 16)) + offset


@triton.jit
def channel_pointers(ptr, strides, tile, TILING: tl.constexpr):
    """Return pointers to a tile's elements if rows are channels. The tile's channels are in one item."""
    VEC: tl.constexpr = TILING.CHANNEL_VEC
    CHANNELS: tl.constexpr = TILING.CHANNELS
    first = tile.first_row // CHANNELS * strides.outer
    if strides.row is None:
        first += tile.first_row % CHANNELS + tile.first_col * strides.col
        offset = tile.row + tl.multiple_of(tile.col * strides.col, [VEC, VEC])
    elif strides.col is None:
        first += tile.first_row % CHANNELS * strides.row + tile.first_col
        offset = tl.multiple_of(tile.row * strides.row, [VEC, VEC]) + tile.col
    else:
        first += tile.first_row % CHANNELS * strides.row + tile.first_col * strides.col
        offset = tile.row * strides.row + tile.col * strides.col
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr + tl.multiple_of(first, VEC), min(VEC * SIZE, 16)) + offset


@triton.jit
def pointers(ptr, strides, tile, shape, TILING: tl.constexpr):
    """Return pointers to a tile's elements of an operand."""
    row_stride = strides.row
    if strides.row is None:
        row_stride = shape.cols
    if TILING.CHANNELS:
        return channel_pointers(ptr, strides, tile, TILING)
    elif TILING.HAS_OUTER_STRIDE:
        VEC: tl.constexpr = TILING.VEC
        a, b = divmod_rows(tile.first_row + tile.row, shape.rows_per_outer, TILING)
        offset = a * strides.outer + b * row_stride + tile.first_col * strides.col
        return ptr + tl.multiple_of(offset, [VEC, VEC]) + tile.col * strides.col
    else:
        return row_pointers(ptr, row_stride, strides.col, strides.outer, tile, TILING)


@triton.jit
def contiguous_pointers(ptr, tile, shape, TILING: tl.constexpr):
    """Return pointers to a tile's elements of a contiguous tensor [rows, cols]."""
    return row_pointers(ptr, shape.cols, 1, None, tile, TILING)


@triton.jit
def sample_pointer(ptr, sample, stride, TILING: tl.constexpr):
    """Return a pointer to one sample of a tensor whose samples are `stride` apart."""
    VEC: tl.constexpr = TILING.VEC
    return ptr + tl.multiple_of(sample * stride, VEC)


@triton.jit
def load(ptr, mask, FLOAT64: tl.constexpr):
    """Load elements in the dtype of the arithmetic. Masked-off positions are undefined."""
    value = tl.load(ptr, mask=mask)
    return value.to(tl.float64) if FLOAT64 else value.to(tl.float32)


@triton.jit
def store(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def noise(seed_ptr, eps_ptr, window_ptr, sample, tile, shape, FLOAT64: tl.constexpr, TILING: tl.constexpr):
    """Load or make the eps of one sample, whose index is 64-bit."""
    if TILING.NOISE == NOISE_FROM_TENSOR:
        ptr = sample_pointer(eps_ptr, sample, shape.total, TILING)
        return load(contiguous_pointers(ptr, tile, shape, TILING), tile.mask, FLOAT64)
    else:
        item, row = seed_of(tile.first_row if TILING.ROWS == 1 else tile.first_row + tile.row, shape, TILING)
        if TILING.PER_ITEM_SEED and TILING.ROWS > 1:
            seed = tl.load(seed_ptr + item, mask=tile.row_mask)
        else:
            seed = tl.load(seed_ptr + item)
        if TILING.WINDOW:
            index = sample * tl.load(window_ptr + 1) + tile.index + tile.first_col
        else:
            per_sample = shape.rows_per_seed * shape.cols if TILING.PER_ITEM_SEED else shape.total
            index = sample * per_sample + row * shape.cols + tile.first_col
        if TILING.NOISE == NOISE_PER_ELEMENT:
            eps = normal_at(seed, index + tile.col, TILING.INLINE_PTX)
        else:
            counter = (index - tile.group_offset) >> 2
            eps = normals(seed, counter, TILING.ROWS, TILING.BLOCK, TILING.COUNTER_32BIT, TILING.INLINE_PTX)
        return eps.to(tl.float64) if FLOAT64 else eps


@triton.jit
def sum_packed_rows(k, TILING: tl.constexpr):
    """Sum each packed row of a tile. The number of sums is padded to a power of two."""
    UNIT: tl.constexpr = 4 if TILING.ROW_LEN % 4 == 0 else 2 if TILING.ROW_LEN % 2 == 0 else 1
    N: tl.constexpr = TILING.ROW_LEN // UNIT
    WIDTH: tl.constexpr = triton.next_power_of_2(N)
    COUNT: tl.constexpr = triton.next_power_of_2(TILING.PACKED_ROWS)
    units = tl.sum(tl.reshape(k, [TILING.BLOCK // UNIT, UNIT]), axis=1)
    if N == WIDTH:
        return tl.sum(tl.reshape(units, [TILING.BLOCK // TILING.ROW_LEN, N]), axis=1)
    else:
        i = tl.arange(0, COUNT * WIDTH)
        row, col = i // WIDTH, i % WIDTH
        gathered = tl.gather(units, tl.minimum(row * N + col, TILING.BLOCK // UNIT - 1), 0)
        return tl.sum(tl.reshape(tl.where(col < N, gathered, 0.0), [COUNT, WIDTH]), axis=1)


@triton.jit
def elements_left(tile, shape):
    """Return how many elements the tile's row holds."""
    return tl.minimum(shape.cols, shape.total - tile.first_row * shape.cols).to(tl.int32)


@triton.jit
def broadcast_packed_rows(ptr, size, TILING: tl.constexpr):
    """Broadcast a value of each packed row over the `size` elements of the tile, as [1, BLOCK]."""
    UNIT: tl.constexpr = TILING.VEC if TILING.ROW_LEN % TILING.VEC == 0 else 1
    first = tl.arange(0, TILING.BLOCK // UNIT) * UNIT
    value = tl.load(ptr + first // TILING.ROW_LEN, mask=first < size)
    return tl.reshape(tl.broadcast_to(value[:, None], [TILING.BLOCK // UNIT, UNIT]), [1, TILING.BLOCK])
