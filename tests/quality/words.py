"""The words: streams as users make them, through dieharder, a lattice check and an avalanche check."""

import subprocess

import numpy as np
import torch
from scipy import stats

import reparam_kernels as rk
from reparam_kernels import _C
from tests import oracle

from .results import Result, chi_square, two_sided

BLOCK = 2**14  # counters at a time
BASE = 0x2545F4914F6CDD1D  # the seed whose bits are flipped, one at a time

# The vectors that come with Random123: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def check_the_source():
    """The words tested here are made in numpy: they must be the published ones, and the kernels'."""
    for line in KNOWN:
        counter, key, words = ([int(w, 16) for w in part.split()] for part in line)
        assert [int(w) for w in oracle.philox(counter, key)] == words == list(_C.test_philox(counter, key))
    for c in np.random.default_rng(0).integers(0, 2**32, (1000, 6), dtype=np.uint64).tolist():
        assert [int(w) for w in oracle.philox(c[:4], c[4:])] == list(_C.test_philox(c[:4], c[4:]))
    for seed in (0, 1, BASE):
        assert np.array_equal(rk.randn(2**20, seed=seed).numpy(), oracle.randn(seed, 2**20))


def philox(counter, seed):
    """x0..x3, stacked on the last axis, of counters and seeds that broadcast."""
    c, s = (np.asarray(x, dtype=np.uint64) for x in (counter, seed))
    words = oracle.philox([c & oracle.MASK, c >> oracle.HALF, 0 * c, 0 * c], [s & oracle.MASK, s >> oracle.HALF])
    return np.stack(words, -1).astype(np.uint32)


def counters(seed=0):
    """One seed's words in the order of its elements."""
    for first in range(0, 2**62, BLOCK):
        yield philox(np.arange(first, first + BLOCK), seed).reshape(-1)


def counters_by_word(seed=0):
    """One seed's x0 at counter 0, 1, 2, ..., then its x1, x2, x3, in blocks."""
    for first in range(0, 2**62, BLOCK):
        yield philox(np.arange(first, first + BLOCK), seed).T.reshape(-1)


def seeds():
    """The first four words of seed 0, 1, 2, ..."""
    for first in range(0, 2**62, BLOCK):
        yield philox(0, np.arange(first, first + BLOCK)).reshape(-1)


def seeds_by_word():
    """The first word of seed 0, 1, 2, ..., then their second, third and fourth, in blocks."""
    for first in range(0, 2**62, BLOCK):
        yield philox(0, np.arange(first, first + BLOCK)).T.reshape(-1)


