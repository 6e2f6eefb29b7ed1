"""Every execution path gives one result: measures the section "The same bits" of docs/numerics.md as one table."""

import itertools
import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo  # it keeps a reference to torch.empty, which must not be the fixture's
from torch.utils._python_dispatch import TorchDispatchMode

import reparam_kernels as rk
from reparam_kernels import _C
from reparam_kernels.core import backends
from reparam_kernels.core.dtypes import compute_dtype
from tests import oracle
from tests.cases import DTYPES, PARAMS, inputs, truth
from tests.conftest import forget
from tests.report import table

ISAS = _C.available_isas()
# Rows shorter than, as long as and longer than kChunk of csrc/core/chunks.h; in C++ enough of them for three threads.
ROWS = {"cpu": {40: 1250, 1024: 48, 3001: 17}, "triton": {40: 24, 1024: 2, 3001: 2}}
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class Case(NamedTuple):
    dtype: torch.dtype
    param: str
    prior: str | None  # each row has its own, or all rows share one
    cols: int
    samples: tuple
    seeds: bool  # one for each item, so that the batch may be cut

    @property
    def options(self):
        min_std = {"min_std": 0.125} if self.param == "softplus" else {}
        return {"param": self.param, "sample_shape": self.samples, **min_std}

    @property
    def names(self):
        return ("dmu", "dx", *(f"{name}, {self.prior}" for name in ("dmu_p", "dx_p") if self.prior))


