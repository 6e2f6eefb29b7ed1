"""examples/why_reparameterize.py: its closed forms, measurements, counts and pictures."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import reparam_kernels as rk
from examples.vae.data import load
from examples.vae.model import VAE
from examples.why import digits, estimators, memory, precision
from examples.why.graph import graph
from reparam_kernels.profiling import measure, providers
from reparam_kernels.profiling.case import Case

ROOT = Path(__file__).parent.parent
PICTURES = {"paths", "spread", "descent", "elbo", "gradient_variance", "memory", "kl_error"}


# ---- the graph


def test_graph_ends_at_the_autograd_leaves():
    mu, sigma = (torch.ones(2, requires_grad=True) for _ in range(2))
    assert graph(Normal(mu, sigma).sample()) == "no grad_fn: nothing leads back from here"
    plain = graph(mu + sigma * torch.randn(2), mu=mu, sigma=sigma)
    assert [line.strip() for line in plain.splitlines()] == [
        "AddBackward0",
        "mu",
        "MulBackward0",
        "sigma",
        "a constant",
    ]
    ours = graph(rk.reparameterize(mu, sigma, param="std"), mu=mu, sigma=sigma)
    assert [line.strip() for line in ours.splitlines()[1:]] == ["mu", "sigma"]
    for zero in torch.autograd.grad(torch.normal(mu, sigma).sum(), (mu, sigma)):
        assert torch.equal(zero, torch.zeros(2))


# ---- the estimators

PLACES = [(2.0, 1.0), (0.0, 1.0), (-1.5, 0.5), (0.7, 3.0)]


def formulas(name, mu, sigma, eps):
    """Return one sample's gradient in mu and in sigma, written out."""
    x = mu + sigma * eps
    if name == "pathwise":
        return 2 * x, 2 * x * eps
    return x**2 * (x - mu) / sigma**2, x**2 * (eps**2 - 1) / sigma


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
@pytest.mark.parametrize(("mu", "sigma"), PLACES)
def test_closed_forms_are_the_integrals(name, mu, sigma):
    """Gauss-Hermite quadrature with 20 nodes is exact for these polynomials."""
    eps, weight = np.polynomial.hermite_e.hermegauss(20)
    weight = weight / weight.sum()
    for which, g in enumerate(formulas(name, mu, sigma, eps)):
        mean = (weight * g).sum()
        assert mean == pytest.approx(2 * (mu, sigma)[which], abs=1e-11)
        variance = (weight * (g - mean) ** 2).sum()
        assert estimators.VARIANCES[name][which](mu, sigma) == pytest.approx(variance, rel=1e-11)


