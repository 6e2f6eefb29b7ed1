"""The benchmark writes its rows, bounds and charts, and gives no number to a wrong provider."""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributions as d

from bench import charts, steps
from bench.__main__ import PARTS
from reparam_kernels.profiling import bench, launches, measure, options, truth
from reparam_kernels.profiling.case import Case
from reparam_kernels.profiling.providers import PROVIDERS, distributions, eager, matmul, ours, providers

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "reparam_kernels", "bench"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "results.csv"
    cases = ["--op", "latent", "kl", "joint", "noise", "--dtype", "float32", "bfloat16"]
    command = [*COMMAND, "--quick", *cases, "--rounds", "2", "--csv", str(out)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    with open(out, newline="") as file:
        return out, done, list(csv.DictReader(file))


def test_every_case_has_a_row_with_its_conditions(run):
    _, _, rows = run
    cases = {(r["op"], r["pass"], r["dtype"], r["provider"]) for r in rows}
    for dtype in ("float32", "bfloat16"):
        assert ("noise", "forward", dtype, "torch.randn") in cases
        for op in ("latent", "kl", "joint"):
            for which in ("forward", "forward with grad", "forward+backward"):
                for peer in ("ours", "ours again", "eager", "distributions", *["matmul"] * (op == "joint")):
                    assert (op, which, dtype, peer) in cases
    for r in rows:
        assert 0 < float(r["us_q10"]) <= float(r["us_q50"]) <= float(r["us_q90"])
        assert r["shape"] == ("64x64x10" if r["op"] == "joint" else "128x20")
        assert (r["torch"], r["backend"], r["caches"]) == (torch.__version__, "cpu", "warm")
        assert r["commit"]
        assert float(r["copy_gb_s"]) > 0


def test_ratios_and_bounds_are_those_of_the_times(run):
    _, _, rows = run
    own = [r for r in rows if (r["op"], r["pass"], r["dtype"]) == ("latent", "forward", "float32")]
    by = {r["provider"]: r for r in own}
    time = float(by["ours"]["us_q50"])
    assert float(by["eager"]["ratio_to_ours"]) == pytest.approx(float(by["eager"]["us_q50"]) / time)
    least = 3 * 4 * 128 * 20 / (float(by["ours"]["copy_gb_s"]) * 1e3)
    assert float(by["ours"]["of_bandwidth"]) == pytest.approx(least / time)
    assert float(by["ours"]["of_noise"]) == pytest.approx(float(by["noise alone"]["us_q50"]) / time)


def test_saved_bytes_are_the_seed_and_three_words_of_eager(run):
    _, _, rows = run
    saved = {r["provider"]: int(r["saved_bytes"]) for r in rows if r["saved_bytes"]
             and r["op"] == "latent" and r["dtype"] == "float32"}  # fmt: skip
    assert saved["ours"] == 8
    assert saved["eager"] == 3 * 4 * 128 * 20


def test_the_screen_fits_a_terminal_and_charts_are_drawn_from_the_rows(run, tmp_path):
    path, done, _ = run
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert done.stderr == f"{path}\n"
    for heading in ("latent, 128x20, float32", "joint, 64x64x10, bfloat16", "noise, 128x20, float32"):
        assert f"\n\n{heading}\n" in done.stdout
    charts.draw([r for r in charts.read(path) if r["op"] in ("latent", "noise") and r["dtype"] == "float32"], tmp_path)
    for name in ("throughput_latent_float32", "ratio_latent_float32", "throughput_noise_float32", "memory"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_run_without_kernels_or_git(tmp_path):
    """Plain torch is not measured as ours. A machine without git gives the version in place of the commit."""
    command = [*COMMAND, "--op", "kl", "--shape", "8x4", "--rounds", "2", "--quick", "--csv", str(tmp_path / "r.csv")]
    env = {key: value for key, value in os.environ.items() if key != "PATH"} | {"PATH": str(tmp_path)}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=env)
    with open(tmp_path / "r.csv", newline="") as file:
        assert {row["commit"] for row in csv.DictReader(file)} == {options.rk.__version__}
    (tmp_path / "r.csv").unlink()
    env = {**os.environ, "REPARAM_BACKEND": "reference"}
    for refused in (command, [*COMMAND[:3], "profile"], [*COMMAND[:2], "bench.scaling"]):
        done = subprocess.run(refused, cwd=ROOT, capture_output=True, text=True, env=env)
        assert done.returncode == 1
        assert "the kernels must run on cpu; got plain torch. `python -m reparam_kernels` says why." in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "r.csv").exists()


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (["--op", "foo"], "invalid choice: 'foo'"),
        (["--providers", "foo"], "invalid choice: 'foo'"),
        (["--shape", "32,64"], "must be positive numbers with x between them, as 512x128; got '32,64'"),
        (["--shape", "512x128", "--op", "both"], "--op both: a mixture needs a shape of points, components and dims"),
        (["--op", "packed", "--shape", "5"], "--op packed: --packed needs a shape of two or more dims; got 5"),
        (["--device", "hip"], "--device: must be a device that torch can use here; got 'hip': "),
        (["--device", "meta"], "the kernels must run on meta; got plain torch."),
        (["--rounds", "0"], "must be a positive whole number; got '0'"),
        (["--csv", "no/folder/r.csv"], "must be a .csv file in a folder that exists; got 'no/folder/r.csv'"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(monkeypatch, capsys, asked, error):
    from reparam_kernels.__main__ import main

    monkeypatch.setattr(sys, "argv", ["reparam_kernels", "bench", *asked])
    with pytest.raises(SystemExit) as end:
        main()
    assert error in " ".join((capsys.readouterr().err + str(end.value)).split())


CASES = {name: Case(shape=(40, 300), **asked) for name, asked in bench.OPS.items() if "rand" not in asked["op"]}
CASES |= {name: case._replace(shape=(40, 30, 10)) for name, case in CASES.items() if "mixture" in case.op}
CASES["images"] = CASES["images"]._replace(shape=(40, 3, 10, 10))
CASES |= {f"{name} with prior": CASES[name]._replace(prior=True) for name in ("kl", "mc_kl")}


@pytest.mark.parametrize("param", ["logvar", "softplus"])
@pytest.mark.parametrize("name", CASES)
def test_every_provider_computes_the_op(name, param):
    case = CASES[name]._replace(param=param)
    made = [ours(case), eager(case), distributions(case), *([matmul(case)] if name == "joint" else [])]
    for f in made:
        truth.check(case, "one", f, case.leaves())


def test_a_wrong_provider_gets_no_number():
    """The truth is torch.distributions'; each output of each op is wrong by a little once."""
    for name, case in CASES.items():
        leaves, right = case.leaves(), eager(case)
        for i in range(len(right(*leaves))):

            def wrong(*leaves, right=right, i=i, case=case):
                out = list(right(*leaves))
                mean = leaves[0].chunk(2, 1)[0] if case.packed else leaves[0]
                sampled = i == 0 and case.draws
                out[i] = mean + 1.2 * (out[i] - mean) if sampled else out[i] * 1.01 + 0.02
                return tuple(out)

            with pytest.raises(AssertionError, match=name):
                truth.check(case, name, wrong, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tanh_of_a_half_is_checked_too(dtype):
    for shape in ((64, 4096), (256, 6)):
        case = Case("reparameterize_log_prob", shape, dtype, squash=True)
        for f in (ours(case), eager(case), distributions(case)):
            truth.check(case, "one", f, case.leaves())
        with pytest.raises(AssertionError):
            truth.check(case, "wrong", lambda *leaves, f=f: (f(*leaves)[0], 1.01 * f(*leaves)[1]), case.leaves())


def test_the_truth_of_a_squashed_sample_is_torchs_transformed_distribution():
    case = Case("reparameterize_log_prob", (1, 2), squash=True)
    q = d.TransformedDistribution(d.Normal(0.0, 1.0), d.TanhTransform())
    u = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    one = case._replace(dtype=torch.float64)
    (got,) = truth.expected(one, [torch.zeros_like(u), torch.zeros_like(u)], u)
    assert got.item() == pytest.approx(q.log_prob(torch.tanh(u)).sum().item(), rel=1e-6)


def test_without_noise_there_is_one_way_to_compile_and_only_a_joint_mixture_has_matmul():
    for name, case in CASES.items():
        made = set(providers(case, PROVIDERS))
        assert ("compile fallback" in made) == case.draws
        assert ("matmul" in made) == (name == "joint")


def test_a_provider_that_cannot_run_is_named_with_the_option():
    def broken(*_):
        raise RuntimeError("backend raised:\n\nno compiler.\nand more")

    case = Case("kl_divergence", (4, 3))
    with pytest.raises(
        SystemExit, match=r"compile: must run here; got RuntimeError: no compiler\. Leave it out \(--compile"
    ):
        truth.checked(case, {"ours": ours(case), "compile": broken}, case.leaves(), "--compile")


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
    with (
        mock.patch.object(torch.cuda, "set_device") as set_device,
        mock.patch.object(options, "kernels", return_value="triton"),
    ):
        for name in ("cpu", "cuda", "cuda:1"):
            options.start("bench", torch.device(name), torch.get_num_threads())
    set_device.assert_called_once_with(torch.device("cuda:1"))


def test_launches_are_the_events_of_the_device(monkeypatch):
    def event(name, device, annotation=False):
        return mock.Mock(**{"device_type": device, "is_user_annotation": annotation}, **{"name": name})

    kinds = launches.DeviceType
    events = []
    for name, device, annotation in [
        ("aten::randn", kinds.CPU, False),
        ("cudaLaunchKernel", kinds.CPU, False),
        ("forward_kernel", kinds.CUDA, False),
        ("forward_kernel", kinds.CUDA, False),
        ("Memset (Device)", kinds.CUDA, False),
        ("reparam_kernels::latent", kinds.CUDA, True),
    ]:
        made = event(name, device, annotation)
        made.name = name  # Mock's own keyword
        events.append(made)
    counted = launches.counted(events)
    assert counted == {"forward_kernel": 2, "Memset (Device)": 1}
    assert launches.launches(lambda: None, torch.device("cpu")) == {}
    monkeypatch.setattr(launches, "own_kernels", lambda: {"forward_kernel", "backward_kernel"})
    line = launches.ncu(counted, ["profile", "--shape", "3x4"])
    assert "'regex:^(forward_kernel)$'" in line
    assert line.endswith("python -m reparam_kernels profile --shape 3x4 --rounds 1")
    assert launches.ncu({"Memset (Device)"}, []) is None


def test_the_kernels_of_the_package_are_known_by_name():
    import reparam_kernels.ops.latent.triton
    import reparam_kernels.ops.mixture.triton
    import reparam_kernels.ops.noise.triton  # noqa: F401

    found = launches.own_kernels()
    assert {"forward_kernel", "density_backward_kernel", "row_sum_kernel", "joint_kernel", "randn_kernel"} <= found
    assert not {"load_latent", "exp2"} & found


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
        steps.call(name, impl, "meta")()
    assert made == ["meta"]


@pytest.mark.parametrize("name", ["TC-VAE, batch 1024", "VDVAE block", "50 recurrent steps, one KL"])
def test_both_ways_of_a_step_have_the_same_loss(name, monkeypatch):
    """Each sample is the mean."""
    monkeypatch.setattr(steps, "sample", lambda impl, mu, x: mu)
    monkeypatch.setattr(steps, "sample_kl", lambda impl, mu, x, *prior: (mu, steps.kl_of(impl, mu, x, *prior)))
    loss, eager_loss = (steps.STEPS[name](impl, "cpu").loss().item() for impl in ("ours", "eager"))
    assert loss == pytest.approx(eager_loss, rel=1e-5)


@pytest.mark.parametrize(("backend", "said"), [("cpu", "C++ kernels, avx2"), ("triton", "Triton kernels")])
def test_chart_titles_name_the_backend_that_ran(backend, said):
    known = {"machine": "M", "backend": backend, "isa": "avx2", "threads": 1, "torch": "2"}
    assert charts.caption(known) == f"M, {said}, 1 thread, torch 2"


def test_peak_is_that_of_the_largest_moment():
    def call():
        a = torch.ones(1 << 16)
        b = a + 1
        del a
        return b * 2

    assert measure.peak_bytes(call, "cpu") == pytest.approx(2 * 4 << 16, rel=1e-3)  # and a few scalars


def test_each_part_of_the_results_is_a_command_that_exists():
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    commands = [line.partition("] ")[2].split() for line in done.stdout.splitlines()]
    assert len(commands) == len(PARTS)
    for command in commands:
        module, *rest = command[1:] if "=" in command[0] else command
        assert (ROOT / f"{module.replace('.', '/')}{'/__main__' * (module == 'reparam_kernels')}.py").exists()
        if module == "reparam_kernels":
            parser = argparse.ArgumentParser()
            bench.add_command(parser.add_subparsers())
            rest[rest.index("--csv") + 1] = "r.csv"
            assert parser.parse_args(rest).op


def test_the_pages_tables_are_the_committed_results():
    assert subprocess.run([sys.executable, "-m", "bench.pages", "--check"], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_host_time_is_measured_at_a_stub_driver_and_inside_torch_compile():
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host", "--repeats", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for part in ("launch", "sample", "compiled"):
        assert found[part]
        for figures in found[part].values():
            assert all(us > 0 for us in figures["us"].values())


@pytest.mark.slow
def test_the_scaling_is_measured(tmp_path):
    command = [sys.executable, "-m", "bench.scaling", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with open(tmp_path / "scaling.csv", newline="") as file:
        assert {row["kind"] for row in csv.DictReader(file)} >= {"size", "row length", "threads"}