CASES = [
    Case(*choice, samples=((), (2,))[i % 2], seeds=i // 2 % 2 == 0)
    for i, choice in enumerate(itertools.product(DTYPES, PARAMS, (None, "own", "shared"), ROWS["cpu"]))
]


class Given(NamedTuple):
    leaves: tuple
    seed: object
    cotangents: tuple


def given(case, backend):
    shape = (ROWS[backend][case.cols], case.cols)
    leaves = [*inputs(shape, case.dtype, case.param)]
    if case.prior:
        mu_p, x_p = inputs(shape[case.prior == "shared" :], case.dtype, case.param, seed=1)
        leaves += [mu_p, x_p.clamp(0.75, 2.0)]  # or float16 overflows more often than not
    g = torch.Generator().manual_seed(2)
    dz = torch.randn((*case.samples, *shape), generator=g).to(case.dtype)
    dkl = torch.randn(shape[:1], generator=g, dtype=compute_dtype(case.dtype))
    seed = torch.randint(2**63 - 1, shape[:1], generator=g) if case.seeds else 2**40 + 7
    return Given(tuple(t.requires_grad_() for t in leaves), seed, (dz, dkl))


def cut(whole, cuts):
    """Cut a batch into parts, each with the shared prior."""
    if not cuts:
        return [whole]
    rows = len(whole.leaves[0])
    places = [1] if cuts == 1 else [rows // 3, rows - 1]
    leaves = zip(*(t.tensor_split(places) if t.dim() > 1 else [t] * (cuts + 1) for t in whole.leaves), strict=True)
    dz, dkl = whole.cotangents
    return map(
        Given,
        leaves,
        whole.seed.tensor_split(places),
        zip(dz.tensor_split(places, -2), dkl.tensor_split(places), strict=True),
    )


def latent(case, seed, mu, x, *prior):
    z, kl = rk.reparameterize_kl(mu, x, seed=seed, prior=prior or None, **case.options)
    if not case.seeds:
        return (z, kl), rk.randn(z.shape, seed=seed, dtype=case.dtype)
    eps = rk.randn(mu.shape[0], *case.samples, case.cols, seed=seed, dtype=case.dtype)
    return (z, kl), eps.movedim(0, len(case.samples))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def eager(f, part):
    outputs, eps = f(part.seed, *part.leaves)
    return eps, *outputs, *torch.autograd.grad(outputs, part.leaves, part.cotangents)


def registered_op(f, part):
    with Watching():
        return eager(f, part)


def formula(f, part):
    leaves = (t.detach() for t in part.leaves)
    outputs, pull, eps = torch.func.vjp(partial(f, part.seed), *leaves, has_aux=True)
    return eps, *outputs, *pull(part.cotangents)


EXECUTORS = {"eager": eager, "registered op": registered_op, "torch.compile": eager, "formula": formula}


def results(case, whole, f, executor="eager", cuts=0, isa=ISAS[0], threads=1, backend="cpu"):
    """Return eps, z, KL and gradients by name. If the batch is cut, the parts are joined again."""
    torch.set_num_threads(threads)
    _C.set_isa(isa)
    backends.FORCED = backend
    forget()
    parts = [EXECUTORS[executor](f, part) for part in cut(whole, cuts)]
    joined_parts = {}
    for name, values in zip(("eps", "z", "kl", *case.names), zip(*parts, strict=True), strict=True):
        joined = sum(values) if "shared" in name else torch.cat(values, -2 if name in ("eps", "z") else 0)
        joined_parts[name] = joined.detach()
    return joined_parts


def truths(case, whole):
    """Return the bits that the numpy oracle fixes, and the float64 reference on the oracle's eps."""
    mu, x, *prior = whole.leaves
    rows, cols = mu.shape
    if case.seeds:
        items = [oracle.randn(seed, cols * math.prod(case.samples)) for seed in whole.seed.tolist()]
        eps = torch.from_numpy(np.stack(items)).reshape(rows, *case.samples, cols).movedim(0, len(case.samples))
    else:
        eps = torch.from_numpy(oracle.randn(whole.seed, mu.numel() * math.prod(case.samples)))
        eps = eps.reshape(*case.samples, rows, cols)
    exact = {"eps": eps.to(case.dtype)}
    if case.param == "std" and case.dtype == torch.float32:
        exact["z"] = torch.from_numpy(oracle.fma(x.detach().numpy(), eps.numpy(), mu.detach().numpy()))
    wide, wide_prior, outputs = truth(mu, x, eps, prior=tuple(prior) or None, **case.options)
    leaves = (*wide, *(wide_prior or ()))
    grads = torch.autograd.grad(outputs, leaves, [t.double() for t in whole.cotangents])
    near = dict(zip(("z", "kl", *case.names), (*outputs, *grads), strict=True))
    return exact, {"eps": eps.double(), **{name: t.detach() for name, t in near.items()}}


# ---- what is compared with what, and how near it must be

ALL = ("eps", "z", "kl", "gradients", "shared")
COLUMNS = ("eps", "z", "KL", "gradients", "gradients to a shared prior")
ORACLE, TRUTH, RUN = "the numpy oracle (z: param std)", "the reference in float64", "another run"
THREADS, ISA, CUT = "2, 3 threads", "each instruction set", "the batch cut in 2, 3 parts"
TRITON, TRITON_OP, TRITON_CUT = "Triton's interpreter", "registered op, both in Triton", "batch cut, both in Triton"
TOLERANT = {  # all other cells: equal bits
    TRUTH: dict.fromkeys(DTYPES, ALL[1:]),
    CUT: dict.fromkeys(DTYPES, ("shared",)),
    "formula": dict.fromkeys(DTYPES, ALL[1:]),
    TRITON: {**dict.fromkeys(DTYPES, ("kl",)), torch.float64: ALL[1:], torch.bfloat16: ALL},
    TRITON_OP: {torch.bfloat16: ("eps",)},  # rounded by torch, truncated by the interpreter
    TRITON_CUT: dict.fromkeys(DTYPES, ("shared",)),
}
ABOUT = f"""\
Each line is compared with C++, eager, whole, one thread, {ISAS[0]}, over {len(CASES)} cases: every dtype and `param`; \
no prior, one for each row, one that all rows share; rows of {", ".join(map(str, ROWS["cpu"]))} elements; with and \
without sample_shape; one seed, or one for each item, as a batch that is cut needs. From "each instruction set" to \
"formula": each of {", ".join(ISAS)} with 1, 2 and 3 threads. "Gradients": to mu, the second argument and a prior of \
each row's own. "Equal bits": compared as integers. "Within": the bound, and in brackets the largest difference from \
the reference in float64, relative to the element, or to the root mean square of its tensor where that is \
larger; an overflow where the reference overflows counts as 0."""
LINES = (ORACLE, TRUTH, RUN, THREADS, ISA, CUT, *list(EXECUTORS)[1:], TRITON, TRITON_OP, TRITON_CUT)


def tolerance(line, column, dtype):
    """Return a relative tolerance; for half precision half a unit in the last place, or one if Triton truncates."""
    if dtype == torch.float64:
        bound = 1e-13
    elif column == "kl":
        bound = 1e-6
    elif dtype == torch.float32:
        bound = 4e-7 if column == "z" else 2e-6
    else:
        bound = torch.finfo(dtype).eps * (1.0 if "Triton" in line else 0.502)
    return 4 * bound if column == "shared" else bound  # a sum over the batch


def bits(t):
    return t.contiguous().view(INTEGERS[t.element_size()])


def difference(got, want):
    """Return the largest difference, relative to the element or to the root mean square, whichever is larger."""
    size = torch.maximum(want.abs(), want.square().mean().sqrt())
    overflowed = got.isinf() & (got == want.to(got.dtype))
    error = torch.where(overflowed, 0.0, (got.double() - want).abs() / size)
    return torch.nan_to_num(error, nan=math.inf).max().item()


def fill(cells, line, case, got, want, true):
    """Append (bits are equal, difference from the truth) to each cell."""
    for name in got.keys() & want.keys():
        column = "shared" if "shared" in name else "gradients" if name in case.names else name
        same = torch.equal(bits(got[name]), bits(want[name].to(got[name].dtype)))
        cells.setdefault((line, case.dtype, column), []).append((same, difference(got[name], true[name])))


def shown(cells, line, dtype, column):
    """Return the text of a cell, and whether it passes."""
    if (line, dtype, column) not in cells:
        return "", True
    same, differences = zip(*cells[line, dtype, column], strict=True)
    largest = max(differences)
    if column not in TOLERANT.get(line, {}).get(dtype, ()):
        return "equal bits" if all(same) else f"**{same.count(False)} of {len(same)} DIFFER**", all(same)
    bound = tolerance(line, column, dtype)
    return (f"within {bound:.1e} ({largest:.1e})" if largest <= bound else f"**{largest:.1e}**"), largest <= bound


def measure(case, cells):
    f = partial(latent, case)
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=False)
    whole = given(case, "cpu")
    exact, true = truths(case, whole)
    base = results(case, whole, f)
    fill(cells, ORACLE, case, base, exact, true)
    fill(cells, TRUTH, case, base, {name: true[name] for name in ("z", "kl", *case.names)}, true)
    fill(cells, RUN, case, results(case, whole, f), base, true)
    ways = [("eager", 0), ("registered op", 0), ("formula", 0)]
    if case.seeds:
        ways += itertools.product(("eager", "registered op"), (1, 2))
    if case.cols == 1024 and case.prior == "own":  # some only: seconds each
        ways += [("torch.compile", 0)]
    for (executor, cuts), isa, threads in itertools.product(ways, ISAS, (1, 2, 3)):
        line = CUT if cuts else executor if executor != "eager" else THREADS if isa == ISAS[0] else ISA
        got = results(case, whole, compiled if executor == "torch.compile" else f, executor, cuts, isa, threads)
        fill(cells, line, case, got, base, true)
    whole = given(case, "triton")
    _, true = truths(case, whole)
    base, own = results(case, whole, f), results(case, whole, f, backend="triton")
    fill(cells, TRITON, case, own, base, true)
    fill(cells, TRITON_OP, case, results(case, whole, f, "registered op", backend="triton"), own, true)
    if case.seeds:
        fill(cells, TRITON_CUT, case, results(case, whole, f, cuts=1, backend="triton"), own, true)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    monkeypatch.setattr(backends, "FORCED", None)
    yield
    _C.set_isa(ISAS[0])
    forget()


@pytest.mark.parametrize("cases", [CASES[4::19], pytest.param(CASES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_execution_path_gives_one_result(cases, record_property):
    cells = {}
    for case in cases:
        measure(case, cells)
    rows, wrong = [], []
    for line in LINES:
        alike = {}  # dtypes with equal cells share a row
        for dtype in DTYPES:
            texts, holds = zip(*(shown(cells, line, dtype, column) for column in ALL), strict=True)
            wrong += [(line, dtype, column) for column, ok in zip(ALL, holds, strict=True) if not ok]
            if any(texts):
                alike.setdefault(texts, []).append(str(dtype).removeprefix("torch."))
        rows += [(line, "all" if len(d) == len(DTYPES) else ", ".join(d), *texts) for texts, d in alike.items()]
    text = "\n".join(table(("", "dtype", *COLUMNS), rows))
    if cases is CASES:
        record_property("table", f"{ABOUT}\n\n{text}")
    assert not wrong, f"{wrong}\n{text}"


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, 6e-8, 1e-38, 1e30, -1e30, -200.0, 88.0, 0.5]


@pytest.mark.parametrize("own_prior", [False, True], ids=["unit", "prior"])
@pytest.mark.parametrize("param", PARAMS)
def test_special_values_have_the_same_bits(param, own_prior):
    """Zeros with their signs, infinities and subnormals are compared by bits; any NaN equals any other."""
    values = torch.cartesian_prod(*[torch.tensor(SPECIAL, dtype=torch.float64)] * (2 + 2 * own_prior))
    g = torch.Generator().manual_seed(2)
    dz, dkl = torch.randn((2, len(values)), generator=g)
    for dtype in DTYPES:
        case = Case(dtype, param, "own" if own_prior else None, 1, (), False)
        leaves = tuple(t.requires_grad_() for t in values.to(dtype).split(1, 1))
        whole = Given(leaves, 7, (dz.to(dtype)[:, None], dkl.to(compute_dtype(dtype))))
        base, *others = (results(case, whole, partial(latent, case), isa=isa) for isa in ISAS)
        for name, want in base.items():
            for got in (other[name] for other in others):
                assert torch.equal(*(bits(torch.where(t.isnan(), math.nan, t)) for t in (got, want))), (dtype, name)
