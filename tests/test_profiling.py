"""`python -m reparam_kernels profile`: its providers are right, and its screens, files and errors are what it says."""

import importlib.util
import itertools
import json
import sys
from collections import Counter
from typing import NamedTuple

import pytest
import torch

import reparam_kernels as rk
from reparam_kernels.__main__ import main
from reparam_kernels.profiling import breakdown, launches, measure, module
from reparam_kernels.profiling.breakdown import PASSES
from reparam_kernels.profiling.case import Case
from reparam_kernels.profiling.providers import distributions, eager, ours
from tests.cases import PARAMS

QUICK = ("--shape", "6x4", "--rounds", "2")


class Screen(NamedTuple):
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process."""
    threads = torch.get_num_threads()

    def command(*options, code=0):
        monkeypatch.setattr(sys, "argv", ["reparam_kernels", "profile", *options])
        monkeypatch.setenv("COLUMNS", "80")
        try:
            got = main()
        except SystemExit as end:
            got = end.code
        screen = Screen(*capsys.readouterr())
        if isinstance(got, str):  # which Python prints
            screen, got = screen._replace(err=screen.err + got), 1
        assert got == code, screen.err
        return screen

    yield command
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("prior", "packed", "samples"), list(itertools.product([False, True], [False, True], [None, 3]))
)
@pytest.mark.parametrize("param", PARAMS)
def test_every_provider_computes_the_case(param, prior, packed, samples):
    case = Case("reparameterize_kl", (500, 4), param=param, samples=samples, prior=prior, packed=packed)
    leaves = case.leaves()
    mu, x, *p = (t.detach().double() for t in case.split(tuple(leaves)))
    want = rk.reference.kl_divergence(mu, x, prior=tuple(p) or None, param=param)
    sigma = {"logvar": (x / 2).exp(), "logstd": x.exp(), "std": x, "softplus": torch.nn.functional.softplus(x)}[param]
    for make in (ours, eager, distributions):
        z, kl = make(case)(*leaves)
        torch.testing.assert_close(kl.double(), want, rtol=1e-4, atol=1e-5)
        assert z.shape == ((samples,) if samples else ()) + case.shape
        eps = (z.double() - mu) / sigma
        assert abs(eps.mean()) < 5 / eps.numel() ** 0.5
        assert abs(eps.var() - 1) < 5 * (2 / eps.numel()) ** 0.5


@pytest.mark.parametrize("op", ["reparameterize_kl", "kl_divergence", "reparameterize_log_prob"])
def test_the_screen_fits_a_terminal_and_the_json_holds_its_numbers(run, op):
    screen = run(*QUICK, "--op", op, "--param", "softplus", "--min-std", "0.1")
    assert [line for line in screen.out.splitlines() if len(line) > 80] == []
    assert screen.err == ""
    for heading in (*PASSES, "memory", "where our time goes", "limits of the device"):
        assert f"\n{heading}" in screen.out
    found = json.loads(run(*QUICK, "--op", op, "--json").out)
    assert found["case"]["shape"] == [6, 4]
    for which in PASSES:
        assert set(found["seconds"][which]) == {"ours", "ours again", "eager", "distributions"}
        assert all(0 < q["q10"] <= q["q50"] <= q["q90"] for q in found["seconds"][which].values())
        parts = found["seconds_by_part"][which]
        assert sum(parts.values()) >= found["seconds"][which]["ours"]["q50"] * 0.999
    words = (2, 6) if op == "kl_divergence" else (3, 8)
    for which, word in zip(PASSES, words, strict=True):
        copied = found["least_seconds"][which]["copy"] * found["limits"]["copy_bytes"]
        assert copied == pytest.approx(word * 24 * 4)
    # eager keeps eps and sigma or their like, each a word an element; ours keeps the seed at most
    assert found["bytes_kept"]["ours"] <= 8
    assert found["bytes_kept"]["eager"] >= 24 * 4


def test_a_mixture_moves_its_points_and_components(run):
    found = json.loads(
        run("--op", "mixture_log_prob", "--of", "both", "--shape", "5x4x3", "--rounds", "2", "--json").out
    )
    inputs, dims = (5 + 2 * 4) * 3, 5 * 3  # and one word for each point
    for which, words in zip(PASSES, (inputs + dims, 3 * inputs + 2 * dims), strict=True):
        copied = found["least_seconds"][which]["copy"] * found["limits"]["copy_bytes"]
        assert copied == pytest.approx(words * 4)


def test_launches_and_the_next_command_are_shown_for_a_gpu(run, monkeypatch):
    """A stub counts, since there is no GPU."""
    counted = Counter({"forward_kernel": 1, "backward_kernel": 1, "void at::native::" + "x" * 99: 2})
    monkeypatch.setattr(breakdown, "launches", lambda call, device: counted)
    monkeypatch.setattr(launches, "own_kernels", lambda: {"forward_kernel", "backward_kernel"})
    screen = run(*QUICK).out
    assert "\n  ours                                           4                    4\n" in screen
    assert "'regex:^(backward_kernel|forward_kernel)$'" in screen
    assert screen.rstrip().endswith("python -m reparam_kernels profile --shape 6x4 --rounds 2 --rounds 1")
    assert [line for line in screen.splitlines() if len(line) > 80 and not line.startswith("ncu ")] == []


def test_picture_and_trace_are_written(run, tmp_path):
    picture, trace = tmp_path / "p.png", tmp_path / "t.json"
    run(*QUICK, "--picture", str(picture), "--trace", str(trace))
    assert picture.read_bytes()[:4] == b"\x89PNG"
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"reparam_kernels::latent", "reparam_kernels::latentBackward"} <= names


def test_without_matplotlib_only_a_picture_is_refused(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, p=None: None if n == "matplotlib" else find(n, p))
    assert "needs matplotlib" in run(*QUICK, "--picture", "p.png", code=2).err
    run(*QUICK)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--shape", "3xx"], "must be positive numbers with x between them, as 512x128; got '3xx'"),
        (["--shape", "0x4"], "must be positive numbers"),
        (["--rounds", "0"], "must be a positive whole number; got '0'"),
        (["--packed", "--shape", "5"], "--packed needs a shape of two or more dims"),
        (["--min-std", "0.1"], "--min-std needs --param softplus; got --param logvar"),
        (["--squash"], "--squash needs --op reparameterize_log_prob"),
        (["--of", "both"], "--of needs --op mixture_log_prob"),
        (["--op", "mixture_log_prob"], "a mixture needs a shape of points, components and dims, as 256x256x10"),
        (["--op", "reparameterize_mc_kl", "--packed"], "--packed needs a method of rk.DiagonalGaussian"),
        (["--picture", "p.svg"], "must be a .png file in a folder that exists; got 'p.svg'"),
        (["--trace", "no/folder/t.json"], "must be a .json file in a folder that exists"),
        (["--channels-last"], "--channels-last needs a shape of four or five dims; got 512x128"),
        (["--prior", "--op", "reparameterize"], "--prior needs an op with a KL"),
        (["--samples", "2", "--op", "kl_divergence"], "--samples needs an op that samples"),
        (["--device", "nonsense"], "--device: must be a device that torch can use here; got 'nonsense'"),
        (["--module", "m:f", "--shape", "3x4"], "--shape is for a shape; leave it out with --module"),
        (["--before", "m:f"], "--before needs --module, the step to compare with"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(run, options, error):
    assert error in " ".join(run(*options, code=2).err.split())


MODEL = """
import torch
import reparam_kernels as rk

