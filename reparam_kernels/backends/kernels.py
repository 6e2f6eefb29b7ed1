"""The Triton kernels: randn, forward, backward, and the sum of a row's parts.

The mathematics of one element is csrc/math.h line for line, under the same names: IEEE add, mul, fma and sqrt in one
order, so eps and float32 z have the same bits as in C++.

A kernel sees rows x cols elements in tiles of ROWS x BLOCK lanes. A lane is a position in whole groups of four, since
one Philox counter makes four normals: lane = position + lead, where a row whose noise starts inside a group leads with
the lanes that belong to the row before it. Row r of an operand starts at r // nest * outer + r % nest * step. Short
rows with a KL each come several to a kernel row: PER runs of INNER columns, `outer` apart where SKIP says so.

What the launcher has proved of a call comes as constants: SEEDS, more than one; NEAR, fewer than 2^34 elements to a
seed, so that 32 bits count the groups; SHORT, offsets in a tile fit 32 bits; WHOLE, every lane holds an element; VEC,
rows start and end at multiples of so many elements, in memory too; NVIDIA, the compiler knows its assembly.
"""

import triton
import triton.language as tl

LOGVAR, LOGSTD, STD, SOFTPLUS = (tl.constexpr(i) for i in range(4))  # param
# Where eps comes from: nowhere; the user; groups of four that start with each row; that start before it; or lane by
# lane, where the samples of a row start at different places of a group.
NONE, GIVEN, ALIGNED, LED, LANEWISE = (tl.constexpr(i) for i in range(5))
# What the number of a program means: a block of rows; a chunk of the only row; a block of rows and a chunk; the same
# in a grid folded along y, where x cannot hold all programs.
BY_ROWS, BY_CHUNKS, BY_BOTH, FOLDED = (tl.constexpr(i) for i in range(4))


# ---- noise


