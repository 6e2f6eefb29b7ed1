"""The launches of a call: grids, pointers, strides and constants, also for tensors larger than memory."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import reparam_kernels as rk
from reparam_kernels.gpu import plan as planner
from reparam_kernels.gpu import tiles
from reparam_kernels.ops.latent import triton as launcher
from reparam_kernels.ops.latent.arguments import make_arguments
from tests.launches import recording


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(mu, x, **options):
    """Return the outputs and the launches of a call."""
    call = make_arguments("test", mu, x, z=True, kl=True, seed=options.pop("seed", 3), **options)
    with recording() as launches:
        z, kl, _ = launcher.forward(call)
    return call, z, kl, launches


def constants(mu, x, **options):
    return forward(mu, x, **options)[-1][0].constants


SHAPES = [(1,), (3, 5), (1, 20), (128, 20), (7, 127), (4096, 128), (5, 1000), (3, 4097), (65537, 3), (2**31 + 8,)]
SHAPES += [(2**16, 2**16), (3, 2**31 + 1), (2**33, 3), (2**20, 20, 16), (2**34 + 2**12, 4), (2**45,), (2**42 + 4, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_grid_covers_every_element_within_the_limits(shape, dtype):
    mu = meta(*shape, dtype=dtype)
    _, z, kl, (launch, *sums) = forward(mu, mu)
    n = math.prod(shape)
    grid, how, sizes = launch.grid, launch.constants, launch.arguments
    rows, cols, chunks = (sizes[name] for name in ("rows", "cols", "chunks"))
    programs = math.prod(grid)
    assert grid[0] < 2**31
    assert all(size <= 65535 for size in grid[1:])
    assert rows * cols >= n > (rows - 1) * cols
    assert sizes["total"] == n
    blocks = -(-rows // how["ROWS"])
    assert programs >= blocks * chunks
    assert chunks * how["BLOCK"] >= cols
    assert math.log2(how["ROWS"] * how["BLOCK"]) % 1 == 0
    assert how["num_warps"] in (1, 2, 4)
    assert how["enable_fp_fusion"] is False
    two_dims = how["GRID"] == tiles.GRID_2D.value
    assert two_dims == (blocks * chunks > 2**31 - 1)
    positions = programs * how["ROWS"] * how["BLOCK"]
    if n > 10_000 and not two_dims and dtype != torch.float64:
        most = 4 if len(shape) == 3 else 1.5  # few blocks serve all lengths of the dim in the middle
        assert positions < most * n or 1024 < shape[-1] < 4100, "more positions idle than planned"
    assert how["COUNTER_32BIT"] == (n + 4 * how["BLOCK"] < 2**34)
    assert z.shape == shape
    assert kl.shape == (shape[:1] if len(shape) > 1 else ())
    per_row = rows * chunks // kl.numel()
    assert len(sums) == (not how["ROW_LEN"] and per_row > 1)
    for launch in sums:
        assert launch.name == "row_sum_kernel"
        assert launch.grid == (kl.numel(),)
        parts = launch.arguments["part_ptr"]
        assert launch.arguments["parts"] * kl.numel() == rows * chunks == parts.numel()


@pytest.mark.parametrize("width", [4, 20, 127, 1000, 1029])
def test_pointers_and_strides_lead_to_the_elements(width):
    """Row r, column c of the kernel is element r * cols + c; pointer and strides must lead to that element."""
    base = torch.arange(8 * 2 * width, dtype=torch.float32)
    mu, x = base.view(8, 2 * width).chunk(2, 1)
    _, z, kl, (launch,) = forward(mu, x)
    how, arguments = launch.constants, launch.arguments
    assert arguments["z_ptr"] is z
    assert arguments["kl_ptr"] is kl
    for name, tensor in (("mu", mu), ("x", x)):
        assert arguments[f"{name}_ptr"] is tensor
        strides = getattr(arguments["strides"], name)
        flat = tensor.reshape(-1)
        for i in (0, 1, width - 1, width, 3 * width + 2, 8 * width - 1):
            row, col = divmod(i, arguments["cols"])
            at = row * strides.row + col * strides.col
            if how["PACKED_STRIDED"]:
                at += col // how["ROW_LEN"] * (strides.outer - how["ROW_LEN"])
            assert base[tensor.storage_offset() + at] == flat[i]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skew", range(8))
def test_vectors_are_as_wide_as_the_worst_address_allows(skew, dtype):
    size = dtype.itemsize
    base = torch.zeros(64 * 64 + 16, dtype=dtype)
    assert base.data_ptr() % 64 == 0
    mu, x = torch.zeros(64, 64, dtype=dtype), base[skew:][: 64 * 64].view(64, 64)
    assert constants(mu, x)["VEC"] == max(v for v in (1, 2, 4, 8) if v * size <= 16 and skew % v == 0)


def test_vectors_need_widths_and_strides_too():
    base = torch.zeros(64, 128)
    for width, pitch, vec in ((64, 64, 4), (20, 40, 4), (20, 41, 1), (22, 40, 2), (20, 42, 2)):
        x = base.view(-1)[: 32 * pitch].as_strided((32, width), (pitch, 1))
        assert constants(torch.zeros(32, width), x)["VEC"] == vec, (width, pitch)


def test_offsets_in_a_tile_are_64_bit_if_rows_lie_far_apart():
    near = torch.empty_strided((64, 4), (2**20, 1), device="meta")
    far = torch.empty_strided((64, 4), (2**30, 1), device="meta")
    seed = torch.zeros(64, dtype=torch.int64, device="meta")
    assert constants(near, near, seed=seed)["OFFSET_32BIT"]
    assert not constants(far, far, seed=seed)["OFFSET_32BIT"]


def test_backward_gets_what_forward_had():
    mu, x = torch.zeros(64, 20), torch.zeros(64, 20)
    call, z, kl, (ahead,) = forward(mu, x)
    with recording() as launches:
        dmu, dx, *_ = launcher.backward(
            call, (torch.zeros_like(z), torch.zeros_like(kl), None), (True, True, False, False)
        )
    (launch,) = launches
    assert launch.grid == ahead.grid
    assert launch.constants == ahead.constants
    for name in ("mu_ptr", "x_ptr", "mu_p_ptr", "seed_ptr", "rows", "cols", "total", "chunks", "counts"):
        assert launch.arguments[name] is ahead.arguments[name] or launch.arguments[name] == ahead.arguments[name], name
    assert launch.arguments["dmu_ptr"] is dmu
    assert launch.arguments["dx_ptr"] is dx
    assert launch.arguments["dmu_p_ptr"] is None


@pytest.mark.parametrize("shape", [(2**35,), (2**15, 2**20), (2**36 + 4, 3), (2**25, 4096)], ids=str)
def test_the_threads_of_a_grid_are_below_the_limit_of_hip(shape):
    """HIP counts the threads along x, of which a wave has up to 64, in 32 bits."""
    mu = meta(1, dtype=torch.bfloat16).expand(shape)
    call = make_arguments("test", mu, mu, kl=True, event_ndim=len(shape) - 1 or 1)
    with recording(compiler="hip") as launches:
        launcher.forward(call)
    first, *sums = launches
    for launch in launches:
        assert launch.grid[0] * 64 * launch.constants["num_warps"] < 2**32
        assert all(size <= 65535 for size in launch.grid[1:])
    rows, chunks = first.arguments["rows"], first.arguments["chunks"]
    assert math.prod(first.grid) >= -(-rows // first.constants["ROWS"]) * chunks
    kls = math.prod(shape[: len(shape) - call.config.event_ndim])
    assert sum(math.prod(launch.grid) for launch in sums) in (0, kls)


def test_one_launch_a_call_and_two_if_rows_are_huge():
    for shape, sums in (((128, 20), 0), ((512, 2048), 0), ((4, 5000), 1)):
        names = [launch.name for launch in forward(meta(*shape), meta(*shape))[-1]]
        assert names == ["forward_kernel"] + ["row_sum_kernel"] * sums


def test_equal_keys_have_equal_plans_and_kernels():
    """A plan depends on no tensor, seed or pointer beyond its key."""
    first, second = (forward(torch.randn(64, 20), torch.randn(64, 20), seed=i)[-1][0] for i in range(2))
    assert first.compile_time == second.compile_time
    assert hash(first.compile_time["TILING"]) == hash(second.compile_time["TILING"])


@pytest.mark.parametrize("of", ["joint", "dims", "both"])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (33, 31, 5), (4096, 500, 64), (2**20, 2**12, 3), (2**31 + 8, 2, 1)], ids=str
)
def test_the_grids_of_a_mixture_cover_points_components_and_dims(size, of):
    items, components, cols = size
    z, mu = meta(items, cols).requires_grad_(), meta(components, cols).requires_grad_()
    with recording() as launches:
        out = rk.mixture_log_prob(z, mu, mu, of=of)
        torch.autograd.grad(out, (z, mu), [torch.empty_like(t) for t in (out if of == "both" else [out])])
    blocks, component_blocks = -(-items // 32), -(-components // 32)
    parts = 1 if of != "dims" else -(-cols // 8)
    forward = {"joint_kernel": blocks} if of != "dims" else {}
    forward |= {"dims_kernel": blocks * cols} if of != "joint" else {}
    expected = [("components_kernel", components), *forward.items(), ("components_kernel", components)]
    expected += [("points_backward_kernel", blocks * parts), ("components_backward_kernel", component_blocks * parts)]
    assert [(launch.name, *launch.grid) for launch in launches] == [*expected, ("finish_kernel", components)]
    for launch in launches:
        assert launch.arguments["sizes"] == size
        assert launch.constants["enable_fp_fusion"] is False
        assert launch.grid[0] < 2**31


SIZES = [1, 2, 3, 4, 5, 20, 127, 128, 1000, 1029, 4097, 2**16, 2**20, 2**31 - 1024, 2**31 - 1, 2**31, 2**33 + 4]


@st.composite
def plans(draw):
    """Draw plans for up to 2^48 elements with packed, transposed, repeated or distant operands."""
    shape = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.sampled_from(SIZES) | st.integers(1, 2**34))
        shape.append(size if size * math.prod(shape) <= 2**48 else 1)

    def strided():
        strides, step = [0] * len(shape), 1
        for i in draw(st.permutations(range(len(shape))) | st.just(range(len(shape))))[::-1]:
            strides[i] = step * draw(st.sampled_from([1, 1, 1, 0]))
            step = step * shape[i] + draw(st.sampled_from([0, 0, 0, 1, 4, 13, 2**20, 2**31]))
        assume(step < 2**58)
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")

    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    mu, x = strided(), strided()
    seeds = meta(shape[0], dtype=torch.int64) if draw(st.booleans()) else 3
    event, samples = draw(st.integers(0, len(shape))), draw(st.sampled_from([(), (2,), (3,), (2**12, 5)]))
    call = make_arguments("test", mu, x, z=True, kl=True, seed=seeds, sample_shape=samples, event_ndim=event)
    kl = meta(*shape[: len(shape) - event])
    spec = launcher.make_spec("forward", call, mu, [mu, x], [], kl, True)
    return call, spec, planner.plan_launch(spec)


def offset(t, element):
    at = 0
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        element, index = divmod(element, size)
        at += index * stride
    return at


def check_position(call, spec, plan, block, chunk, r, p):
    """Check the integer arithmetic of gpu/tiles.py for one position, within 32 bits if OFFSET_32BIT."""
    layout, how = plan.layout, plan.tiling
    row, column = block * how.ROWS + r, chunk * how.BLOCK + p
    n, element = plan.total, row * layout.cols + column
    assert column < layout.cols or not how.EVEN
    if row >= layout.rows or column >= layout.cols or element >= n:
        return
    small = [row, r * layout.cols + p]
    for tensor, s, copied in zip((call.mu, call.x), layout.strides, layout.copied, strict=True):
        row_stride = layout.cols if s.row is None else s.row
        if layout.rows_per_outer is not None:
            a, b = divmod(row, layout.rows_per_outer)
            base, tile = a * s.outer + b * row_stride + chunk * how.BLOCK * s.col, [p * s.col]
        else:
            base, tile = block * how.ROWS * row_stride + chunk * how.BLOCK * s.col, [r * row_stride, p * s.col]
            tile += [p // layout.row_len * (s.outer - layout.row_len * s.col)] if layout.packed_strided else []
        assert base + sum(tile) == (element if copied else offset(tensor, element))
        small += [*tile, sum(tile)]
    assert not how.OFFSET_32BIT or all(abs(part) < 2**31 for part in small)
    seeds, samples = call.seed.numel(), math.prod(call.config.sample_shape)
    group = n // seeds
    rows_per_seed = plan.counts.rows_per_seed
    if seeds > 1:
        assert row // rows_per_seed == element // group
    start = (row % rows_per_seed if seeds > 1 else row) * layout.cols
    assert start == row * layout.cols - element // group * group
    noise = how.NOISE
    if noise == tiles.NOISE_ALIGNED.value:
        assert start % 4 == 0
        assert samples == 1 or group % 4 == 0
    assert not how.COUNTER_32BIT or (samples - 1) * group + start + layout.cols < 2**34
    assert how.ONE_KL is not bool(spec.kl_ndim)
    if not how.ONE_KL and not layout.row_len:
        assert row // plan.counts.rows_per_kl == element // (n // math.prod(spec.shape[: spec.kl_ndim]))


def test_the_arithmetic_of_any_launch(record_property):
    """Programs cover all elements; a position has its element's address, seed and KL; the plan's assumptions hold."""
    tried = 0

    @settings(max_examples=1000, derandomize=True, database=None, deadline=None, suppress_health_check=[*HealthCheck])
    @given(plans(), st.floats(0, 1), st.floats(0, 1))
    def explore(planned, high, low):
        nonlocal tried
        tried += 1
        call, spec, plan = planned
        layout, how = plan.layout, plan.tiling
        grid = plan.grid
        blocks = -(-layout.rows // how.ROWS)
        assert layout.rows * layout.cols >= plan.total > (layout.rows - 1) * layout.cols
        assert math.prod(grid) >= blocks * plan.chunks
        assert grid[0] < 2**31
        assert all(size <= 65535 for size in grid[1:])
        noise = how.NOISE
        assert plan.chunks * how.BLOCK >= layout.cols + 3 * (noise == tiles.NOISE_UNALIGNED.value)
        for block in {0, int(high * (blocks - 1)), blocks - 1}:
            for chunk in {0, int(low * (plan.chunks - 1)), plan.chunks - 1}:
                for r in (0, how.ROWS // 2, how.ROWS - 1):
                    for p in (0, 1, how.BLOCK // 2, how.BLOCK - 1, (layout.cols - 1) % how.BLOCK):
                        check_position(call, spec, plan, block, chunk, r, p)

    explore()
    record_property("launches", tried)
