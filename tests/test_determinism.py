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
from tests.cases import DTYPES, PARAMS, double, inputs
from tests.conftest import forget
from tests.report import table

ISAS = _C.available_isas()
# Rows shorter than, as long as and longer than kChunk of csrc/core/chunks.h; in C++ enough of them for three threads.
ROWS = {"cpu": {40: 1250, 1024: 48, 3001: 17}, "triton": {40: 24, 1024: 2, 3001: 2}}
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class Given(NamedTuple):
    leaves: tuple
    shared: tuple  # for each leaf: all items of the batch have it
    seed: object
    cotangents: tuple
    dims: tuple  # for each cotangent: the dim of the batch


def options_of(case):  # torch.compile of torch 2.10 does not trace a property of a NamedTuple
    min_std = {"min_std": 0.125} if case.param == "softplus" else {}
    return {"param": case.param, "sample_shape": case.samples, **min_std, **DENSITIES.get(case.density, {})}


class LatentCase(NamedTuple):
    dtype: torch.dtype
    param: str
    prior: str | None  # each row has its own, or all rows share one
    cols: int
    samples: tuple
    seeds: bool  # one for each item, so that the batch may be cut
    density: str | None = None  # KL, or the log-density or the log-ratio of the sample: a key of DENSITIES

    @property
    def outputs(self):
        return ("z", "log_q" if self.density else "kl")

    @property
    def gradients(self):
        return ("dmu", "dx", *(f"{name}, {self.prior}" for name in ("dmu_p", "dx_p") if self.prior))

    def draw(self, ops, mu, x, *prior, **noise):
        if self.prior and self.density:
            return ops.reparameterize_mc_kl(mu, x, prior=prior, **noise, **options_of(self))
        if self.density:
            return ops.reparameterize_log_prob(mu, x, **noise, **options_of(self))
        return ops.reparameterize_kl(mu, x, prior=prior or None, **noise, **options_of(self))

    def call(self, seed, mu, x, *prior):
        """Return the outputs, and eps."""
        out = self.draw(rk, mu, x, *prior, seed=seed)
        if not self.seeds:
            return out, (rk.randn(out[0].shape, seed=seed, dtype=self.dtype),)
        eps = rk.randn(mu.shape[0], *self.samples, self.cols, seed=seed, dtype=self.dtype)
        return out, (eps.movedim(0, len(self.samples)),)

    def given(self, backend):
        shape = (ROWS[backend][self.cols], self.cols)
        leaves = [*inputs(shape, self.dtype, self.param)]
        if self.prior:
            mu_p, x_p = inputs(shape[self.prior == "shared" :], self.dtype, self.param, seed=1)
            leaves += [mu_p, x_p.clamp(0.75, 2.0)]  # or float16 overflows more often than not
        g = torch.Generator().manual_seed(2)
        dz = torch.randn((*self.samples, *shape), generator=g).to(self.dtype)
        rows = (*self.samples, *shape[:1]) if self.density else shape[:1]
        dkl = torch.randn(rows, generator=g, dtype=compute_dtype(self.dtype))
        seed = torch.randint(2**63 - 1, shape[:1], generator=g) if self.seeds else 2**40 + 7
        shared = tuple(i >= 2 and self.prior == "shared" for i in range(len(leaves)))
        return Given(tuple(t.requires_grad_() for t in leaves), shared, seed, (dz, dkl), (-2, -1))

    def truths(self, whole):
        """Return the bits that the numpy oracle fixes, and the float64 reference on the oracle's eps."""
        mu, x, *_ = whole.leaves
        rows, cols = mu.shape
        if self.seeds:
            items = [oracle.randn(seed, cols * math.prod(self.samples)) for seed in whole.seed.tolist()]
            eps = torch.from_numpy(np.stack(items)).reshape(rows, *self.samples, cols).movedim(0, len(self.samples))
        else:
            eps = torch.from_numpy(oracle.randn(whole.seed, mu.numel() * math.prod(self.samples)))
            eps = eps.reshape(*self.samples, rows, cols)
        exact = {"eps": eps.to(self.dtype)}
        if self.param == "std" and self.dtype == torch.float32 and self.density != "tanh":
            exact["z"] = torch.from_numpy(oracle.fma(x.detach().numpy(), eps.numpy(), mu.detach().numpy()))
        leaves = double(whole.leaves)
        return exact, {"eps": eps.double(), **true_results(self, partial(self.draw, rk.reference), leaves, whole, eps)}


