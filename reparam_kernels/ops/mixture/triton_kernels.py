"""The Triton kernels of the mixture op. csrc/ops/mixture_*.h have the same steps under the same names.

Points and components are read as columns, [D, B] and [D, N], so that neighbouring threads read neighbouring numbers.
A program handles BLOCK_B points and BLOCK_N components at a time. Logarithms of terms are in base 2. A pointer that is
None is absent, or not wanted.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...gpu.elementary import div, exp_half, fma, horner, log, softplus
from ...gpu.gaussian import LOGVAR, SOFTPLUS, STD, clamp, in_bounds

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
# HALF + HALF_REST is -log2(e) / 2, in float32 and in float64.
HALF, HALF_REST = tl.constexpr(-0.7213475108146667), tl.constexpr(-9.62981494545545e-09)
HALF_64 = tl.constexpr(-0.7213475204444817)
# Stand-ins for infinity, so that differences are never NaN. Terms below -FAR count as 0.
FAR, FAR_64 = tl.constexpr(2e37), tl.constexpr(2e306)
# Below -PRECISE a term is held in one word: the second would be too large for exp2.
PRECISE, PRECISE_64 = tl.constexpr(2.0**30), tl.constexpr(2.0**59)
# The largest 1 / sigma, so that it times a distance of 0 is 0.
SHARPEST, SHARPEST_64 = tl.constexpr(3e38), tl.constexpr(1e308)
PLAIN_DIMS = tl.constexpr(8)  # dims whose squares are added without compensation


class Options(NamedTuple):
    """The options of a call, as compile-time constants."""

    FLOAT64: bool
    PARAM: int
    MIN_STD: float
    CLAMP: bool
    LOW: float
    HIGH: float
    JOINT: bool
    DIMS: bool
    ITEM_WEIGHTS: bool  # each point has log-weights of its own
    BLOCK_B: int
    BLOCK_N: int


class Scale(NamedTuple):
    """How a component reads its second argument: log sigma, 1 / sigma, and the derivative of log sigma."""

    log_sigma: Any
    inverse: Any
    slope: Any


class TwoWords(NamedTuple):
    """A sum in two words; rest is small beside top."""

    top: Any
    rest: Any


class Sizes(NamedTuple):
    """The sizes of a launch."""

    items: Any
    components: Any
    cols: Any


@triton.jit
def scale_of(unclamped, OPTIONS: tl.constexpr):
    x = unclamped
    if OPTIONS.CLAMP:
        x = clamp(unclamped, OPTIONS)
    if OPTIONS.PARAM == STD:
        log_sigma, inverse = log(x), div(1.0, x)
        slope = inverse
    elif OPTIONS.PARAM == SOFTPLUS:
        p = softplus(x)
        sigma = p.value + OPTIONS.MIN_STD
        log_sigma, inverse, slope = log(sigma), div(1.0, sigma), div(p.slope, sigma)
        if OPTIONS.MIN_STD == 0.0:
            IS_EXP: tl.constexpr = -37.0 if OPTIONS.FLOAT64 else -17.0  # below, softplus is exp
            log_sigma = tl.where(x < IS_EXP, x, log_sigma)
            inverse = tl.where(x < IS_EXP, exp_half(-2.0 * x).sigma, inverse)
            slope = tl.where(x < IS_EXP, 1.0, slope)
    else:
        SLOPE: tl.constexpr = 0.5 if OPTIONS.PARAM == LOGVAR else 1.0
        log_sigma = SLOPE * x
        inverse = exp_half(-2.0 * log_sigma).sigma
        slope = tl.zeros_like(x) + SLOPE
    if OPTIONS.CLAMP:
        slope = tl.where(in_bounds(unclamped, OPTIONS), slope, 0.0)
    return Scale(log_sigma, inverse, slope)


@triton.jit
def exp2(x):
    """Compute 2^x for x < 128, and 0 for x < -126.5."""
    if x.dtype == tl.float64:
        return tl.exp2(x)
    else:
        bounded = tl.where(x < -127.0, -127.0, x)  # keeps NaN
        t = bounded + 12583039.0
        r = bounded - (t - 12583039.0)
        scale = (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        q = horner(r, (0.0013269521, 0.009671291, 0.05550711, 0.24022247, 0.693147))
        return tl.fma(q * r, scale, scale)


@triton.jit
def two_sum(total, x):
    top = total.top + x
    added = top - total.top
    return TwoWords(top, total.rest + ((total.top - (top - added)) + (x - added)))


@triton.jit
def normalized(total, OPTIONS: tl.constexpr):
    """Make rest as small as it can be, and 0 where it would be too large for exp2."""
    LIMIT: tl.constexpr = PRECISE_64 if OPTIONS.FLOAT64 else PRECISE
    top = total.top + total.rest
    rest = total.rest - (top - total.top)
    return TwoWords(top, tl.where(top < -LIMIT, 0.0, rest))


@triton.jit
def components_kernel(
    mu_ptr,  # [N, D]
    x_ptr,  # [N, D]
    log_weights_ptr,  # [N], or None if each point has its own
    fields_ptr,  # [3, D, N]: mu, 1 / sigma and the constant term of each dim
    joint_ptr,  # [2, N]: the constant term of a whole event, in two words
    sizes,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Prepare the components as the other kernels read them."""
    FLOAT: tl.constexpr = tl.float64 if OPTIONS.FLOAT64 else tl.float32
    LOWEST: tl.constexpr = -FAR_64 if OPTIONS.FLOAT64 else -FAR
    SHARP: tl.constexpr = SHARPEST_64 if OPTIONS.FLOAT64 else SHARPEST
    n = tl.program_id(0).to(tl.int64)
    weight = tl.zeros((), tl.float64)
    if log_weights_ptr is not None:
        weight = tl.load(log_weights_ptr + n).to(tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, sizes.cols, BLOCK):
        d = n * 0 + first + tl.arange(0, BLOCK)
        mask = d < sizes.cols
        mu = tl.load(mu_ptr + n * sizes.cols + d, mask=mask).to(FLOAT)
        s = scale_of(tl.load(x_ptr + n * sizes.cols + d, mask=mask, other=1.0).to(FLOAT), OPTIONS)
        term = -s.log_sigma.to(tl.float64) - HALF_LOG_2PI
        total += tl.where(mask, term, 0.0)
        to = fields_ptr + d * sizes.components + n
        plane = sizes.components * (n * 0 + sizes.cols)
        tl.store(to, mu, mask=mask)
        tl.store(to + plane, tl.where(s.inverse > SHARP, SHARP, s.inverse), mask=mask)  # keeps NaN
        tl.store(to + 2 * plane, ((weight + term) * LOG2E).to(FLOAT), mask=mask)
    joint = (weight + tl.sum(total)) * LOG2E
    none = joint < LOWEST
    top = tl.where(none, 5 * LOWEST, joint).to(FLOAT)
    tl.store(joint_ptr + n, top)
    tl.store(joint_ptr + sizes.components + n, tl.where(none, 0.0, joint - top.to(tl.float64)).to(FLOAT))