@triton.jit
def philox4x32_10(seed, c0, c1):
    """Four 32-bit words (Salmon et al., SC 2011): one widening multiply gives both halves of a product."""
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = (seed.to(tl.uint64) & 0xFFFFFFFF).to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p1 & 0xFFFFFFFF).to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, (p0 & 0xFFFFFFFF).to(tl.uint32)
        k0 = ((k0.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
        k1 = ((k1.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def root(x, NVIDIA: tl.constexpr):
    """sqrt, correctly rounded. On NVIDIA: what ptxas makes of sqrt.rn, without its branch for tiny and infinite x."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            """{ .reg .f32 y, s, h, e;
            rsqrt.approx.ftz.f32 y, $1;
            mul.rn.f32 s, $1, y;
            mul.rn.f32 h, y, 0f3F000000;
            neg.f32 e, s;
            fma.rn.f32 e, e, s, $1;
            fma.rn.f32 $0, e, h, s; }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.sqrt_rn(x)


@triton.jit
def box_muller(x, y, NVIDIA: tl.constexpr = False):
    """Two words to two normals: r(x) cos t(y), r(x) sin t(y)."""
    xi = x.to(tl.int32, bitcast=True)
    upper = xi < 0
    v = tl.fma(xi.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    b = v.to(tl.int32, bitcast=True)
    m = (b & 0x7FFFFF) | 0x3F000000
    f = tl.where(upper, v, m.to(tl.float32, bitcast=True) - 1.0)
    e = tl.where(upper, 0, b - m)
    q = tl.fma(f, 2.321223736, 2.072345257)
    q = tl.fma(q, f, 1.503254056)
    q = tl.fma(q, f, -0.1016341075)
    q = tl.fma(q, f, 0.5393293500)
    q = tl.fma(q, f, -0.6642580628)
    q = tl.fma(q, f, 1.000049233)
    q = tl.fma(q, f, -2.0)
    r = root(tl.fma(f, q, e.to(tl.float32) * -1.6525917e-7), NVIDIA)  # of a number in [2^-32, 46]
    y2 = y << 1
    sr = (r.to(tl.uint32, bitcast=True) ^ ((y ^ y2) & 0x80000000)).to(tl.float32, bitcast=True)
    t = tl.fma(y2.to(tl.int32, bitcast=True).to(tl.float32), 4.656612873077393e-10, 4.656612873077393e-10)
    w = t * t
    sn = tl.fma(w, 1.492839947e-4, -4.668947775e-3)
    sn = tl.fma(sn, w, 7.968617976e-2)
    sn = tl.fma(sn, w, -0.6459627748)
    sn = t * tl.fma(sn, w, 1.570796251)
    cs = tl.fma(w, 8.594021783e-4, -2.081347443e-2)
    cs = tl.fma(cs, w, 0.2536529601)
    cs = tl.fma(cs, w, -1.233698845)
    cs = tl.fma(cs, w, 1.0)
    return sr * cs, sr * sn


@triton.jit
def normals(
    seed, first_group, ROWS: tl.constexpr, BLOCK: tl.constexpr, NEAR: tl.constexpr = False, NVIDIA: tl.constexpr = False
):
    """eps for BLOCK lanes from a group on; seed and first_group are scalars or [ROWS, 1]. NEAR: groups below 2^32."""
    at = tl.arange(0, BLOCK // 4)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    if NEAR:
        low = first_group.to(tl.uint32) + at.to(tl.uint32)
        high = tl.zeros_like(low)
    else:
        group = (first_group + at).to(tl.uint64)
        low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    x0, x1, x2, x3 = philox4x32_10(seed, low, high)
    n0, n1 = box_muller(x0, x1, NVIDIA)
    n2, n3 = box_muller(x2, x3, NVIDIA)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [ROWS, BLOCK])


@triton.jit
def normal_at(seed, index, NVIDIA: tl.constexpr):
    """eps[index], each lane for itself."""
    word = index % 4
    group = (index // 4).to(tl.uint64)
    x0, x1, x2, x3 = philox4x32_10(seed, (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32))
    cosine, sine = box_muller(tl.where(word < 2, x0, x2), tl.where(word < 2, x1, x3), NVIDIA)
    return tl.where(word % 2 == 0, cosine, sine)


# ---- exp, log, softplus


@triton.jit
def exp_half(lv):
    """sigma = exp(lv / 2), d = expm1(lv / 2), and what expm1_minus needs."""
    bound = tl.where(lv < -176.0, -176.0, lv)
    t = tl.fma(bound, 0.721347520, 12583039.0)
    t = tl.where(t < 12583166.0, t, 12583166.0)
    n = t - 12583039.0
    r = tl.fma(n, -1.38629436, bound)
    scale = (t.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    q2 = tl.fma(r, 2.172787572e-5, 2.613425895e-4)
    q2 = tl.fma(q2, r, 2.604172565e-3)
    q2 = tl.fma(q2, r, 2.083322406e-2)
    q2 = tl.fma(q2, r, 0.125) * (r * r)
    q = tl.fma(r, 0.5, q2)
    return tl.fma(q, scale, scale), tl.fma(q, scale, scale - 1.0), q2, n


@triton.jit
def expm1_minus(d, q2, n, lv):
    """expm1(lv) - lv, without the cancellation near 0."""
    return tl.fma(d, d, tl.where(n == 0.0, q2 + q2, tl.fma(d, 2.0, -lv)))


@triton.jit
def split(u, w):
    """u = 2^e (1 + h), 1 + h in [sqrt(1/2), sqrt(2)); with w = u - 1 given, h loses nothing to the rounding of u."""
    e = (u.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23
    scale = ((127 - e) << 23).to(tl.float32, bitcast=True)
    return e.to(tl.float32), tl.fma(w, scale, scale - 1.0), scale


@triton.jit
def series(h):
    """h - log1p(h) = h * h * series(h)."""
    s = tl.fma(h, 7.656288147e-2, -0.1275399923)
    s = tl.fma(s, h, 0.1315043867)
    s = tl.fma(s, h, -0.1420175880)
    s = tl.fma(s, h, 0.1662365347)
    s = tl.fma(s, h, -0.2000127435)
    s = tl.fma(s, h, 0.2500089109)
    s = tl.fma(s, h, -0.3333333135)
    return tl.fma(s, h, 0.4999999702)


@triton.jit
def log1p_split(e, h):
    return tl.fma(e, 0.693145752, tl.fma(e, 1.42860677e-6, tl.fma(-(h * h), series(h), h)))


@triton.jit
def log1p(w):
    """For w >= 0, finite."""
    e, h, _ = split(1.0 + w, w)
    return log1p_split(e, h)


@triton.jit
def log(u):
    tiny = u < 1.1754943508222875e-38
    v = tl.where(tiny, u * 16777216.0, u)
    e, _, scale = split(v, v - 1.0)
    found = log1p_split(e - tl.where(tiny, 24.0, 0.0), tl.fma(v, scale, -1.0))
    found = tl.where(u < float("inf"), found, u)
    return tl.where(u > 0.0, found, tl.where(u == 0.0, float("-inf"), float("nan")))


@triton.jit
def minus_log1p(f):
    """f - log1p(f), without the cancellation near 0."""
    e, h, _ = split(1.0 + f, f)
    return tl.fma(-e, 0.693145752, f - h) + tl.fma(-e, 1.42860677e-6, h * h * series(h))


@triton.jit
def log_ratio(a, b, q):
    """log q, q = a / b, also where q has too few digits left."""
    tiny = q < 7.888609052210118e-31
    far = tl.div_rn(a * 6.338253001141147e29, b * 4.440892098500626e-16)  # q * 2^150
    return log(tl.where(tiny, far, q)) - tl.where(tiny, 103.972077, 0.0)


LAST = tl.constexpr(87.336)  # where exp(-|x|) would stop to be a normal number, softplus and its slope stay


@triton.jit
def softplus(x):
    """log(1 + exp(x)), and its slope."""
    size = tl.abs(x)
    t, _, _, _ = exp_half(-2.0 * tl.where(size > LAST, LAST, size))
    s = tl.div_rn(1.0, 1.0 + t)
    return tl.where(x < 0.0, 0.0, x) + log1p(t), tl.where(x < 0.0, t * s, s)


@triton.jit
def softplus_difference(x, sx, slope_x, hi, lo, sy, slope_y):
    """softplus(x) - softplus(y), y = hi + lo, without the cancellation where they are close."""
    v = (x - hi) - lo
    size = tl.abs(v)
    _, em1, _, _ = exp_half(2.0 * tl.where(size < 16.0, size, 16.0))
    near = log1p(tl.where(v < 0.0, slope_x, slope_y) * em1)
    close = (size < 16.0) & (sx < 2.5 * sy) & (sy < 2.5 * sx)
    return tl.where(close, tl.where(v < 0.0, -near, near), sx - sy)


# ---- one element of the latent layer: sigma, 2 kl, dsigma/dx, dkl/dx, dkl/dmu, dkl/dx_p


@triton.jit
def from_log(scale: tl.constexpr, mu, lv, mu_p, lvp, PRIOR: tl.constexpr):
    sigma, d, q2, n = exp_half(lv)
    if PRIOR:
        gap = lv - lvp
        back = gap - lv
        rest = (lv - (gap - back)) - (lvp + back)
        ratio, d, q2, n = exp_half(gap)
        em1 = tl.fma(d, ratio, d)
        k = expm1_minus(d, q2, n, gap)
        finite = tl.abs(gap) < 88.72  # beyond, em1 is infinite or -1, and rest may be NaN
        k = tl.where(finite, tl.fma(em1, rest, k), k)
        em1 = tl.where(finite, tl.fma(em1, rest, em1 + rest), em1)
        quarter = -0.5 * lvp
        quarter = tl.where(quarter < -170.0, -170.0, tl.where(quarter > 175.0, 175.0, quarter))
        root, _, _, _ = exp_half(quarter)  # root^2 is 1 / sigma_p, which as a number may be 0 or infinite
        delta = (mu - mu_p) * root * root
        dkl_mu = delta * root * root
    else:
        em1 = tl.fma(d, sigma, d)
        k = expm1_minus(d, q2, n, lv)
        delta = mu
        dkl_mu = mu
    kl2 = tl.fma(delta, delta, k)
    return sigma, kl2, scale * sigma, scale * em1, dkl_mu, scale * tl.fma(-delta, delta, -em1)


@triton.jit
def from_std(mu, sigma, slope, mu_p, sigma_p, slope_p, f, q, log_q, PRIOR: tl.constexpr):
    """q = sigma / sigma_p, f = q - 1; a slope is divided by its sigma last, where both are tiny."""
    g = minus_log1p(f)
    above = tl.fma(f, f, g + g)
    below = tl.fma(log_q, -2.0, tl.fma(q, q, -1.0))
    k = tl.where(f < -0.6, below, tl.where(f < 4.611686018427388e18, above, f * f))
    delta, dkl_mu, dkl_xp = mu, mu, mu
    if PRIOR:
        delta = tl.div_rn(mu - mu_p, sigma_p)
        dkl_mu = tl.div_rn(delta, sigma_p)
        dkl_xp = tl.fma(-delta, tl.div_rn(slope_p * delta, sigma_p), -(tl.div_rn(slope_p * f, sigma_p) * (f + 2.0)))
    return sigma, tl.fma(delta, delta, k), slope, tl.div_rn(slope * f, sigma) * (f + 2.0), dkl_mu, dkl_xp


@triton.jit
def from_plain_std(mu, x, mu_p, x_p, PRIOR: tl.constexpr):
    one = tl.zeros_like(x) + 1.0
    if PRIOR:
        q = tl.div_rn(x, x_p)
        return from_std(mu, x, one, mu_p, x_p, one, tl.div_rn(x - x_p, x_p), q, log_ratio(x, x_p, q), True)
    else:
        return from_std(mu, x, one, mu, one, one, x - 1.0, x, log(x), False)


@triton.jit
def from_softplus(mu, x, mu_p, x_p, min_std: tl.constexpr, unit_hi, unit_lo, unit_slope, PRIOR: tl.constexpr):
    s, slope = softplus(x)
    sigma = s + min_std
    if PRIOR:
        p, slope_p = softplus(x_p)
        sigma_p = p + min_std
        f = tl.div_rn(softplus_difference(x, s, slope, x_p, 0.0, p, slope_p), sigma_p)
        q = tl.div_rn(sigma, sigma_p)
        log_q = log_ratio(sigma, sigma_p, q)
    else:
        slope_p, sigma_p = slope, sigma
        f = softplus_difference(x, s, slope, unit_hi, unit_lo, 1.0 - min_std, unit_slope)
        q = sigma
        log_q = log(sigma)
    if min_std == 0.0:
        log_q += tl.where(x < -LAST, x + LAST, 0.0)  # log sigma goes on where sigma stays
        if PRIOR:
            v = x - x_p
            exps = tl.maximum(x, x_p) < -17.0  # there softplus is exp
            _, em1, _, _ = exp_half(2.0 * v)
            f = tl.where(exps, em1, f)
            q = tl.where(exps, f + 1.0, q)
            log_q = tl.where(exps, v, log_q)
    return from_std(mu, sigma, slope, mu_p, sigma_p, slope_p, f, q, log_q, PRIOR)


@triton.jit
def expm1_minus_wide(d):
    """expm1(d) - d in float64, where no expm1 is at hand: the Taylor series near 0."""
    s = d * (1.0 / 17) + 1.0
    for i in tl.static_range(13):
        s = s * d / (16 - i) + 1.0
    return tl.where(tl.abs(d) < 0.5, s * d * d * (1.0 / 6) * d + 0.5 * d * d, (tl.exp(d) - 1.0) - d)


@triton.jit
def expm1_wide(d, k):
    """expm1(d), k being expm1(d) - d."""
    return tl.where(tl.abs(d) < 0.5, k + d, tl.exp(d) - 1.0)


@triton.jit
def minus_log1p_wide(f):
    """f - log1p(f) in float64: with s = f / (2 + f), log1p(f) = 2 (s + s^3 / 3 + s^5 / 5 + ...)."""
    s = f / (2.0 + f)
    w = s * s
    t = tl.zeros_like(w) + 1.0 / 25
    for i in tl.static_range(11):
        t = t * w + 1.0 / (23 - 2 * i)
    return tl.where(tl.abs(f) < 0.3, f * s - 2.0 * s * w * t, f - tl.log(1.0 + f))


@triton.jit
def from_log_wide(dl: tl.constexpr, mu, x, mu_p, x_p, PRIOR: tl.constexpr):
    d = 2.0 * dl * (x - x_p if PRIOR else x)
    k = expm1_minus_wide(d)
    em1 = expm1_wide(d, k)
    delta, dkl_mu = mu, mu
    if PRIOR:
        half = -0.5 * dl * x_p
        root = tl.exp(tl.where(half < -700.0, -700.0, tl.where(half > 700.0, 700.0, half)))
        delta = (mu - mu_p) * root * root
        dkl_mu = delta * root * root
    sigma = tl.exp(dl * x)
    return sigma, delta * delta + k, dl * sigma, dl * em1, dkl_mu, -dl * (em1 + delta * delta)


@triton.jit
def log_ratio_wide(a, b, q):
    tiny = q < 1.1830521861667747e-271
    return tl.log(tl.where(tiny, a, q)) - tl.log(tl.where(tiny, b, 1.0))


LAST_WIDE = tl.constexpr(708.0)


@triton.jit
def softplus_wide(x):
    size = tl.abs(x)
    t = tl.exp(-tl.where(size > LAST_WIDE, LAST_WIDE, size))
    return tl.where(x < 0.0, 0.0, x) + (t - minus_log1p_wide(t)), tl.where(x < 0.0, t, 1.0) / (1.0 + t)


@triton.jit
def from_std_wide(mu, x, mu_p, x_p, min_std: tl.constexpr, SOFT: tl.constexpr, PRIOR: tl.constexpr):
    one = tl.zeros_like(x) + 1.0
    sigma, slope, sigma_p, slope_p = x, one, x_p if PRIOR else one, one
    if SOFT:
        s, slope = softplus_wide(x)
        sigma = s + min_std
        if PRIOR:
            p, slope_p = softplus_wide(x_p)
            sigma_p = p + min_std
    f = (sigma - sigma_p) / sigma_p
    q = sigma / sigma_p
    log_q = log_ratio_wide(sigma, sigma_p, q)
    if SOFT and min_std == 0.0:
        log_q += tl.where(x < -LAST_WIDE, x + LAST_WIDE, 0.0)
        if PRIOR:
            v = x - x_p
            exps = tl.maximum(x, x_p) < -37.0
            f = tl.where(exps, expm1_wide(v, expm1_minus_wide(v)), f)
            q = tl.where(exps, f + 1.0, q)
            log_q = tl.where(exps, v, log_q)
    above = f * f + 2.0 * minus_log1p_wide(f)
    k = tl.where(f < -0.6, q * q - 1.0 - 2.0 * log_q, tl.where(f < 3.273390607896142e150, above, f * f))
    delta = (mu - mu_p) / sigma_p if PRIOR else mu
    dkl_xp = -(delta * (slope_p * delta / sigma_p) + slope_p * f / sigma_p * (f + 2.0))
    return sigma, delta * delta + k, slope, slope * f / sigma * (f + 2.0), delta / sigma_p, dkl_xp


@triton.jit
def element(
    mu,
    x,
    mu_p,
    x_p,
    min_std: tl.constexpr,
    unit_hi,
    unit_lo,
    unit_slope,
    PARAM: tl.constexpr,
    PRIOR: tl.constexpr,
    WIDE: tl.constexpr,
):
    if PARAM == STD or PARAM == SOFTPLUS:
        if WIDE:
            return from_std_wide(mu, x, mu_p, x_p, min_std, PARAM == SOFTPLUS, PRIOR)
        elif PARAM == STD:
            return from_plain_std(mu, x, mu_p, x_p, PRIOR)
        else:
            return from_softplus(mu, x, mu_p, x_p, min_std, unit_hi, unit_lo, unit_slope, PRIOR)
    elif WIDE:
        return from_log_wide(0.5 if PARAM == LOGVAR else 1.0, mu, x, mu_p, x_p, PRIOR)
    elif PARAM == LOGVAR:
        return from_log(0.5, mu, x, mu_p, x_p, PRIOR)
    else:
        return from_log(1.0, mu, x + x, mu_p, x_p + x_p, PRIOR)


# ---- tiles


@triton.jit
def tile(rows, chunks, ROWS: tl.constexpr, BLOCK: tl.constexpr, GRID: tl.constexpr):
    """A program's first row, its chunk of the columns, and the chunk's first column: 64 bits, once a program."""
    pid = tl.program_id(0)
    if GRID == BY_ROWS:
        block, chunk = pid, 0 * pid
    elif GRID == BY_CHUNKS:
        block, chunk = 0 * pid, pid
    elif GRID == BY_BOTH:
        block, chunk = pid // chunks, pid % chunks
    else:
        pid = pid.to(tl.int64) + tl.program_id(1).to(tl.int64) * tl.num_programs(0)
        pid = tl.minimum(pid, (rows + ROWS - 1).to(tl.int64) // ROWS * chunks - 1)  # a folded grid has a few too many
        block, chunk = pid // chunks, pid % chunks
    return block.to(tl.int64) * ROWS, chunk.to(tl.int64), chunk.to(tl.int64) * BLOCK


@triton.jit
def in_tile(ROWS: tl.constexpr, SHORT: tl.constexpr):
    r = tl.arange(0, ROWS)[:, None]
    return r if SHORT else r.to(tl.int64)


@triton.jit
def divided(row, size, SHORT: tl.constexpr):
    """row // size and row % size, in 32 bits where they do: 64-bit division is a subroutine."""
    if SHORT:
        row = row.to(tl.int32)
    return (row // size).to(tl.int64), (row % size).to(tl.int64)


@triton.jit
def seed_of(row, per_seed, SEEDS: tl.constexpr, SHORT: tl.constexpr):
    """Which seed a row has, and its number among the rows of that seed."""
    if SEEDS:
        return divided(row, per_seed, SHORT)
    else:
        return 0, row


@triton.jit
def lead_of(row, cols, per_seed, SEEDS: tl.constexpr, SHORT: tl.constexpr):
    """How far into a group of four the noise of a row starts."""
    _, row = seed_of(row, per_seed, SEEDS, SHORT)
    return (row * cols % 4).to(tl.int32)


@triton.jit
def lanes(
    row0,
    r,
    first,
    lead,
    rows,
    cols,
    total,
    NOISE: tl.constexpr,
    INNER: tl.constexpr,
    SHORT: tl.constexpr,
    WHOLE: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each lane's column, counted from the chunk's first, and the masks of lanes and rows that hold elements."""
    p = tl.arange(0, BLOCK)[None, :] - lead
    if WHOLE:
        mask = tl.full([ROWS, BLOCK], True, tl.int1)  # the compiler drops it
        row_mask = tl.full([ROWS, 1], True, tl.int1)
    else:
        left = tl.minimum(cols - first, BLOCK)
        if INNER:
            left = tl.minimum(left, total - row0 * cols)
        row_mask = r < tl.minimum(rows - row0, BLOCK * 4096).to(tl.int32)
        mask = (p < tl.multiple_of(left.to(tl.int32), VEC)) & row_mask
        if NOISE == LED:
            mask &= p + tl.minimum(first, BLOCK).to(tl.int32) >= 0
    if not SHORT:
        p = p.to(tl.int64)
    return p, mask, row_mask


@triton.jit
def spot(
    ptr,
    row0,
    r,
    first,
    p,
    outer,
    step,
    col,
    nest,
    NEST: tl.constexpr,
    INNER: tl.constexpr,
    SHORT: tl.constexpr,
    VEC: tl.constexpr,
):
    """Pointers to an operand's lanes: a 64-bit base, and offsets of 32 bits inside the tile where they do."""
    if NEST:
        a, b = divided(row0 + r, nest, SHORT)
        return ptr + tl.multiple_of(a * outer + b * step + first * col, [VEC, VEC]) + p * col
    else:
        at = tl.multiple_of(r * step, [VEC, VEC]) + p * col
        if INNER:  # a row of several runs of INNER columns, `outer` apart
            at += p // INNER * tl.multiple_of(outer - INNER * col, VEC)
        SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        base = ptr + tl.multiple_of(row0 * step + first * col, VEC)
        return tl.multiple_of(base, min(VEC * SIZE, 16)) + at


@triton.jit
def read(ptr, mask, WIDE: tl.constexpr):
    """Lanes in the arithmetic's dtype; those without an element hold anything."""
    value = tl.load(ptr, mask=mask)
    return value.to(tl.float64) if WIDE else value.to(tl.float32)


@triton.jit
def write(ptr, value, mask):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def noise(
    seed_ptr,
    eps_ptr,
    row0,
    r,
    first,
    p,
    lead,
    sample,
    cols,
    total,
    per_seed,
    mask,
    row_mask,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    NEAR: tl.constexpr,
    NVIDIA: tl.constexpr,
    SHORT: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """eps of one sample, a 64-bit number: the user's, or made here."""
    if NOISE == GIVEN:
        at = spot(eps_ptr + tl.multiple_of(sample * total, VEC), row0, r, first, p, 0, cols, 1, 1, False, 0, SHORT, VEC)
        return read(at, mask, WIDE)
    else:
        item, row = seed_of(row0 if ROWS == 1 else row0 + r, per_seed, SEEDS, SHORT)
        seed = tl.load(seed_ptr + item, mask=row_mask) if SEEDS and ROWS > 1 else tl.load(seed_ptr + item)
        start = sample * (per_seed * cols if SEEDS else total) + row * cols + first
        if NOISE == LANEWISE:
            eps = normal_at(seed, start + p, NVIDIA)
        else:
            eps = normals(seed, (start - lead) >> 2, ROWS, BLOCK, NEAR, NVIDIA)
        return eps.to(tl.float64) if WIDE else eps


@triton.jit
def inner_sums(k, INNER: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the PER runs of INNER lanes that a tile of one row starts with, padded to a power of two."""
    UNIT: tl.constexpr = 4 if INNER % 4 == 0 else 2 if INNER % 2 == 0 else 1
    N: tl.constexpr = INNER // UNIT
    WIDTH: tl.constexpr = triton.next_power_of_2(N)
    COUNT: tl.constexpr = triton.next_power_of_2(PER)
    units = tl.sum(tl.reshape(k, [BLOCK // UNIT, UNIT]), axis=1)
    if N == WIDTH:
        return tl.sum(tl.reshape(units, [BLOCK // INNER, N]), axis=1)
    else:
        i = tl.arange(0, COUNT * WIDTH)
        run, of = i // WIDTH, i % WIDTH
        found = tl.gather(units, tl.minimum(run * N + of, BLOCK // UNIT - 1), 0)
        return tl.sum(tl.reshape(tl.where(of < N, found, 0.0), [COUNT, WIDTH]), axis=1)


@triton.jit
def spread(ptr, size, INNER: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """The value of each run of INNER lanes, in all of its lanes."""
    UNIT: tl.constexpr = VEC if INNER % VEC == 0 else 1
    first = tl.arange(0, BLOCK // UNIT) * UNIT
    value = tl.load(ptr + first // INNER, mask=first < size)
    return tl.reshape(tl.broadcast_to(value[:, None], [BLOCK // UNIT, UNIT]), [1, BLOCK])


@triton.jit
def inside(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    return (x >= tl.full((), LOW, x.dtype)) & (x <= tl.full((), HIGH, x.dtype))


@triton.jit
def clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    low, high = tl.full((), LOW, x.dtype), tl.full((), HIGH, x.dtype)
    return tl.where(x < low, low, tl.where(x > high, high, x))


# ---- kernels. A pointer that is None: absent, or not wanted.


@triton.jit
def words_kernel(out_ptr, at_ptr, count, BLOCK: tl.constexpr):
    """The words of `count` counters [count, 4], from (seed, first counter): for the self-test."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = (tl.load(at_ptr + 1) + i).to(tl.uint64)
    low, high = (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32)
    x0, x1, x2, x3 = philox4x32_10(tl.load(at_ptr), low, high)
    tl.store(out_ptr + 4 * i, x0.to(tl.int64), mask=i < count)
    tl.store(out_ptr + 4 * i + 1, x1.to(tl.int64), mask=i < count)
    tl.store(out_ptr + 4 * i + 2, x2.to(tl.int64), mask=i < count)
    tl.store(out_ptr + 4 * i + 3, x3.to(tl.int64), mask=i < count)


@triton.jit
def roots_kernel(out_ptr, x_ptr, count, NVIDIA: tl.constexpr, BLOCK: tl.constexpr):
    """The square roots of x [count], as the noise takes them: for the self-test."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=1.0)
    tl.store(out_ptr + i, root(x, NVIDIA), mask=i < count)


@triton.jit(do_not_specialize=["rows", "total"])
def randn_kernel(
    out_ptr,
    seed_ptr,
    rows,
    cols,
    chunks,
    total,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    NEAR: tl.constexpr,
    NVIDIA: tl.constexpr,
    SHORT: tl.constexpr,
    WHOLE: tl.constexpr,
    VEC: tl.constexpr,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row0, _, first = tile(rows, chunks, ROWS, BLOCK, GRID)
    r = in_tile(ROWS, SHORT)
    p, mask, row_mask = lanes(row0, r, first, 0, rows, cols, total, NOISE, 0, SHORT, WHOLE, VEC, ROWS, BLOCK)
    eps = noise(
        seed_ptr, None, row0, r, first, p, 0, first * 0, cols, total, 1, mask, row_mask,
        NOISE, SEEDS, NEAR, NVIDIA, SHORT, VEC, ROWS, BLOCK, False,
    )  # fmt: skip
    write(spot(out_ptr, row0, r, first, p, 0, cols, 1, 1, False, 0, SHORT, VEC), eps, mask)


@triton.jit(do_not_specialize=["rows", "total"])
def forward_kernel(
    mu_ptr,
    x_ptr,
    mu_p_ptr,
    x_p_ptr,  # inputs, each with its outer, step and col strides below
    seed_ptr,
    eps_ptr,  # int64 [rows / per_seed], or the user's noise [samples, rows, cols]
    z_ptr,  # [samples, rows, cols]
    kl_ptr,  # elementwise [rows, cols], else a sum for each row and chunk [rows, chunks]; INNER: for each run of a row
    rows,
    cols,
    chunks,
    total,
    samples,
    per_seed,
    nest,
    mu_outer,
    mu_step,
    mu_col,
    x_outer,
    x_step,
    x_col,
    mu_p_outer,
    mu_p_step,
    mu_p_col,
    x_p_outer,
    x_p_step,
    x_p_col,
    PARAM: tl.constexpr,
    MIN_STD: tl.constexpr,
    UNIT_HI: tl.constexpr,
    UNIT_LO: tl.constexpr,
    UNIT_SLOPE: tl.constexpr,
    CLAMP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NUMBERS: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    WIDE: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    NEAR: tl.constexpr,
    NVIDIA: tl.constexpr,
    NEST: tl.constexpr,
    INNER: tl.constexpr,
    PER: tl.constexpr,
    SKIP: tl.constexpr,
    SHORT: tl.constexpr,
    WHOLE: tl.constexpr,
    VEC: tl.constexpr,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PRIOR: tl.constexpr = mu_p_ptr is not None
    row0, chunk, first = tile(rows, chunks, ROWS, BLOCK, GRID)
    r = in_tile(ROWS, SHORT)
    lead = 0
    if NOISE == LED:
        lead = lead_of(row0 + r, cols, per_seed, SEEDS, SHORT)
    p, mask, row_mask = lanes(row0, r, first, lead, rows, cols, total, NOISE, INNER, SHORT, WHOLE, VEC, ROWS, BLOCK)
    mu_at = spot(mu_ptr, row0, r, first, p, mu_outer, mu_step, mu_col, nest, NEST, SKIP, SHORT, VEC)
    x_at = spot(x_ptr, row0, r, first, p, x_outer, x_step, x_col, nest, NEST, SKIP, SHORT, VEC)
    mu = read(mu_at, mask, WIDE)
    x = read(x_at, mask, WIDE)
    if CLAMP:
        x = clamp(x, LOW, HIGH)
    mu_p = mu
    x_p = x
    if PRIOR and NUMBERS:
        mu_p = read(mu_p_ptr, None, WIDE)
        x_p = read(x_p_ptr, None, WIDE)
    elif PRIOR:
        mu_p_at = spot(mu_p_ptr, row0, r, first, p, mu_p_outer, mu_p_step, mu_p_col, nest, NEST, SKIP, SHORT, VEC)
        x_p_at = spot(x_p_ptr, row0, r, first, p, x_p_outer, x_p_step, x_p_col, nest, NEST, SKIP, SHORT, VEC)
        mu_p = read(mu_p_at, mask, WIDE)
        x_p = read(x_p_at, mask, WIDE)
    sigma, kl2, _, _, _, _ = element(mu, x, mu_p, x_p, MIN_STD, UNIT_HI, UNIT_LO, UNIT_SLOPE, PARAM, PRIOR, WIDE)
    if kl_ptr is not None:
        if ELEMENTWISE:
            write(spot(kl_ptr, row0, r, first, p, 0, cols, 1, 1, False, 0, SHORT, VEC), 0.5 * kl2, mask)
        elif INNER:
            sums = 0.5 * inner_sums(kl2, INNER, PER, BLOCK)
            run = tl.arange(0, sums.shape[0])
            runs = tl.minimum(cols, total - row0 * cols).to(tl.int32) // INNER
            tl.store(kl_ptr + row0 * PER + run, sums, mask=run < runs)
        else:
            if not WHOLE:
                kl2 = tl.where(mask, kl2, 0.0)
            tl.store(kl_ptr + (row0 + r) * chunks + chunk, 0.5 * tl.sum(kl2, axis=1)[:, None], mask=row_mask)
    if z_ptr is not None:
        for i in range(samples):
            sample = first * 0 + i
            eps = noise(
                seed_ptr, eps_ptr, row0, r, first, p, lead, sample, cols, total, per_seed, mask, row_mask,
                NOISE, SEEDS, NEAR, NVIDIA, SHORT, VEC, ROWS, BLOCK, WIDE,
            )  # fmt: skip
            z = sigma * eps + mu if WIDE else tl.fma(sigma, eps, mu)
            z_at = spot(
                z_ptr + tl.multiple_of(sample * total, VEC), row0, r, first, p, 0, cols, 1, 1, False, 0, SHORT, VEC
            )
            write(z_at, z, mask)


@triton.jit(do_not_specialize=["rows", "total"])
def backward_kernel(
    mu_ptr,
    x_ptr,
    mu_p_ptr,
    x_p_ptr,
    seed_ptr,
    eps_ptr,  # as in forward
    dz_ptr,  # [samples, rows, cols] by strides
    dkl_ptr,  # elementwise [rows, cols], else one for each per_kl rows; INNER: for each run of a row
    dmu_ptr,
    dx_ptr,  # by out_outer, out_step
    dmu_p_ptr,
    dx_p_ptr,  # [rows, cols]
    rows,
    cols,
    chunks,
    total,
    samples,
    per_seed,
    per_kl,
    nest,
    mu_outer,
    mu_step,
    mu_col,
    x_outer,
    x_step,
    x_col,
    mu_p_outer,
    mu_p_step,
    mu_p_col,
    x_p_outer,
    x_p_step,
    x_p_col,
    dz_sample,
    dz_outer,
    dz_step,
    dz_col,
    out_outer,
    out_step,
    PARAM: tl.constexpr,
    MIN_STD: tl.constexpr,
    UNIT_HI: tl.constexpr,
    UNIT_LO: tl.constexpr,
    UNIT_SLOPE: tl.constexpr,
    CLAMP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NUMBERS: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    WIDE: tl.constexpr,
    NOISE: tl.constexpr,
    SEEDS: tl.constexpr,
    NEAR: tl.constexpr,
    NVIDIA: tl.constexpr,
    NEST: tl.constexpr,
    INNER: tl.constexpr,
    PER: tl.constexpr,
    SKIP: tl.constexpr,
    SHORT: tl.constexpr,
    WHOLE: tl.constexpr,
    VEC: tl.constexpr,
    GRID: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PRIOR: tl.constexpr = mu_p_ptr is not None
    row0, _, first = tile(rows, chunks, ROWS, BLOCK, GRID)
    r = in_tile(ROWS, SHORT)
    lead = 0
    if NOISE == LED:
        lead = lead_of(row0 + r, cols, per_seed, SEEDS, SHORT)
    p, mask, row_mask = lanes(row0, r, first, lead, rows, cols, total, NOISE, INNER, SHORT, WHOLE, VEC, ROWS, BLOCK)
    mu_at = spot(mu_ptr, row0, r, first, p, mu_outer, mu_step, mu_col, nest, NEST, SKIP, SHORT, VEC)
    x_at = spot(x_ptr, row0, r, first, p, x_outer, x_step, x_col, nest, NEST, SKIP, SHORT, VEC)
    mu = read(mu_at, mask, WIDE)
    raw = read(x_at, mask, WIDE)
    x = raw
    if CLAMP:
        x = clamp(raw, LOW, HIGH)
    mu_p = mu
    x_p = x
    if PRIOR and NUMBERS:
        mu_p = read(mu_p_ptr, None, WIDE)
        x_p = read(x_p_ptr, None, WIDE)
    elif PRIOR:
        mu_p_at = spot(mu_p_ptr, row0, r, first, p, mu_p_outer, mu_p_step, mu_p_col, nest, NEST, SKIP, SHORT, VEC)
        x_p_at = spot(x_p_ptr, row0, r, first, p, x_p_outer, x_p_step, x_p_col, nest, NEST, SKIP, SHORT, VEC)
        mu_p = read(mu_p_at, mask, WIDE)
        x_p = read(x_p_at, mask, WIDE)
    _, _, dsigma_x, dkl_x, dkl_mu, dkl_xp = element(
        mu, x, mu_p, x_p, MIN_STD, UNIT_HI, UNIT_LO, UNIT_SLOPE, PARAM, PRIOR, WIDE
    )
    dmu = tl.full(mu.shape, -0.0, mu.dtype)  # dz, then dz * eps, summed over the samples; -0 adds nothing to the bits
    dsigma = dmu
    if dz_ptr is not None:
        for i in range(samples):
            sample = first * 0 + i
            dz_at = spot(
                dz_ptr + tl.multiple_of(sample * dz_sample, VEC), row0, r, first, p, dz_outer, dz_step, dz_col, nest,
                NEST, SKIP, SHORT, VEC,
            )  # fmt: skip
            dz = read(dz_at, mask, WIDE)
            eps = noise(
                seed_ptr, eps_ptr, row0, r, first, p, lead, sample, cols, total, per_seed, mask, row_mask,
                NOISE, SEEDS, NEAR, NVIDIA, SHORT, VEC, ROWS, BLOCK, WIDE,
            )  # fmt: skip
            dmu += dz
            dsigma = dz * eps + dsigma if WIDE else tl.fma(dz, eps, dsigma)
    dx = dsigma * dsigma_x
    if dkl_ptr is not None:
        if ELEMENTWISE:
            dkl = read(spot(dkl_ptr, row0, r, first, p, 0, cols, 1, 1, False, 0, SHORT, VEC), mask, WIDE)
        elif INNER:
            dkl = spread(dkl_ptr + row0 * PER, tl.minimum(cols, total - row0 * cols).to(tl.int32), INNER, VEC, BLOCK)
        else:
            of, _ = divided(row0 + r, per_kl, SHORT)
            dkl = tl.load(dkl_ptr + of, mask=row_mask)
        if dmu_p_ptr is not None:
            at = spot(dmu_p_ptr, row0, r, first, p, 0, cols, 1, 1, False, 0, SHORT, VEC)
            write(at, -(dkl * dkl_mu), mask)
        if dx_p_ptr is not None:
            at = spot(dx_p_ptr, row0, r, first, p, 0, cols, 1, 1, False, 0, SHORT, VEC)
            write(at, dkl * dkl_xp, mask)
        if WIDE:
            dmu += dkl * dkl_mu
            dx = dx + dkl * dkl_x if dz_ptr is not None else dkl * dkl_x
        else:
            dmu = tl.fma(tl.broadcast_to(dkl, mu.shape), dkl_mu, dmu)
            dx = tl.fma(dsigma, dsigma_x, dkl * dkl_x) if dz_ptr is not None else dkl * dkl_x
    if CLAMP:
        dx = tl.where(inside(raw, LOW, HIGH), dx, 0.0)
    if dmu_ptr is not None:
        write(spot(dmu_ptr, row0, r, first, p, out_outer, out_step, 1, nest, NEST, SKIP, SHORT, VEC), dmu, mask)
    if dx_ptr is not None:
        write(spot(dx_ptr, row0, r, first, p, out_outer, out_step, 1, nest, NEST, SKIP, SHORT, VEC), dx, mask)


@triton.jit
def row_sum_kernel(part_ptr, kl_ptr, parts, BLOCK: tl.constexpr):
    """kl of one row from its parts, in an order that their number alone fixes."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, parts, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(part_ptr + row * parts + at, mask=at < parts, other=0.0).to(tl.float64)
    tl.store(kl_ptr + row, tl.sum(total).to(kl_ptr.dtype.element_ty))