def test_the_numbers_of_the_story():
    at = [estimators.VARIANCES[name][which](2.0, 1.0) for name in estimators.ESTIMATORS for which in (0, 1)]
    assert at == [87, 346, 4, 24]


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_autograd_gives_the_formulas(name):
    mu, sigma = (torch.full((1000,), v, dtype=torch.float64, requires_grad=True) for v in (-1.5, 0.5))
    got = estimators.ESTIMATORS[name](mu, sigma, seed=3)
    for g, want in zip(got, formulas(name, -1.5, 0.5, rk.randn(1000, seed=3).double()), strict=True):
        torch.testing.assert_close(g, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 30])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_measured_spread_agrees_with_the_closed_form_within_its_error(name, which, n):
    """The tolerance of four standard errors is small enough that a closed form with an error of 10 % would fail."""
    measured = estimators.measure(name, which, 2.0, 1.0, n, 600_000 // n, seed=5)
    closed = estimators.VARIANCES[name][which](2.0, 1.0) / n
    assert abs(measured.mean - 2 * (2.0, 1.0)[which]) < 4 * measured.mean_error
    assert abs(measured.variance - closed) < 4 * measured.variance_error
    assert 4 * measured.variance_error < 0.1 * closed


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_descent_follows_the_mean_that_an_unbiased_gradient_gives(name):
    """The mean of mu shrinks by 1 - 2 lr per step, whatever the variance."""
    path = estimators.descend(name, 0, (2.0, 1.0), 0.01, 40, 4000)
    for step in (1, 10, 40):
        at = path[step]
        assert abs(at.mean() - 2.0 * 0.98**step) < 4 * at.std() / len(at) ** 0.5
    sigma = estimators.descend(name, 1, (2.0, 1.0), 0.005, 100, 4000)
    assert torch.equal(sigma[0], torch.ones(4000).double())
    assert (sigma > 0).all()
    assert sigma[-1].median() < 0.65


# ---- in the VAE


@pytest.fixture(scope="module")
def small():
    """Make a small model with perturbed weights, and a few images of four pixels."""
    torch.manual_seed(0)
    model = VAE(pixels=4, latent=2, hidden=3).double()
    for p in model.parameters():
        p.data.mul_(2)
    return model, torch.rand(5, 4, dtype=torch.float64)


def test_estimators_share_terms_decoder_gradient_and_kl_gradient(small):
    vae, x = small
    want = vae(x, 7)
    decoder = list(vae.decoder.parameters())
    for name in digits.ESTIMATORS:
        terms = digits.Estimated(vae, name)(x, 7)
        torch.testing.assert_close(terms.nll, want.nll)
        torch.testing.assert_close(terms.kl, want.kl)
        got = torch.autograd.grad(terms.nll.sum(), decoder, retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(want.nll.sum(), decoder, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)
        head = [vae.head.mu.weight, vae.head.logvar.weight]
        got = torch.autograd.grad(terms.kl.sum(), head)
        for a, b in zip(got, torch.autograd.grad(want.kl.sum(), head, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)


def test_estimators_have_one_mean_and_spreads_in_order(small):
    vae, x = small
    drawn = {
        name: torch.stack([digits.gradient(digits.Estimated(vae, name), x, seed) for seed in range(2000)])
        for name in digits.ESTIMATORS
    }
    truth = drawn["pathwise"]
    for name, g in drawn.items():
        error = ((g.var(0) + truth.var(0)) / len(g)).sqrt()
        moving = error > 1e-12
        assert (((g.mean(0) - truth.mean(0)).abs() / error)[moving] < 4).all(), name
        assert digits.gradient_variance(digits.Estimated(vae, name), x, 100) == pytest.approx(
            np.var(g[:100].numpy(), axis=0, ddof=1).sum(), rel=1e-9
        )
    total = {name: g.var(0).sum().item() for name, g in drawn.items()}
    assert total["pathwise"] < total["score function, baseline"] < total["score function"]


def test_training_on_digits_tells_the_estimators_apart():
    """After two epochs the variances differ by a factor of ten or more at the same weights, and pathwise leads."""
    rows = digits.compare(load(), epochs=3, seeds=1, hidden=32)
    last = {row["estimator"]: row for row in rows if row["epoch"] == 3}
    assert [row["step"] for row in rows[:3]] == [0, 23, 46]
    at = last["pathwise"]["variance"]
    assert 5 * at["pathwise"] < at["score function, baseline"] < at["score function"] / 10
    assert last["pathwise"]["held_out"] > last["score function"]["held_out"]
    assert set(last["score function"]["variance"]) == {"score function"}


# ---- memory


def test_eager_keeps_three_words_and_ours_a_seed():
    counted_by_provider, why = memory.compare(compiler=False, shape=(64, 256))
    eager, ours = counted_by_provider["eager"], counted_by_provider["ours"]
    assert eager.kept == {"sigma": 1.0, "eps": 1.0, "sigma²": 1.0}
    assert ours.kept == {"seed": 8 / (64 * 256 * 4)}
    row = 1 / 256  # the KL
    assert ours.forward == pytest.approx(3 + row + ours.kept["seed"])  # mu, logvar, z
    assert ours.backward == pytest.approx(5 + row + ours.kept["seed"])  # mu, logvar, dz, dmu, dlogvar
    assert eager.forward > 20
    assert eager.peak > ours.peak >= 3  # z, dmu, dlogvar
    case = Case("reparameterize_kl", (64, 256))
    for layer, counted in ((providers.eager(case), eager), (providers.ours(case), ours)):
        assert sum(counted.kept.values()) * 64 * 256 * 4 == measure.saved_bytes(layer, case.leaves())
    assert why == "torch.compile is left out: not asked for"


def test_a_compiler_that_fails_is_left_out_with_its_reason(monkeypatch):
    def fails(*_):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(providers, "compiled", fails)
    counted_by_provider, why = memory.compare(shape=(8, 8))
    assert list(counted_by_provider) == ["eager", "ours"]
    assert why == "torch.compile is left out: no C++ compiler"


def test_traffic_counts_what_an_op_reads_and_writes():
    a, b = torch.ones(4, 8), torch.ones(8)
    for run, words in (
        (lambda: a + a, 32 * 3),
        (lambda: a + b, 32 * 2 + 8),
        (lambda: a * b.expand(4, 8), 32 * 2 + 8),
        (lambda: a.view(32), 0),
        (lambda: torch.randn_like(a), 32),
        (lambda: a.sum(), 33),
    ):
        with memory.Traffic() as traffic:
            run()
        assert traffic.bytes == 4 * words


def test_what_the_caller_holds_is_not_kept():
    x = torch.ones(3, requires_grad=True)
    assert memory.kept(lambda x: (x.exp(),), [x]) == []  # saves its output
    assert memory.kept(lambda x: (x**2,), [x]) == []  # saves its input
    assert [t.shape for t in memory.kept(lambda x: (x.exp() * 2 + x.exp().sum(),), [x])] == [(3,), (3,)]


@pytest.mark.slow
def test_torch_compile_keeps_eps_and_makes_one_kernel_each_way():
    script = """
import re, torch
from torch._inductor.utils import run_and_get_code
from reparam_kernels.profiling import providers
from reparam_kernels.profiling.case import Case
from examples.why import memory
counted, why = memory.compare()
c = counted["torch.compile"]
print(why, c.kept, round(c.forward, 1), round(c.backward, 1))
case = Case("reparameterize_kl", (8, 256))
leaves = case.leaves()
f = providers.compiled(providers.eager(case), False)
_, codes = run_and_get_code(lambda: sum(y.sum() for y in f(*leaves)).backward())
print([len(re.findall(r"async_compile.cpp_pybinding", code)) for code in codes])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["None {'eps': 1.0} 4.0 6.0", "[1, 1]"]


# ---- digits of the KL


def test_precision_truth_matches_the_series():
    """The truth matches the KL's power series near collapse, and long doubles elsewhere."""

    def series(mu, logvar):
        m, v = mu.double(), logvar.double()
        return ((m**2 + v**2 / 2 + v**3 / 6 + v**4 / 24 + v**5 / 120) / 2).sum(-1)

    def wide(mu, logvar):
        m, v = (t.numpy().astype(np.longdouble) for t in (mu, logvar))
        return torch.tensor(((m**2 + np.expm1(v) - v) / 2).sum(-1).astype(np.float64))

    assert precision.error(series, 1e-4, torch.float32).largest < 1e-10
    for scale in (0.1, 1.0, 10.0):
        assert precision.error(wide, scale, torch.float32).largest < 1e-12


def test_the_usual_lines_lose_digits_where_ours_does_not():
    for scale, least in ((1e-4, 0.5), (1e-3, 5e-3), (1e-2, 5e-5)):
        for name, line in precision.LINES.items():
            largest = precision.error(line, scale, torch.float32).largest
            assert largest <= 1e-6 if name == "ours" else largest > least
    for name, line in precision.LINES.items():
        largest = precision.error(line, 10.0, torch.float16).largest
        assert largest <= 1e-6 if name == "ours" else largest == torch.inf


# ---- the command


def test_command_in_its_short_form_draws_every_picture(tmp_path):
    command = [sys.executable, "-m", "examples.why_reparameterize", "--short", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {p.stem for p in tmp_path.glob("*.png")} == PICTURES
    for word in ("no grad_fn", "closed form", "held-out ELBO", "seed=7: True", "left out: not asked for"):
        assert word in done.stdout
    assert re.search(r"torch.randn_like: .*mismatch", done.stdout)


def test_committed_pictures_are_those_of_the_command_and_light():
    pictures = {p.stem: p for p in (ROOT / "docs/pictures").glob("*.png")}
    assert set(pictures) >= PICTURES
    for name in PICTURES:
        data = pictures[name].read_bytes()
        assert len(data) < 200_000
        assert 1000 < int.from_bytes(data[16:20], "big") < 1600  # the width, in pixels