@triton.jit
def load_weights(ptr, b, n, mask, sizes, OPTIONS: tl.constexpr):
    """Load the log-weights [BLOCK_B, BLOCK_N] of points that have their own, in base 2."""
    FLOAT: tl.constexpr = tl.float64 if OPTIONS.FLOAT64 else tl.float32
    EXCLUDED: tl.constexpr = -5 * FAR_64 if OPTIONS.FLOAT64 else -5 * FAR
    w = tl.load(ptr + b[:, None] * sizes.components + n[None, :], mask=mask, other=0.0).to(FLOAT) * LOG2E
    return tl.where(w < EXCLUDED, EXCLUDED, w)  # keeps NaN


@triton.jit
def load_e(z_ptr, fields_ptr, d, b, n, b_mask, n_mask, sizes):
    """Load 1 / sigma [1, BLOCK_N] of a dim, and compute e = (z - mu) / sigma [BLOCK_B, BLOCK_N]."""
    z = tl.load(z_ptr + d * sizes.items + b, mask=b_mask, other=0.0)[:, None]
    at = fields_ptr + d * sizes.components + n
    mu = tl.load(at, mask=n_mask, other=0.0)[None, :]
    inverse = tl.load(at + sizes.components * (d * 0 + sizes.cols), mask=n_mask, other=0.0)[None, :]
    return (z - mu) * inverse, inverse


