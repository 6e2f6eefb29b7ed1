"""The normals, by the thousand million, through rk.randn: cells, moments, tails, correlations."""

import math

import numpy as np
import torch
from scipy import stats
from scipy.special import ndtr

import reparam_kernels as rk
from reparam_kernels import _C

from .results import Result, anderson_darling, chi_square, normal, two_sided
from .words import BASE

SIDE = 256
ITEM = SIDE * SIDE  # elements of a seed
MOMENTS = {0: 1, 2: 1, 4: 3, 6: 15, 8: 105, 10: 945, 12: 10395, 14: 135135, 16: 2027025}
GROUP = 16  # elements whose pairs are all taken: four counters
BOUNDS = (4.0, 4.5, 5.0, 5.5, 6.0, 6.5)  # each the edge of a cell


def stream(bits, scale=1.0):
    """Seeds 0, 1, 2, ..., 2^16 elements of each, as a 256 x 256 matrix. A control scales them."""
    for seed in range(2**bits // ITEM):
        eps = rk.randn(SIDE, SIDE, seed=seed)
        yield eps if scale == 1 else eps * scale


def repeated(bits):
    """A control, which must fail: the seed is added to the index, so that neighbouring seeds share their noise."""
    whole = rk.randn(2**bits + ITEM, seed=0)
    for seed in range(2**bits // ITEM):
        yield whole[seed : seed + ITEM].clone().view(SIDE, SIDE)


def cell_edges():
    """Of the cells that share the upper 16 bits of a float32: sign, exponent and 7 bits, in rising order."""
    positive = (np.arange(0x7F81, dtype=np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return np.concatenate([-positive[:0:-1], positive])


def accumulate(items):
    counts = torch.zeros(65536, dtype=torch.int64)
    powers, rows, grams = np.zeros(9), np.zeros(2), torch.zeros(2, GROUP, GROUP, dtype=torch.float64)
    seeds, transposed, previous, n = 0.0, 0.0, None, 0
    buffers = torch.empty(4, ITEM)  # few and small, to stay in the cache
    for x in items:
        f = x.view(-1)
        counts += torch.bincount((f.view(torch.int32) >> 16) + 32768, minlength=65536)
        x2, x3, x4, s = buffers
        torch.mul(f, f, out=x2)
        torch.mul(x2, f, out=x3)
        torch.mul(x2, x2, out=x4)
        torch.sub(x2, 1, out=s)
        dots = ((f, f), (f, x2), (x2, x2), (x2, x3), (x3, x3), (x3, x4), (x4, x4))
        powers += [1, f.sum().item(), *(torch.dot(a, b).item() for a, b in dots)]
        for i, v in enumerate((f, s)):
            grams[i] += v.view(-1, GROUP).T @ v.view(-1, GROUP)
            rows[i] += torch.dot(v[:-SIDE], v[SIDE:]).item()
        transposed += (torch.sum(x * x.T) - x.diagonal().square().sum()).item()
        if previous is not None:
            seeds += torch.dot(previous, f).item()
        previous, n = f, n + 1
    return counts.numpy(), powers, grams.numpy(), rows, seeds, transposed, n


def big(group, items):
    counts, powers, grams, rows, seeds, transposed, items = accumulate(items)
    n = items * ITEM
    # negative floats come first, by rising magnitude; beyond infinity there is nothing
    ordered = np.concatenate([counts[:0x7F80][::-1], counts[32768 : 32768 + 0x7F80]])
    assert ordered.sum() == n
    edges = cell_edges()
    below, above = stats.norm.cdf(edges), stats.norm.sf(edges)
    chance = np.where(edges[:-1] < 0, np.diff(below), -np.diff(above))

    label = np.clip(np.floor(np.cumsum(chance) * 256), 0, 255).astype(int)  # equal, as near as the cells allow
    merged, expected = np.bincount(label, ordered), np.bincount(label, chance) * n
    value, df, p = chi_square(merged[expected > 0], expected[expected > 0])
    yield Result(group, "chi-square, cells of about equal chance", n, p, f"{value:.0f} / {df}")

    keep = chance * n >= 50
    out = ~keep  # the rest of both tails and the middle, as one cell
    value, df, p = chi_square(
        np.append(ordered[keep], ordered[out].sum()), np.append(chance[keep], chance[out].sum()) * n
    )
    yield Result(group, "chi-square, every cell that expects 50", n, p, f"{value:.0f} / {df}")

    empirical = np.cumsum(ordered)[:-1] / n
    below, above = below[1:-1], above[1:-1]
    d = np.abs(empirical - below).max() * math.sqrt(n)
    yield Result(group, "Kolmogorov-Smirnov at the cells' edges", n, float(stats.kstwobign.sf(d)), f"{d:.3f}")
    inside = (below > 0) & (above > 0)
    g = n * (empirical - below)[inside] ** 2 / (below * above)[inside]
    a2 = float(((g[1:] + g[:-1]) / 2 * np.diff(below[inside])).sum())
    yield Result(group, "Anderson-Darling at the cells' edges", n, anderson_darling(a2), f"{a2:.3f}")

    for k in range(1, 9):
        mean = MOMENTS.get(k, 0)
        z = (powers[k] / n - mean) / math.sqrt((MOMENTS[2 * k] - mean**2) / n)
        yield Result(group, f"moment {k}", n, normal(z), f"{powers[k] / n:+.6f} for {mean}: {z:+.2f} sigma")
    for bound in BOUNDS:
        for side, seen in (
            ("above", ordered[edges[:-1] >= bound].sum()),
            ("below", ordered[edges[1:] <= -bound].sum()),
        ):
            mean = stats.norm.sf(bound) * n
            p = two_sided(stats.poisson.cdf(seen, mean), stats.poisson.sf(seen - 1, mean))
            yield Result(group, f"tail {side} {'-' * (side == 'below')}{bound}", n, p, f"{seen:.0f} for {mean:.2f}")
    for name, gram, row, deviation in zip(("elements", "squares"), grams, rows, (1, 2), strict=True):
        pairs = gram[np.triu_indices(GROUP, 1)] / deviation / math.sqrt(n / GROUP)
        value = float((pairs**2).sum())
        p = two_sided(stats.chi2.cdf(value, pairs.size), stats.chi2.sf(value, pairs.size))
        label = f"correlation, {name},"
        yield Result(group, f"{label} all pairs of {GROUP} neighbours", n, p, f"{value:.1f} / {pairs.size}")
        for lag in (1, 2, 3, 4):
            z = np.trace(gram, lag) / deviation / math.sqrt(n / GROUP * (GROUP - lag))
            yield Result(group, f"{label} lag {lag}", n, normal(z), f"{z:+.2f} sigma")
        z = row / deviation / math.sqrt(items * (ITEM - SIDE))
        yield Result(group, f"{label} rows", n, normal(z), f"{z:+.2f} sigma")
    z = seeds / math.sqrt((items - 1) * ITEM)
    yield Result(group, "correlation, seeds s and s + 1", n, normal(z), f"{z:+.2f} sigma")
    z = transposed / 2 / math.sqrt(items * SIDE * (SIDE - 1) / 2)  # each pair comes twice
    yield Result(group, "correlation, with the transposed layout", n, normal(z), f"{z:+.2f} sigma")


def one_seed(bits):
    """Long streams of few seeds, by Phi in float64: cells of equal chance in one, two and three dimensions."""
    group, length = "normals: few seeds", min(bits, 24)
    grids = {
        ("single elements", 1, 12, 0): 0,
        ("pairs of one Box-Muller step", 2, 8, 0): 0,
        ("pairs across two steps", 2, 8, 1): 0,
        ("pairs across two counters", 2, 8, 3): 0,
        ("triples", 3, 5, 0): 0,
    }
    for k in range(2 ** (bits - length)):
        u = ndtr(rk.randn(2**length, seed=2**40 + k).double().numpy())
        for (name, d, b, skip), counts in grids.items():
            step = 4 if skip == 3 else d
            index = np.minimum((u[skip:] * 2**b).astype(np.int64), 2**b - 1)
            index = index[: len(index) // step * step].reshape(-1, step)
            cell = index[:, 0]
            for i in range(1, d):
                cell = cell << b | index[:, i]
            grids[name, d, b, skip] = counts + np.bincount(cell, minlength=2 ** (d * b))
    for (name, d, b, _), counts in grids.items():
        points = int(counts.sum())
        value, df, p = chi_square(counts, points / counts.size)
        yield Result(group, f"chi-square, {name}, {2**b}^{d} cells of equal chance", points, p, f"{value:.0f} / {df}")
    u = np.sort(u[: 2**22])
    n = len(u)
    d = stats.kstest(u, "uniform")
    yield Result(group, "Kolmogorov-Smirnov, each element", n, float(d.pvalue), f"{d.statistic * math.sqrt(n):.3f}")
    i = np.arange(1, n + 1)
    a2 = float(-n - ((2 * i - 1) * (np.log(u) + np.log1p(-u[::-1]))).mean())
    yield Result(group, "Anderson-Darling, each element", n, anderson_darling(a2), f"{a2:.3f}")


def many_seeds(n):
    """Every pair among 64 seeds that differ in a bit or two, and among seeds 0 to 63: 2016 correlations each."""
    families = {"seeds 0 to 63": range(64), "one bit": [BASE] + [BASE ^ (1 << k) for k in range(63)]}
    for family, seeds in families.items():
        eps = rk.randn(64, n, seed=torch.tensor(list(seeds)))
        for name, x, deviation in (("elements", eps, 1), ("squares", eps.square() - 1, 2)):
            z = (x @ x.T).double().numpy()[np.triu_indices(64, 1)] / deviation / math.sqrt(n)
            test = stats.kstest(z, "norm")
            label = f"all pairs, {family}, {name}"
            yield Result(
                "normals: between seeds", f"{label}: as normals", n, float(test.pvalue), f"D {test.statistic:.4f}"
            )
            worst = np.abs(z).max()
            p = -np.expm1(len(z) * np.log1p(-2 * stats.norm.sf(worst)))
            yield Result("normals: between seeds", f"{label}: the worst", n, float(p), f"{worst:.2f} sigma")


def tail_of_the_map():
    """No sample: P(|eps| > b) over all 2^64 pairs of words, from the kernels' own radii, against theory."""
    x = np.arange(2**21, dtype=np.uint32)  # every radius beyond 3.9
    pairs = np.frombuffer(_C.test_box_muller(x.tobytes(), np.zeros_like(x).tobytes()), dtype=np.float32).reshape(-1, 2)
    r = np.hypot(pairs[:, 0].astype(np.float64), pairs[:, 1])
    for bound in BOUNDS:
        chance = (2 / np.pi * np.arccos(bound / r[r > bound])).sum() / 2**32
        yield bound, chance, 2 * stats.norm.sf(bound)
    yield float(r.max()), 0.0, 2 * stats.norm.sf(r.max())
