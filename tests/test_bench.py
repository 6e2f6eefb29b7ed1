"""The benchmark writes its rows, bounds and charts, and gives no number to a wrong provider."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench import charts, providers, steps
from bench.__main__ import make_current
from reparam_kernels.profiling import measure

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    cases = ["--op", "latent", "kl", "noise", "--size", "64x32", "16x8", "--dtype", "float32", "bfloat16"]
    command = [sys.executable, "-m", "bench", "--quick", *cases, "--rounds", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    with open(out / "results.csv", newline="") as file:
        return out, done, list(csv.DictReader(file))


def test_every_case_has_a_row_with_its_conditions(run):
    _, _, rows = run
    cases = {(r["op"], r["pass"], r["size"], r["dtype"], r["provider"]) for r in rows}
    for size in ("64x32", "16x8"):
        for dtype in ("float32", "bfloat16"):
            assert ("noise", "forward", size, dtype, "torch.randn") in cases
            for which in ("forward", "forward with grad", "forward+backward"):
                for peer in ("ours", "ours again", "eager", "distributions"):
                    assert ("latent", which, size, dtype, peer) in cases
                    assert ("kl", which, size, dtype, peer) in cases
    for r in rows:
        assert 0 < float(r["us_q10"]) <= float(r["us_q50"]) <= float(r["us_q90"])
        assert r["torch"] == torch.__version__
        assert r["backend"] == "cpu"
        assert r["commit"]
        assert float(r["copy_gb_s"]) > 0


def test_plain_torch_is_not_measured_as_ours(tmp_path):
    command = [sys.executable, "-m", "bench", "--op", "kl", "--size", "8x4", "--quick", "--out", str(tmp_path / "out")]
    env = {**os.environ, "REPARAM_BACKEND": "reference"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.startswith("bench: the kernels must run on cpu; got plain torch.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("backend", "said"), [("cpu", "C++ kernels, avx2"), ("triton", "Triton kernels")])
def test_chart_titles_name_the_backend_that_ran(backend, said):
    known = {"machine": "M", "backend": backend, "isa": "avx2", "threads": 1, "torch": "2"}
    assert charts.caption(known) == f"M, {said}, 1 thread, torch 2"


def test_a_run_survives_a_machine_without_git(tmp_path):
    command = [sys.executable, "-m", "bench", "--op", "kl", "--size", "8x4", "--rounds", "2", "--quick"]
    env = {key: value for key, value in os.environ.items() if key != "PATH"} | {"PATH": str(tmp_path)}
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, capture_output=True, env=env)
    with open(tmp_path / "results.csv", newline="") as file:
        assert {row["commit"] for row in csv.DictReader(file)} == {"unknown"}


def test_cold_turns_run_another_provider_before_each_timed_call():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    with mock.patch.object(measure, "once", return_value=(1.0, 1.0)):  # one timed call a turn
        *_, timings = measure.interleave(calls, 5, "cpu", cold=True)
    turns = order[3 * len(calls) :]  # after the warm-up
    assert len(turns) == 2 * 5 * len(calls)
    assert all(other != timed for other, timed in zip(turns[::2], turns[1::2], strict=True))
    assert sorted(turns[1::2]) == sorted("abc" * 5)
    assert set(timings) == set("abc")


def test_a_device_with_an_index_is_made_the_current_one():
    with mock.patch.object(torch.cuda, "set_device") as set_device:
        for name in ("cpu", "cuda", "cuda:1"):
            make_current(torch.device(name))
    set_device.assert_called_once_with(torch.device("cuda:1"))


@pytest.mark.parametrize("name", steps.STEPS)
@pytest.mark.parametrize("impl", ["ours", "eager"])
def test_a_step_runs_on_the_device_that_it_is_given(name, impl):
    """The tensors are on meta, so one left on the CPU raises."""
    made = []
    backward = torch.Tensor.backward

    def record(self, *args, **options):
        made.append(self.device.type)
        return backward(self, *args, **options)

    with mock.patch.object(torch.Tensor, "backward", record):
        steps.STEPS[name](impl, "meta")()
    assert made == ["meta"]


def test_ratios_and_bounds_are_those_of_the_times(run):
    _, _, rows = run
    own = [r for r in rows if (r["op"], r["pass"], r["size"], r["dtype"]) == ("latent", "forward", "64x32", "float32")]
    by = {r["provider"]: r for r in own}
    ours = float(by["ours"]["us_q50"])
    assert float(by["eager"]["ratio_to_ours"]) == pytest.approx(float(by["eager"]["us_q50"]) / ours)
    least = 3 * 4 * 64 * 32 / (float(by["ours"]["copy_gb_s"]) * 1e3)
    assert float(by["ours"]["of_bandwidth"]) == pytest.approx(least / ours)
    assert float(by["ours"]["of_noise"]) == pytest.approx(float(by["noise alone"]["us_q50"]) / ours)


def test_saved_bytes_are_the_seed_and_three_words_of_eager(run):
    _, _, rows = run
    saved = {r["provider"]: int(r["saved_bytes"]) for r in rows if r["saved_bytes"] and r["size"] == "64x32"
             and r["op"] == "latent" and r["dtype"] == "float32"}  # fmt: skip
    assert saved["ours"] == 8
    assert saved["eager"] == 3 * 4 * 64 * 32


def test_it_prints_a_table_and_draws_charts(run):
    out, done, _ = run
    assert "ours, us" in done.stdout
    assert "USDT" not in done.stderr
    for name in ("throughput_latent_float32", "ratio_latent_bfloat16", "throughput_noise_float32", "memory"):
        assert (out / f"{name}.png").stat().st_size > 10_000


def test_a_wrong_provider_gets_no_number():
    op = providers.OPS["latent"]
    leaves = op.inputs((64, 64), torch.float32, "cpu")
    measure.check("right", op.eager, leaves, op.truth)

    def wrong_noise(mu, x):
        z, kl = op.eager(mu, x)
        return mu + 1.2 * (z - mu), kl

    def wrong_kl(mu, x):
        z, kl = op.eager(mu, x)
        return z, kl * 1.01

    for wrong in (wrong_noise, wrong_kl):
        with pytest.raises(AssertionError):
            measure.check("wrong", wrong, leaves, op.truth)


def test_peak_is_that_of_the_largest_moment():
    def call():
        a = torch.ones(1 << 16)
        b = a + 1
        del a
        return b * 2

    assert measure.peak_bytes(call, "cpu") == pytest.approx(2 * 4 << 16, rel=1e-3)  # and a few scalars


def test_the_pages_tables_are_the_committed_results():
    assert subprocess.run([sys.executable, "-m", "bench.pages", "--check"], cwd=ROOT).returncode == 0