@triton.jit
def joint_terms(z_ptr, fields_ptr, joint_ptr, weights_ptr, b, n, sizes, OPTIONS: tl.constexpr):
    """Compute the logarithms of the terms [BLOCK_B, BLOCK_N] of whole events, in two words."""
    FLOAT: tl.constexpr = tl.float64 if OPTIONS.FLOAT64 else tl.float32
    LIMIT: tl.constexpr = FAR_64 if OPTIONS.FLOAT64 else FAR
    HALF_TOP: tl.constexpr = HALF_64 if OPTIONS.FLOAT64 else HALF
    REST: tl.constexpr = 0.0 if OPTIONS.FLOAT64 else HALF_REST
    b_mask, n_mask = b < sizes.items, n < sizes.components
    squares = tl.full([OPTIONS.BLOCK_B, OPTIONS.BLOCK_N], 0.0, FLOAT)
    rest = squares
    for first in range(0, sizes.cols, PLAIN_DIMS):
        part = tl.full([OPTIONS.BLOCK_B, OPTIONS.BLOCK_N], 0.0, FLOAT)
        for i in range(first, tl.minimum(first + PLAIN_DIMS, sizes.cols)):
            e, _ = load_e(z_ptr, fields_ptr, tl.full((), 0, tl.int64) + i, b, n, b_mask, n_mask, sizes)
            part = fma(e, e, part)
        top = squares + part
        rest += part - (top - squares)
        squares = top
    rest = tl.where(squares > LIMIT, 0.0, rest)
    squares = tl.where(squares > LIMIT, 2 * LIMIT, squares)
    half = tl.full(squares.shape, HALF_TOP, FLOAT)
    product = squares * half
    rest = fma(rest, half, fma(squares, tl.full(squares.shape, REST, FLOAT), fma(squares, half, -product)))
    rest += tl.load(joint_ptr + sizes.components + n, mask=n_mask, other=0.0)[None, :]
    constant = tl.load(joint_ptr + n, mask=n_mask, other=-5 * LIMIT)[None, :]
    total = TwoWords(tl.broadcast_to(constant, squares.shape), rest)
    if OPTIONS.ITEM_WEIGHTS:
        mask = b_mask[:, None] & n_mask[None, :]
        total = two_sum(total, load_weights(weights_ptr, b, n, mask, sizes, OPTIONS))
    return normalized(two_sum(total, product), OPTIONS)


@triton.jit
def dim_terms(e, fields_ptr, d, n, n_mask, sizes, OPTIONS: tl.constexpr):
    """Compute the logarithms of the terms of one dim, without the points' own weights."""
    EXCLUDED: tl.constexpr = -5 * FAR_64 if OPTIONS.FLOAT64 else -5 * FAR
    HALF_TOP: tl.constexpr = HALF_64 if OPTIONS.FLOAT64 else HALF
    at = fields_ptr + (2 * sizes.cols + d) * sizes.components + n
    constant = tl.load(at, mask=n_mask, other=EXCLUDED)[None, :]
    return fma(e * e, tl.full(e.shape, HALF_TOP, e.dtype), tl.broadcast_to(constant, e.shape))


@triton.jit
def store_sum(maximum, total, at, count, mask, value_ptr, saved_ptr):
    """Store the value of a maximum and a sum, and what backward needs."""
    log_sum = log(total)
    value = maximum.to(tl.float64) * LN2 + log_sum.to(tl.float64)
    tl.store(value_ptr + at, value.to(value_ptr.dtype.element_ty), mask=mask)
    if saved_ptr is not None:
        log2_sum = tl.where(total == 0.0, 0.0, (log_sum.to(tl.float64) * LOG2E).to(total.dtype))
        tl.store(saved_ptr + at, maximum, mask=mask)
        tl.store(saved_ptr + count + at, log2_sum, mask=mask)