class MixtureCase(NamedTuple):
    dtype: torch.dtype
    param: str
    weights: str | None  # each component has one, or each pair of a point and a component

    outputs = ("joint", "dims")
    seeds = True  # no noise, so the batch may always be cut

    @property
    def gradients(self):
        weights = {"component": ("dw, shared",), "pair": ("dw",)}.get(self.weights, ())
        return ("dz", "dmu, shared", "dx, shared", *weights)

    def mix(self, ops, z, mu, x, *weights):
        return ops.mixture_log_prob(z, mu, x, log_weights=weights[0] if weights else None, of="both", param=self.param)

    def call(self, seed, *leaves):
        return self.mix(rk, *leaves), ()

    def given(self, backend):
        points, components, dims = MIXTURES[backend]
        mu, x = inputs((components, dims), self.dtype, self.param)
        z, _ = inputs((points, dims), self.dtype, seed=1)
        w, _ = inputs((points, components), compute_dtype(self.dtype), seed=2)
        weights = {"component": (w[0].clone(),), "pair": (w,)}.get(self.weights, ())
        g = torch.Generator().manual_seed(3)
        grads = tuple(torch.randn(s, generator=g, dtype=compute_dtype(self.dtype)) for s in (z.shape[:1], z.shape))
        leaves = tuple(t.requires_grad_() for t in (z, mu, x, *weights))
        return Given(leaves, tuple("shared" in name for name in self.gradients), torch.zeros(points), grads, (-1, -2))

    def truths(self, whole):
        return {}, true_results(self, lambda *leaves, **_: self.mix(rk.reference, *leaves), double(whole.leaves), whole)


def true_results(case, f, leaves, whole, eps=None):
    outputs = f(*leaves, **({} if eps is None else {"eps": eps.double()}))
    grads = torch.autograd.grad(outputs, leaves, [t.double() for t in whole.cotangents])
    return {n: t.detach() for n, t in zip((*case.outputs, *case.gradients), (*outputs, *grads), strict=True)}


DENSITIES = {"plain": {}, "tanh": {"squash": "tanh"}, "path": {"path_derivative": True}, "ratio": {}}
MIXTURES = {"cpu": (300, 150, 7), "triton": (37, 35, 3)}  # points, components and dims


