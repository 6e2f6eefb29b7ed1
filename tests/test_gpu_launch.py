"""The launcher with kernels that only record: grids, pointers, strides and constants, for tensors no memory holds.

Meta tensors have shapes and strides and no storage, so 2^45 elements cost nothing.
"""

import contextlib
import inspect
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from reparam_kernels.backends import kernels
from reparam_kernels.backends import triton as launcher
from reparam_kernels.spec import prepare


class Recorder:
    """Stands for a kernel: keeps the grid and the arguments by name."""

    def __init__(self, kernel):
        self.names = list(inspect.signature(kernel.fn).parameters)
        self.launches = []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((grid, {**dict(zip(self.names, args, strict=False)), **constants}))

        return launch


@pytest.fixture
def recorded(monkeypatch):
    found = {}
    for name in ("randn_kernel", "forward_kernel", "backward_kernel", "row_sum_kernel"):
        found[name] = Recorder(getattr(kernels, name))
        monkeypatch.setattr(launcher.kernels, name, found[name])
    monkeypatch.setattr(launcher, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launcher, "kind", lambda: "cuda")
    return found


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(recorded, mu, x, **options):
    call = prepare("test", mu, x, z=True, kl=True, seed=options.pop("seed", 3), **options)
    z, kl = launcher.forward(call)
    (launch,) = recorded["forward_kernel"].launches
    return call, z, kl, *launch