@triton.jit
def joint_kernel(
    z_ptr,  # [D, B]
    fields_ptr,
    joint_ptr,
    weights_ptr,  # [B, N] or None
    value_ptr,  # [B]
    saved_ptr,  # [2, B]
    sizes,
    OPTIONS: tl.constexpr,
):
    FLOAT: tl.constexpr = tl.float64 if OPTIONS.FLOAT64 else tl.float32
    LOWEST: tl.constexpr = -FAR_64 if OPTIONS.FLOAT64 else -FAR
    b = tl.program_id(0).to(tl.int64) * OPTIONS.BLOCK_B + tl.arange(0, OPTIONS.BLOCK_B)
    maximum = tl.full([OPTIONS.BLOCK_B], LOWEST, FLOAT)
    total = tl.full([OPTIONS.BLOCK_B], 0.0, FLOAT)
    for first in range(0, sizes.components, OPTIONS.BLOCK_N):
        n = tl.full((), 0, tl.int64) + first + tl.arange(0, OPTIONS.BLOCK_N)
        terms = joint_terms(z_ptr, fields_ptr, joint_ptr, weights_ptr, b, n, sizes, OPTIONS)
        top = tl.maximum(maximum, tl.max(terms.top, axis=1))
        shares = exp2((terms.top - top[:, None]) + terms.rest)
        total = total * exp2(maximum - top) + tl.sum(shares, axis=1)
        maximum = top
    store_sum(maximum, total, b, sizes.items, b < sizes.items, value_ptr, saved_ptr)


@triton.jit
def dims_kernel(
    z_ptr,  # [D, B]
    fields_ptr,
    weights_ptr,  # [B, N] or None
    value_ptr,  # [B, D]
    saved_ptr,  # [2, B, D]
    sizes,
    OPTIONS: tl.constexpr,
):
    FLOAT: tl.constexpr = tl.float64 if OPTIONS.FLOAT64 else tl.float32
    LOWEST: tl.constexpr = -FAR_64 if OPTIONS.FLOAT64 else -FAR
    pid = tl.program_id(0).to(tl.int64)
    d = pid % sizes.cols
    b = pid // sizes.cols * OPTIONS.BLOCK_B + tl.arange(0, OPTIONS.BLOCK_B)
    b_mask = b < sizes.items
    maximum = tl.full([OPTIONS.BLOCK_B], LOWEST, FLOAT)
    total = tl.full([OPTIONS.BLOCK_B], 0.0, FLOAT)
    for first in range(0, sizes.components, OPTIONS.BLOCK_N):
        n = tl.full((), 0, tl.int64) + first + tl.arange(0, OPTIONS.BLOCK_N)
        n_mask = n < sizes.components
        e, _ = load_e(z_ptr, fields_ptr, d, b, n, b_mask, n_mask, sizes)
        terms = dim_terms(e, fields_ptr, d, n, n_mask, sizes, OPTIONS)
        if OPTIONS.ITEM_WEIGHTS:
            terms += load_weights(weights_ptr, b, n, b_mask[:, None] & n_mask[None, :], sizes, OPTIONS)
        top = tl.maximum(maximum, tl.max(terms, axis=1))
        total = total * exp2(maximum - top) + tl.sum(exp2(terms - top[:, None]), axis=1)
        maximum = top
    at = b * sizes.cols + d
    store_sum(maximum, total, at, sizes.items * (d * 0 + sizes.cols), b_mask, value_ptr, saved_ptr)


@triton.jit
def share(terms, rest, sums_ptr, grad_ptr, at, count, mask, OPTIONS: tl.constexpr):
    """Compute the gradients of the terms of one sum: each term's share of it, times the gradient of its value."""
    FAR_AWAY: tl.constexpr = FAR_64 if OPTIONS.FLOAT64 else FAR
    maximum = tl.load(sums_ptr + at, mask=mask, other=FAR_AWAY)[:, None]
    log_sum = tl.load(sums_ptr + count + at, mask=mask, other=0.0)[:, None]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)[:, None]
    return exp2((terms - maximum) + (rest - log_sum)) * grad


