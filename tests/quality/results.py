"""One test's outcome, and the p-values that scipy does not have."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass
class Result:
    group: str
    test: str
    n: int  # of what is tested: words, elements, samples
    p: float
    statistic: str = ""


def two_sided(low, high):
    """From the chances of as little and of as much: too good a fit fails, too."""
    return float(min(1.0, 2 * min(low, high)))


def chi_square(counts, expected):
    """Statistic, degrees of freedom and two-sided p."""
    value = float(((counts - expected) ** 2 / expected).sum())
    df = np.size(counts) - 1
    return value, df, two_sided(stats.chi2.cdf(value, df), stats.chi2.sf(value, df))


def normal(z):
    return float(2 * stats.norm.sf(abs(z)))


def anderson_darling(value):
    """P(A^2 > value) for many samples: A^2 is the sum of chi^2_1 / (j (j + 1)) (Anderson and Darling, 1952), its
    characteristic function inverted as Gil-Pelaez did."""
    step, terms = 0.02, 4000
    t = np.arange(0.5, 20000) * step
    log = sum(-0.5 * np.log1p(-2j * t / (j * (j + 1))) for j in range(1, 200))
    j = np.arange(200, terms)
    log = log + 1j * t * (1 / (j * (j + 1))).sum() - t * t * (1 / (j * (j + 1.0)) ** 2).sum() + 1j * t / terms
    p = 0.5 + (np.exp(log - 1j * t * value).imag / t).sum() * step / np.pi
    return float(np.clip(p, 0, 1))
