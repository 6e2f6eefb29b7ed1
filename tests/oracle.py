"""The noise in numpy, from its specification: Philox4x32-10, then Box-Muller in the op order that fixes the bits."""

import numpy as np

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
MASK, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter, key):
    """Return four arrays of words for a counter of four and a key of two arrays of 32-bit words in uint64."""
    c = [np.asarray(x, dtype=np.uint64) for x in counter]
    k = [np.asarray(x, dtype=np.uint64) for x in key]
    for _ in range(10):
        p0, p1 = c[0] * M0, c[2] * M1
        c = [(p1 >> HALF) ^ c[1] ^ k[0], p1 & MASK, (p0 >> HALF) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + np.uint64(0x9E3779B9)) & MASK, (k[1] + np.uint64(0xBB67AE85)) & MASK]
    return c


def words(seed, first, count):
    """Return the radius and angle words of the pairs of counters first, first + 1, ..., as uint32."""
    c = np.uint64(first) + np.arange(count, dtype=np.uint64)
    x = philox([c & MASK, c >> HALF, 0 * c, 0 * c], [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)])
    radius, angle = np.stack([x[0], x[2]], -1), np.stack([x[1], x[3]], -1)
    return radius.reshape(-1).astype(np.uint32), angle.reshape(-1).astype(np.uint32)


def fma(a, b, c):
    """Compute float32 a * b + c rounded once: exact product, sum rounded to odd in float64, then to float32."""
    a, b, c = (np.asarray(x, dtype=np.float64) for x in (a, b, c))
    with np.errstate(invalid="ignore", over="ignore"):
        p = a * b
        s = p + c
        t = s - p
        error = (p - (s - t)) + (c - t)
        away = np.where(error == 0, s, np.where((error > 0) == (s > 0), s, np.nextafter(s, 0)))
        bits = np.where(error == 0, away.view(np.int64), away.view(np.int64) | 1)
        return np.where(np.isfinite(error), bits.view(np.float64), s).astype(np.float32)


def horner(x, *coefficients):
    value = np.float32(coefficients[0])
    for c in coefficients[1:]:
        value = fma(value, x, np.float32(c))
    return value


def box_muller(x, y):
    """Turn uint32 words into pairs of float32 normals, in the op order that fixes the bits."""
    xi = x.view(np.int32)
    v = fma(xi.astype(np.float32), np.float32(2.0**-32), np.float32(2.0**-33))
    b = v.view(np.int32)
    m = (b & 0x7FFFFF) | 0x3F000000
    f = np.where(xi < 0, v, m.view(np.float32) - np.float32(1))
    e = np.where(xi < 0, 0, b - m).astype(np.float32)
    q = horner(f, 2.321223736, 2.072345257, 1.503254056, -0.1016341075, 0.5393293500, -0.6642580628, 1.000049233, -2.0)
    r = np.sqrt(fma(f, q, e * np.float32(-1.6525917e-7)))
    y2 = y << np.uint32(1)
    signed = (r.view(np.uint32) ^ ((y ^ y2) & np.uint32(0x80000000))).view(np.float32)
    t = fma(y2.view(np.int32).astype(np.float32), np.float32(2.0**-31), np.float32(2.0**-31))
    w = t * t
    sn = t * horner(w, 1.492839947e-4, -4.668947775e-3, 7.968617976e-2, -0.6459627748, 1.570796251)
    cs = horner(w, 8.594021783e-4, -2.081347443e-2, 0.2536529601, -1.233698845, 1.0)
    return signed * cs, signed * sn


def randn(seed, count, first=0):
    """Return eps[first : first + count] of a seed in float32."""
    start = first // 4
    radius, angle = words(seed, start, (first + count + 3) // 4 - start)
    eps = np.stack(box_muller(radius, angle), -1).reshape(-1)
    return eps[first - 4 * start :][:count]


def exact_pair(x, y):
    """Evaluate the noise formula in float64: the radius and the pair."""
    u = (x.astype(np.float64) + 0.5) / 2**32
    r = np.sqrt(-2 * np.where(u < 0.5, np.log(u), np.log1p(u - 1)))
    t = 2 * np.pi * (y.astype(np.float64) + 0.5) / 2**32
    return r, r * np.cos(t), r * np.sin(t)