@triton.jit
def joint_gradients(ptrs, b, n, sizes, OPTIONS: tl.constexpr):
    """Compute the joint part of the gradients of terms [BLOCK_B, BLOCK_N]."""
    FLOAT: tl.constexpr = tl.float64 if OPTIONS.FLOAT64 else tl.float32
    if OPTIONS.JOINT:
        terms = joint_terms(ptrs.z, ptrs.fields, ptrs.joint, ptrs.weights, b, n, sizes, OPTIONS)
        return share(terms.top, terms.rest, ptrs.joint_sums, ptrs.joint_grad, b, sizes.items, b < sizes.items, OPTIONS)
    else:
        return tl.full([OPTIONS.BLOCK_B, OPTIONS.BLOCK_N], 0.0, FLOAT)


@triton.jit
def own_gradients(ptrs, e, weights, d, b, n, sizes, OPTIONS: tl.constexpr):
    """Compute the part of one dim in the gradients of its terms."""
    terms = dim_terms(e, ptrs.fields, d, n, n < sizes.components, sizes, OPTIONS)
    if OPTIONS.ITEM_WEIGHTS:
        terms += weights
    count = sizes.items * (d * 0 + sizes.cols)
    at = d * sizes.items + b
    return share(terms, 0.0, ptrs.dims_sums, ptrs.dims_grad, at, count, b < sizes.items, OPTIONS)


class Pointers(NamedTuple):
    """What both backward kernels read."""

    z: Any  # [D, B]
    fields: Any
    joint: Any
    weights: Any  # [B, N] or None
    joint_sums: Any  # [2, B]
    joint_grad: Any  # [B]
    dims_sums: Any  # [2, D, B]
    dims_grad: Any  # [D, B]