def round_robin(many):
    rows = max(1, BLOCK // len(many))
    for first in range(0, 2**62, rows):
        yield philox(np.arange(first, first + rows)[:, None], many).transpose(0, 2, 1).reshape(-1)


def one_bit():
    """One word of each of 64 seeds in turn: a seed, and it with each of its 63 bits flipped."""
    return round_robin(np.array([BASE] + [BASE ^ (1 << k) for k in range(63)], dtype=np.uint64))


def interleaved():
    """One word of each of seeds 0 to 4095 in turn."""
    return round_robin(np.arange(4096))


def eps_as_words():
    """The normals of seed 0, 1, 2, ...: the upper 16 bits of Phi(eps), two to a word."""
    for seed in range(2**62):
        u = torch.special.ndtr(rk.randn(2**18, seed=seed))
        yield (u * 65536).clamp_(max=65535).to(torch.int32).numpy().astype(np.uint16).view(np.uint32)


def randu():
    """A control, which must fail: the multiplier 65539 modulo 2^31, whose triples lie on 15 planes."""
    powers = np.ones(4 * BLOCK, dtype=np.uint64)
    for i in range(1, len(powers)):
        powers[i] = powers[i - 1] * np.uint64(65539) & np.uint64(2**31 - 1)
    x = np.uint64(1)
    while True:
        x = x * np.uint64(65539) & np.uint64(2**31 - 1)
        block = x * powers & np.uint64(2**31 - 1)
        x = block[-1]
        yield (block << np.uint64(1)).astype(np.uint32)


STREAMS = {f.__name__: f for f in (counters, counters_by_word, seeds, seeds_by_word, one_bit, interleaved)}

# ---- dieharder, by its numbers

# Left out: 5, 6, 7 and 14, which dieharder itself calls suspect or not to be used; 201, which gives mt19937 a p-value
# of 1 - 5e-7 at 20 samples. The DAB tests (205 to 209) are made for one sample, and 17 is slow.
MANY = [[0], [1], [2], [3], [4], [8], [9], [10], [11], [12], [13], [15], [16], [100], [101], [102]]
MANY += [[200, n] for n in range(1, 9)] + [[202, n] for n in (3, 4, 5)] + [[203, n] for n in (0, 3, 15, 31)] + [[204]]
FEW = [[17, 0, 4]] + [[test, 0, 1] for test in (205, 206, 207, 208, 209)]


def dieharder_version():
    try:
        text = subprocess.run(["dieharder", "-l"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise SystemExit(
            "quality: dieharder must be on the path; it was not found. Debian: apt install dieharder."
        ) from None
    return text.split("version ")[1].split()[0]


def dieharder(name, stream, samples, tests):
    """Each test reads on in the stream where the one before stopped."""
    for test, ntuple, own in ([*t, 0, 0][:3] for t in tests):
        command = ["dieharder", "-g", "200", "-d", str(test), "-n", str(ntuple), "-p", str(own or samples), "-c", ","]
        for field in ("test_name", "ntuple", "tsamples", "psamples", "pvalues"):
            command += ["-D", field]
        words = 0
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            try:
                while True:
                    words += process.stdin.write(next(stream).tobytes()) // 4
            except BrokenPipeError:
                lines = process.stdout.read().decode().splitlines()
        assert lines, command
        for i, line in enumerate(lines):
            title, size, tsamples, psamples, p = (field.strip() for field in line.split(","))
            label = f"{title} {size}" + (f" ({'abcdefgh'[i]})" if len(lines) > 1 and test != 102 else "")
            if test == 102:  # two p-values for each size from 3 on
                label += f" ({'ab'[i % 2]})"
            p = float(p)
            if psamples == "1":  # of several, it is a KS test's, which sees too good fits by itself
                p = two_sided(p, 1 - p)
            yield Result(f"dieharder: {name}", label, words, p, f"{psamples} x {tsamples}")


# ---- lattice


def lattice(name, stream, n):
    """Pairs and triples of neighbours, high and low bits, counted in a grid: even cells, and no plane waves (a lattice
    has a few large ones)."""
    grids = {(d, end): np.zeros(2 ** (d * b), dtype=np.int64) for d, b in ((2, 9), (3, 6)) for end in ("high", "low")}
    for _ in range(n // (4 * BLOCK)):
        words = next(stream)
        for (d, end), counts in grids.items():
            b = {2: 9, 3: 6}[d]
            coordinates = (words >> np.uint32(32 - b) if end == "high" else words & np.uint32(2**b - 1)).astype(
                np.int64
            )
            tuples = coordinates[: len(words) // d * d].reshape(-1, d)
            cell = tuples[:, 0]
            for i in range(1, d):
                cell = cell << b | tuples[:, i]
            counts += np.bincount(cell, minlength=counts.size)
    for (d, end), counts in grids.items():
        label, points = f"{'pairs' if d == 2 else 'triples'}, {end} bits", int(counts.sum())
        value, df, p = chi_square(counts, points / counts.size)
        yield Result(f"lattice: {name}", f"{label}: cells", points, p, f"chi2 {value:.0f} / {df}")
        power = np.abs(np.fft.fftn(counts.reshape((round(counts.size ** (1 / d)),) * d))) ** 2 / points
        half = power.shape[0] // 2
        power[np.ix_(*[(0, half)] * d)] = 0  # real components, of another distribution
        waves = (power.size - 2**d) // 2
        p = -np.expm1(waves * np.log1p(-np.exp(-power.max())))
        yield Result(f"lattice: {name}", f"{label}: largest wave", points, float(p), f"{power.max():.1f} of {waves}")


# ---- avalanche


def avalanche(n):
    """Each bit of the seed and of the counter, flipped, flips each bit of the words half of the time."""
    rng = np.random.default_rng(1)
    seed, counter = rng.integers(0, 2**63, n, dtype=np.uint64), rng.integers(0, 2**62, n, dtype=np.uint64)
    words = philox(counter, seed)
    for label, bits, flip in (
        ("seed", 63, lambda k: philox(counter, seed ^ np.uint64(1 << k))),
        ("counter", 64, lambda k: philox(counter ^ np.uint64(1 << k), seed)),
    ):
        flips = np.stack(
            [np.unpackbits((words ^ flip(k)).view(np.uint8).reshape(n, 16), axis=1).sum(0) for k in range(bits)]
        )
        z = (flips - n / 2) / np.sqrt(n / 4)
        value = float((z**2).sum())
        p = two_sided(stats.chi2.cdf(value, z.size), stats.chi2.sf(value, z.size))
        yield Result("avalanche", f"{label} bits x word bits: all", n, p, f"chi2 {value:.0f} / {z.size}")
        p = -np.expm1(z.size * np.log1p(-2 * stats.norm.sf(np.abs(z).max())))
        yield Result("avalanche", f"{label} bits x word bits: the worst", n, float(p), f"{np.abs(z).max():.2f} sigma")