def latent_cases():
    for i, choice in enumerate(itertools.product(DTYPES, PARAMS, (None, "own", "shared"), ROWS["cpu"])):
        yield LatentCase(*choice, samples=((), (2,))[i % 2], seeds=i // 2 % 2 == 0)
    for i, (dtype, param) in enumerate(itertools.product(DTYPES, PARAMS)):
        for k, kind in enumerate(("plain", "ratio") if (i + i // 4) % 2 else ("tanh", "path")):
            prior = ("own", "shared")[i // 2 % 2] if kind == "ratio" else None
            cols, samples = list(ROWS["cpu"])[(i + k) % 3], ((), (2,))[(i // 3 + k) % 2]
            yield LatentCase(dtype, param, prior, cols, samples, (i // 2 + k) % 2 == 0, kind)


LATENT = list(latent_cases())
MIXTURE = [
    MixtureCase(dtype, PARAMS[(i + k) % 4], weights)
    for i, dtype in enumerate(DTYPES)
    for k, weights in enumerate((None, "component", "pair"))
]


def cut(whole, cuts):
    """Cut a batch into parts, each with what all items share."""
    if not cuts:
        return [whole]
    rows = len(whole.leaves[0])
    places = [1] if cuts == 1 else [rows // 3, rows - 1]
    pairs = zip(whole.leaves, whole.shared, strict=True)
    leaves = zip(*([t] * (cuts + 1) if shared else t.tensor_split(places) for t, shared in pairs), strict=True)
    each = (t.tensor_split(places, dim) for t, dim in zip(whole.cotangents, whole.dims, strict=True))
    grads = zip(*each, strict=True)
    parts = zip(leaves, whole.seed.tensor_split(places), grads, strict=True)
    return [whole._replace(leaves=of, seed=seed, cotangents=grad) for of, seed, grad in parts]


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def eager(f, part):
    outputs, observed = f(part.seed, *part.leaves)
    return *observed, *outputs, *torch.autograd.grad(outputs, part.leaves, part.cotangents)


def registered_op(f, part):
    with Watching():
        return eager(f, part)


def formula(f, part):
    leaves = (t.detach() for t in part.leaves)
    outputs, pull, observed = torch.func.vjp(partial(f, part.seed), *leaves, has_aux=True)
    return *observed, *outputs, *pull(part.cotangents)


EXECUTORS = {"eager": eager, "registered op": registered_op, "torch.compile": eager, "formula": formula}
BATCH_DIM = {"eps": -2, "z": -2, "dims": -2, "kl": -1, "log_q": -1, "joint": -1}  # of the others: 0


def results(case, whole, f, executor="eager", cuts=0, isa=ISAS[0], threads=1, backend="cpu"):
    """Return eps, outputs and gradients by name. If the batch is cut, the parts are joined again."""
    torch.set_num_threads(threads)
    _C.set_isa(isa)
    backends.FORCED = backend
    forget()
    parts = [EXECUTORS[executor](f, part) for part in cut(whole, cuts)]
    names = [*case.outputs, *case.gradients]
    names = ["eps", *names] if len(parts[0]) > len(names) else names
    joined_parts = {}
    for name, values in zip(names, zip(*parts, strict=True), strict=True):
        joined = sum(values) if "shared" in name else torch.cat(values, BATCH_DIM.get(name, 0))
        joined_parts[name] = joined.detach()
    return joined_parts


# ---- what is compared with what, and how near it must be

LATENT_COLUMNS = {"eps": "eps", "z": "z", "kl": "KL", "log_q": "log q", "gradients": "gradients"}
MIXTURE_COLUMNS = {"joint": "joint", "dims": "dims", "gradients": "gradients of the points"}
COLUMNS = {  # of each op's table
    "latent": {**LATENT_COLUMNS, "shared": "gradients to a shared prior"},
    "mixture": {**MIXTURE_COLUMNS, "shared": "gradients of the components"},
}
ORACLE, TRUTH, RUN = "the numpy oracle (z: param std)", "the reference in float64", "another run"
THREADS, ISA, CUT = "2, 3 threads", "each instruction set", "the batch cut in 2, 3 parts"
TRITON, TRITON_OP, TRITON_CUT = "Triton's interpreter", "registered op, both in Triton", "batch cut, both in Triton"
OUTPUTS = ("z", "kl", "log_q", "joint", "dims", "gradients", "shared")
TOLERANT = {  # all other cells: equal bits
    TRUTH: dict.fromkeys(DTYPES, OUTPUTS),
    CUT: dict.fromkeys(DTYPES, ("shared",)),
    "formula": dict.fromkeys(DTYPES, OUTPUTS),
    TRITON: {**dict.fromkeys(DTYPES, ("kl", "log_q")), torch.float64: OUTPUTS, torch.bfloat16: ("eps", *OUTPUTS)},
    TRITON_OP: {torch.bfloat16: ("eps",)},  # rounded by torch, truncated by the interpreter
    TRITON_CUT: dict.fromkeys(DTYPES, ("kl", "log_q", "shared")),  # the first part has one item, in another tile
}
ABOUT = {
    "latent": f"""\
Each line is compared with C++, eager, whole, one thread, {ISAS[0]}, over {len(LATENT)} cases: every dtype and \
`param`; KL with no prior, one for each row, one that all rows share; log-density, squashed by tanh and with path \
derivatives, and the Monte Carlo KL; rows of {", ".join(map(str, ROWS["cpu"]))} elements; with and without \
sample_shape; one seed, or one for each item, as a batch that is cut needs. From "each instruction set" to "formula": \
each of {", ".join(ISAS)} with 1, 2 and 3 threads. "Gradients": to mu, the second argument and a prior of each row's \
own. "Equal bits": compared as integers. "Within": the bound, and in brackets the largest difference from the \
reference in float64, relative to the element, or to the root mean square of its tensor where that is larger; an \
overflow where the reference overflows counts as 0.""",
    "mixture": f"""\
The same of `rk.mixture_log_prob`, over {len(MIXTURE)} cases of {MIXTURES["cpu"][0]} points, {MIXTURES["cpu"][1]} \
components and {MIXTURES["cpu"][2]} dims: every dtype and `param`; no weights, one for each component, one for each \
pair. Cut is the batch of points.""",
}
LINES = (ORACLE, TRUTH, RUN, THREADS, ISA, CUT, *list(EXECUTORS)[1:], TRITON, TRITON_OP, TRITON_CUT)


def tolerance(op, line, column, dtype):
    """Return a relative tolerance; for half precision half a unit in the last place, or one if Triton truncates."""
    half = torch.finfo(dtype).eps * (1.0 if "Triton" in line else 0.502) if dtype.itemsize == 2 else 0.0
    if op == "mixture":
        bound = 1e-12 if dtype == torch.float64 else 3e-5 + half if column in ("gradients", "shared") else 1e-6
    elif dtype == torch.float64:
        bound = 1e-13
    elif column in ("kl", "log_q"):
        bound = 1e-6
    else:
        bound = half or (4e-7 if column == "z" else 2e-6)
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
        column = "shared" if "shared" in name else "gradients" if name in case.gradients else name
        same = torch.equal(bits(got[name]), bits(want[name].to(got[name].dtype)))
        cells.setdefault((line, case.dtype, column), []).append((same, difference(got[name], true[name])))


def shown(cells, op, line, dtype, column):
    """Return the text of a cell, and whether it passes."""
    if (line, dtype, column) not in cells:
        return "", True
    same, differences = zip(*cells[line, dtype, column], strict=True)
    largest = max(differences)
    tolerant = TOLERANT.get(line, {}).get(dtype, ())
    if column not in (OUTPUTS if op == "mixture" and line == TRITON else tolerant):
        return "equal bits" if all(same) else f"**{same.count(False)} of {len(same)} DIFFER**", all(same)
    bound = tolerance(op, line, column, dtype)
    return (f"within {bound:.1e} ({largest:.1e})" if largest <= bound else f"**{largest:.1e}**"), largest <= bound


def measure(case, cells, compiles):
    f = case.call
    torch.compiler.reset()
    compiled = torch.compile(lambda seed, *leaves: case.call(seed, *leaves), fullgraph=True, dynamic=False)
    whole = case.given("cpu")
    exact, true = case.truths(whole)
    base = results(case, whole, f)
    fill(cells, ORACLE, case, base, exact, true)
    fill(cells, TRUTH, case, base, {name: true[name] for name in (*case.outputs, *case.gradients)}, true)
    fill(cells, RUN, case, results(case, whole, f), base, true)
    ways = [("eager", 0), ("registered op", 0), ("formula", 0)]
    if case.seeds:
        ways += itertools.product(("eager", "registered op"), (1, 2))
    if compiles:
        ways += [("torch.compile", 0)]
    for (executor, cuts), isa, threads in itertools.product(ways, ISAS, (1, 2, 3)):
        line = CUT if cuts else executor if executor != "eager" else THREADS if isa == ISAS[0] else ISA
        got = results(case, whole, compiled if executor == "torch.compile" else f, executor, cuts, isa, threads)
        fill(cells, line, case, got, base, true)
    whole = case.given("triton")
    _, true = case.truths(whole)
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


def compiles(case):
    """Return True for the few cases that torch.compile runs too, since each takes seconds."""
    if isinstance(case, MixtureCase):
        return case.weights == "component" and case.dtype.itemsize > 2
    return case.cols == 1024 and case.density == ("path" if case.prior is None else None) and case.prior != "shared"


FEW = {"latent": [*LATENT[4:144:19], LATENT[150], LATENT[173]], "mixture": [MIXTURE[1], MIXTURE[8]]}
EVERY = {"latent": LATENT, "mixture": MIXTURE}


@pytest.mark.parametrize("op", ["latent", "mixture"])
@pytest.mark.parametrize("cases", [FEW, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_execution_path_gives_one_result(cases, op, record_property):
    cells = {}
    for case in cases[op]:
        measure(case, cells, compiles(case))
    rows, wrong = [], []
    for line in LINES:
        alike = {}  # dtypes with equal cells share a row
        for dtype in DTYPES:
            texts, holds = zip(*(shown(cells, op, line, dtype, column) for column in COLUMNS[op]), strict=True)
            wrong += [(line, dtype, column) for column, ok in zip(COLUMNS[op], holds, strict=True) if not ok]
            if any(texts):
                alike.setdefault(texts, []).append(str(dtype).removeprefix("torch."))
        rows += [(line, "all" if len(d) == len(DTYPES) else ", ".join(d), *texts) for texts, d in alike.items()]
    text = "\n".join(table(("", "dtype", *COLUMNS[op].values()), rows))
    if cases is EVERY:
        record_property("table", f"{ABOUT[op]}\n\n{text}")
    assert not wrong, f"{wrong}\n{text}"


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, 6e-8, 1e-38, 1e30, -1e30, -200.0, 88.0, 0.5]


def assert_same_bits_on_every_instruction_set(case, whole):
    """Any NaN equals any other."""
    base, *others = (results(case, whole, case.call, isa=isa) for isa in ISAS)
    for name, want in base.items():
        for got in (other[name] for other in others):
            assert torch.equal(*(bits(torch.where(t.isnan(), math.nan, t)) for t in (got, want))), (case, name)


@pytest.mark.parametrize("kind", ["unit", "prior", "plain", "tanh"])
@pytest.mark.parametrize("param", PARAMS)
def test_special_values_have_the_same_bits(param, kind):
    """Zeros with their signs, infinities and subnormals are compared by bits."""
    own_prior = kind == "prior"
    values = torch.cartesian_prod(*[torch.tensor(SPECIAL, dtype=torch.float64)] * (2 + 2 * own_prior))
    g = torch.Generator().manual_seed(2)
    dz, dkl = torch.randn((2, len(values)), generator=g)
    density = kind if kind in DENSITIES else None
    for dtype in DTYPES:
        case = LatentCase(dtype, param, "own" if own_prior else None, 1, (), False, density)
        leaves = tuple(t.requires_grad_() for t in values.to(dtype).split(1, 1))
        grads = (dz.to(dtype)[:, None], dkl.to(compute_dtype(dtype)))
        assert_same_bits_on_every_instruction_set(case, Given(leaves, (False,) * len(leaves), 7, grads, (-2, -1)))


@pytest.mark.parametrize("param", PARAMS)
def test_special_points_and_components_have_the_same_bits(param):
    z = torch.tensor(SPECIAL)[:, None]
    for dtype, pair in itertools.product((torch.float32, torch.bfloat16), itertools.product(SPECIAL, SPECIAL)):
        case = MixtureCase(dtype, param, None)
        components = torch.tensor([pair, (0.5, 0.75)], dtype=torch.float64).to(dtype)
        leaves = tuple(t.requires_grad_() for t in (z.to(dtype), *components.split(1, 1)))
        grads = (torch.linspace(-1, 2, len(z)), torch.ones(len(z), 1))
        assert_same_bits_on_every_instruction_set(
            case, Given(leaves, (False, True, True), torch.zeros(len(z)), grads, (-1, -2))
        )