@triton.jit
def points_backward_kernel(
    ptrs,
    dz_ptr,  # [D, B], zeros
    sizes,
    dims_per_program,
    OPTIONS: tl.constexpr,
):
    """Add -dz up over the components. A program has its points and dims to itself."""
    chunks = tl.maximum((sizes.cols + dims_per_program - 1) // dims_per_program, 1)
    pid = tl.program_id(0).to(tl.int64)
    b = pid // chunks * OPTIONS.BLOCK_B + tl.arange(0, OPTIONS.BLOCK_B)
    begin = pid % chunks * dims_per_program
    b_mask = b < sizes.items
    for first in range(0, sizes.components, OPTIONS.BLOCK_N):
        n = tl.full((), 0, tl.int64) + first + tl.arange(0, OPTIONS.BLOCK_N)
        n_mask = n < sizes.components
        joint = joint_gradients(ptrs, b, n, sizes, OPTIONS)
        weights = joint
        if OPTIONS.DIMS and OPTIONS.ITEM_WEIGHTS:
            weights = load_weights(ptrs.weights, b, n, b_mask[:, None] & n_mask[None, :], sizes, OPTIONS)
        for i in range(0, tl.minimum(dims_per_program, sizes.cols - begin)):
            d = begin + i
            e, inverse = load_e(ptrs.z, ptrs.fields, d, b, n, b_mask, n_mask, sizes)
            total = joint
            if OPTIONS.DIMS:
                total += own_gradients(ptrs, e, weights, d, b, n, sizes, OPTIONS)
            at = dz_ptr + d * sizes.items + b
            before = tl.load(at, mask=b_mask, other=0.0)
            tl.store(at, before + tl.sum(total * e * inverse, axis=1), mask=b_mask)
        tl.debug_barrier()  # the next block of components reads what other threads have written


@triton.jit
def components_backward_kernel(
    ptrs,
    dmu_ptr,  # [D, N], zeros: sigma times the gradient to mu
    dlog_sigma_ptr,  # [D, N], zeros
    dweights_ptr,  # [N], or [B, N] if each point has its own
    sizes,
    dims_per_program,
    OPTIONS: tl.constexpr,
):
    """Add the gradients to the components up over the points. A program has its components and dims to itself."""
    FLOAT: tl.constexpr = tl.float64 if OPTIONS.FLOAT64 else tl.float32
    chunks = tl.maximum((sizes.cols + dims_per_program - 1) // dims_per_program, 1)
    pid = tl.program_id(0).to(tl.int64)
    n = pid // chunks * OPTIONS.BLOCK_N + tl.arange(0, OPTIONS.BLOCK_N)
    begin = pid % chunks * dims_per_program
    n_mask = n < sizes.components
    of_weights = tl.full([OPTIONS.BLOCK_N], 0.0, FLOAT)
    for first in range(0, sizes.items, OPTIONS.BLOCK_B):
        b = tl.full((), 0, tl.int64) + first + tl.arange(0, OPTIONS.BLOCK_B)
        b_mask = b < sizes.items
        joint = joint_gradients(ptrs, b, n, sizes, OPTIONS)
        weights = joint
        if OPTIONS.DIMS and OPTIONS.ITEM_WEIGHTS:
            weights = load_weights(ptrs.weights, b, n, b_mask[:, None] & n_mask[None, :], sizes, OPTIONS)
        all_dims = joint
        for i in range(0, tl.minimum(dims_per_program, sizes.cols - begin)):
            d = begin + i
            e, _ = load_e(ptrs.z, ptrs.fields, d, b, n, b_mask, n_mask, sizes)
            total = joint
            if OPTIONS.DIMS:
                own = own_gradients(ptrs, e, weights, d, b, n, sizes, OPTIONS)
                total += own
                if dweights_ptr is not None:
                    all_dims += own
            at = d * sizes.components + n
            excess = fma(e, e, tl.full(e.shape, -1.0, FLOAT))
            dmu = tl.load(dmu_ptr + at, mask=n_mask, other=0.0) + tl.sum(total * e, axis=0)
            dlog_sigma = tl.load(dlog_sigma_ptr + at, mask=n_mask, other=0.0) + tl.sum(total * excess, axis=0)
            tl.store(dmu_ptr + at, dmu, mask=n_mask)
            tl.store(dlog_sigma_ptr + at, dlog_sigma, mask=n_mask)
        if dweights_ptr is not None:
            if OPTIONS.ITEM_WEIGHTS:
                to = dweights_ptr + b[:, None] * sizes.components + n[None, :]
                tl.store(to, all_dims, mask=b_mask[:, None] & n_mask[None, :])
            else:
                of_weights += tl.sum(all_dims, axis=0)
        tl.debug_barrier()  # the next block of points reads what other threads have written
    if dweights_ptr is not None and not OPTIONS.ITEM_WEIGHTS:
        tl.store(dweights_ptr + n, of_weights, mask=n_mask)


@triton.jit
def finish_kernel(
    x_ptr,  # [N, D]
    fields_ptr,
    dmu_sum_ptr,  # [D, N]
    dlog_sigma_ptr,  # [D, N]
    dmu_ptr,  # [N, D]
    dx_ptr,  # [N, D]
    sizes,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn the sums over the points into the gradients to mu and x."""
    FLOAT: tl.constexpr = tl.float64 if OPTIONS.FLOAT64 else tl.float32
    n = tl.program_id(0).to(tl.int64)
    for first in range(0, sizes.cols, BLOCK):
        d = n * 0 + first + tl.arange(0, BLOCK)
        mask = d < sizes.cols
        at, to = d * sizes.components + n, n * sizes.cols + d
        if dmu_ptr is not None:
            inverse = tl.load(fields_ptr + sizes.components * (n * 0 + sizes.cols) + at, mask=mask)
            dmu = tl.load(dmu_sum_ptr + at, mask=mask) * inverse
            tl.store(dmu_ptr + to, dmu.to(dmu_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            slope = scale_of(tl.load(x_ptr + to, mask=mask, other=1.0).to(FLOAT), OPTIONS).slope
            dx = tl.where(slope == 0.0, 0.0, tl.load(dlog_sigma_ptr + at, mask=mask) * slope)
            tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=mask)