def make():
    encoder, x = torch.nn.Linear(6, 8), torch.rand(3, 6)
    return lambda: sum(t.square().mean() for t in rk.reparameterize_kl(*encoder(x).chunk(2, -1)))

def number():
    return 3

def without_gradient():
    return lambda: torch.ones(())
"""


def test_a_module_is_profiled_and_a_wrong_one_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    screen = run("--module", "mine:make", "--rounds", "2").out
    assert "reparam_kernels::latent " in screen
    assert [line for line in screen.splitlines() if len(line) > 80] == []
    found = json.loads(run("--module", "mine:make", "--rounds", "2", "--json").out)
    assert found["ops"]["reparam_kernels::latent"]["calls"] == 1
    for spec, error in [
        ("mine", "must be package.module:make"),
        ("other:make", "must be importable"),
        ("mine:nothing", "must be importable"),
        ("mine:number", "returns the loss"),
        ("mine:without_gradient", "returns the loss"),
    ]:
        assert error in run("--module", spec, code=1).err


def test_a_step_is_measured_beside_the_one_before_a_change(run, tmp_path, monkeypatch):
    (tmp_path / "changed.py").write_text(MODEL)
    (tmp_path / "old.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    asked = ["--module", "changed:make", "--before", "old:make", "--rounds", "2"]
    screen = run(*asked).out
    assert [line for line in screen.splitlines() if len(line) > 80] == []
    assert "before " in screen
    assert "/ this step" in screen
    found = json.loads(run(*asked, "--json").out)
    assert found["before"]["bytes_kept"] == found["bytes_kept"] > 0
    assert set(found["before"]["seconds"]) == set(found["seconds"]) == {"forward", "forward+backward"}
    error = run("--module", "changed:make", "--before", "old:nothing", code=1).err
    assert "profile --before: old:nothing must be importable" in error


def test_bytes_kept_by_a_module_leave_out_its_parameters():
    weight, x = torch.rand(5, 4, requires_grad=True), torch.rand(3, 5)

    def loss():
        return torch.sin(x @ weight).sum()  # keeps x, weight and the product

    def before():
        return torch.sin(x @ weight).exp().sum()  # and the exponential

    assert {id(t) for t in module.parameters(loss())} == {id(weight)}
    p = module.profile(loss, before, torch.device("cpu"), 2, None)
    assert p.step.saved == 4 * (3 * 5 + 3 * 4)
    assert p.others["before"].saved == 4 * (3 * 5 + 2 * 3 * 4)


def test_what_a_sparse_tensor_keeps_is_counted():
    x = torch.eye(6).to_sparse()
    w = torch.ones(6, 8, requires_grad=True)
    dense = 6 * 4 + 2 * 6 * 8  # values and two int64 indices of each
    assert measure.saved_bytes(lambda w: (torch.sparse.mm(x, w),), [w]) == dense