SHAPES = [(1,), (3, 5), (1, 20), (128, 20), (7, 127), (4096, 128), (5, 1000), (3, 4097), (65537, 3), (2**31 + 8,)]
SHAPES += [(2**16, 2**16), (3, 2**31 + 1), (2**33, 3), (2**20, 20, 16), (2**34 + 2**12, 4), (2**45,), (2**42 + 4, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_grid_covers_every_element_within_the_limits(recorded, shape, dtype):
    mu = meta(*shape, dtype=dtype)
    _, z, kl, grid, args = forward(recorded, mu, mu)
    n = math.prod(shape)
    programs = math.prod(grid)
    assert grid[0] < 2**31
    assert all(size <= 65535 for size in grid[1:])
    assert args["rows"] * args["cols"] >= n > (args["rows"] - 1) * args["cols"]
    assert args["total"] == n
    blocks = -(-args["rows"] // args["ROWS"])
    assert programs >= blocks * args["chunks"]
    assert args["chunks"] * args["BLOCK"] >= args["cols"]
    assert math.log2(args["ROWS"] * args["BLOCK"]) % 1 == 0
    assert args["num_warps"] in (1, 2, 4)
    assert args["enable_fp_fusion"] is False
    folded = args["GRID"] == kernels.FOLDED.value
    assert folded == (blocks * args["chunks"] > 2**31 - 1)
    lanes = programs * args["ROWS"] * args["BLOCK"]
    if n > 10_000 and not folded and dtype != torch.float64:
        assert lanes < 1.5 * n or 1024 < shape[-1] < 4100, "more than a third of the lanes idle"
    assert args["NEAR"] == (n + 4 * args["BLOCK"] < 2**34)
    assert z.shape == shape
    assert kl.shape == (shape[:1] if len(shape) > 1 else ())
    parts = recorded["row_sum_kernel"].launches
    per_row = args["rows"] * args["chunks"] // kl.numel()
    assert len(parts) == (not args["INNER"] and per_row > 1)
    for (rows,), sums in parts:
        assert rows == kl.numel()
        assert sums["parts"] * rows == args["rows"] * args["chunks"] == sums["part_ptr"].numel()


@pytest.mark.parametrize("width", [4, 20, 127, 1000, 1029])
def test_pointers_and_strides_lead_to_the_elements(recorded, width):
    """Kernel row r, column c is element r * cols + c: the pointer and the strides must find that element."""
    base = torch.arange(8 * 2 * width, dtype=torch.float32)
    mu, x = base.view(8, 2 * width).chunk(2, 1)
    _, z, kl, _, args = forward(recorded, mu, x)
    assert args["mu_ptr"].data_ptr() == mu.data_ptr()
    assert args["x_ptr"].data_ptr() == x.data_ptr()
    assert args["z_ptr"] is z
    assert args["kl_ptr"] is kl
    for name, tensor in (("mu", mu), ("x", x)):
        flat = tensor.reshape(-1)
        offset = tensor.storage_offset()
        for i in (0, 1, width - 1, width, 3 * width + 2, 8 * width - 1):
            row, col = divmod(i, args["cols"])
            at = row * args[f"{name}_step"] + col * args[f"{name}_col"]
            if args["SKIP"]:
                at += col // args["INNER"] * (args[f"{name}_outer"] - args["INNER"])
            assert base[offset + at] == flat[i]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skew", range(8))
def test_vectors_are_as_wide_as_the_worst_address_allows(recorded, skew, dtype):
    size = dtype.itemsize
    base = torch.zeros(64 * 64 + 16, dtype=dtype)
    assert base.data_ptr() % 64 == 0
    mu, x = torch.zeros(64, 64, dtype=dtype), base[skew:][: 64 * 64].view(64, 64)
    *_, args = forward(recorded, mu, x)
    assert args["VEC"] == max(v for v in (1, 2, 4, 8) if v * size <= 16 and skew % v == 0)


def test_vectors_need_widths_and_strides_too(recorded):
    base = torch.zeros(64, 128)
    for width, pitch, vec in ((64, 64, 4), (20, 40, 4), (20, 41, 1), (22, 40, 2), (20, 42, 2)):
        recorded["forward_kernel"].launches.clear()
        x = base.view(-1)[: 32 * pitch].as_strided((32, width), (pitch, 1))
        *_, args = forward(recorded, torch.zeros(32, width), x)
        assert args["VEC"] == vec, (width, pitch)


def test_offsets_in_a_tile_are_64_bit_where_rows_lie_far_apart(recorded):
    near = torch.empty_strided((64, 4), (2**20, 1), device="meta")
    far = torch.empty_strided((64, 4), (2**30, 1), device="meta")
    assert forward(recorded, near, near, seed=torch.zeros(64, dtype=torch.int64, device="meta"))[-1]["SHORT"]
    recorded["forward_kernel"].launches.clear()
    assert not forward(recorded, far, far, seed=torch.zeros(64, dtype=torch.int64, device="meta"))[-1]["SHORT"]


def test_backward_gets_what_forward_had(recorded):
    mu, x = torch.zeros(64, 20), torch.zeros(64, 20)
    call, z, kl, grid, ahead = forward(recorded, mu, x)
    dmu, dx, *_ = launcher.backward(call, torch.zeros_like(z), torch.zeros_like(kl), (True, True, False, False))
    ((same, args),) = recorded["backward_kernel"].launches
    assert same == grid
    for name in ("mu_ptr", "x_ptr", "seed_ptr", "rows", "cols", "per_seed", "NOISE", "INNER", "ROWS", "BLOCK", "NEAR"):
        assert args[name] is ahead[name] or args[name] == ahead[name], name
    assert args["dmu_ptr"] is dmu
    assert args["dx_ptr"] is dx
    assert args["dmu_p_ptr"] is None


def test_one_launch_a_call_and_two_where_rows_are_huge(recorded):
    for shape, sums in (((128, 20), 0), ((512, 2048), 0), ((4, 5000), 1)):
        for recorder in recorded.values():
            recorder.launches.clear()
        mu = meta(*shape)
        forward(recorded, mu, mu)
        assert len(recorded["row_sum_kernel"].launches) == sums


SIZES = [1, 2, 3, 4, 5, 20, 127, 128, 1000, 1029, 4097, 2**16, 2**20, 2**31 - 1024, 2**31 - 1, 2**31, 2**33 + 4]


@st.composite
def plans(draw):
    """Up to 2^48 elements, their operands packed, turned, repeated or far apart, cut as for a forward."""
    shape = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from(SIZES) | st.integers(1, 2**34))
        shape.append(size if size * math.prod(shape) <= 2**48 else 1)

    def laid():
        strides, step = [0] * len(shape), 1
        for i in draw(st.permutations(range(len(shape))) | st.just(range(len(shape))))[::-1]:
            strides[i] = step * draw(st.sampled_from([1, 1, 1, 0]))
            step = step * shape[i] + draw(st.sampled_from([0, 0, 0, 1, 4, 13, 2**20, 2**31]))
        assume(step < 2**58)
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")

    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    mu, x = laid(), laid()
    seeds = meta(shape[0], dtype=torch.int64) if draw(st.booleans()) else 3
    event, samples = draw(st.integers(0, len(shape))), draw(st.sampled_from([(), (2,), (3,), (2**12, 5)]))
    call = prepare("test", mu, x, z=True, kl=True, seed=seeds, sample_shape=samples, event_ndim=event)
    kls = math.prod(shape[: len(shape) - event]) if event else None
    return call, kls, launcher.cut(call, mu, [mu, x], kls, True, [])


def offset(t, element):
    at = 0
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        element, index = divmod(element, size)
        at += index * stride
    return at


def check_lane(call, kls, found, block, chunk, r, p):
    """One lane's arithmetic as `lanes` and `spot` of kernels.py do it, in whole numbers; within 32 bits where SHORT."""
    layout, how = found.layout, found.constants
    row, column = block * how["ROWS"] + r, chunk * how["BLOCK"] + p
    n, element = layout.n, row * layout.cols + column
    if row >= layout.rows or column >= layout.cols or element >= n:
        assert not how["WHOLE"]
        return
    small = [row, r * layout.cols + p]
    for o in layout.operands:
        if layout.nest > 1:
            a, b = divmod(row, layout.nest)
            base, tile = a * o.outer + b * o.step + chunk * how["BLOCK"] * o.col, [p * o.col]
        else:
            base, tile = block * how["ROWS"] * o.step + chunk * how["BLOCK"] * o.col, [r * o.step, p * o.col]
            tile += [p // layout.inner * (o.outer - layout.inner * o.col)] if layout.skip else []
        assert base + sum(tile) == offset(o.tensor, element)
        small += [*tile, sum(tile)]
    assert not how["SHORT"] or all(abs(part) < 2**31 for part in small)
    seeds, samples = call.seed.numel(), math.prod(call.spec.sample_shape)
    group = n // seeds
    if seeds > 1:
        assert row // found.per_seed == element // group
    start = (row % found.per_seed if seeds > 1 else row) * layout.cols
    assert start == row * layout.cols - element // group * group
    if how["NOISE"] == kernels.ALIGNED.value:
        assert start % 4 == 0
        assert samples == 1 or group % 4 == 0
    assert not how["NEAR"] or (samples - 1) * group + start + layout.cols < 2**34
    if kls is not None and not layout.inner:
        assert row * layout.cols // (n // kls) == element // (n // kls)


def test_the_arithmetic_of_any_launch(record_property):
    """Programs cover all rows and columns; a lane's address, seed and KL are its element's; what is proved is so."""
    tried = 0

    @settings(max_examples=1000, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck])
    @given(plans(), st.floats(0, 1), st.floats(0, 1))
    def explore(planned, high, low):
        nonlocal tried
        tried += 1
        call, kls, found = planned
        layout, how = found.layout, found.constants
        blocks = -(-layout.rows // how["ROWS"])
        assert layout.rows * layout.cols >= layout.n > (layout.rows - 1) * layout.cols
        assert math.prod(found.grid) >= blocks * found.chunks
        assert found.grid[0] < 2**31
        assert all(size <= 65535 for size in found.grid[1:])
        assert found.chunks * how["BLOCK"] >= layout.cols + 3 * (how["NOISE"] == kernels.LED.value)
        for block in {0, int(high * (blocks - 1)), blocks - 1}:
            for chunk in {0, int(low * (found.chunks - 1)), found.chunks - 1}:
                for r in (0, how["ROWS"] // 2, how["ROWS"] - 1):
                    for p in (0, 1, how["BLOCK"] // 2, how["BLOCK"] - 1, (layout.cols - 1) % how["BLOCK"]):
                        check_lane(call, kls, found, block, chunk, r, p)

    explore()
    record_property("launches", tried)
