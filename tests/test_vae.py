"""The reference VAE learns, resumes to the same numbers, and agrees with its two other implementations."""

import csv
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.vae.data import load
from examples.vae.parity import final_elbos, gap_in_errors
from examples.vae.training import Options, train

SHORT = Options(epochs=3, hidden=32)


@pytest.fixture(scope="module")
def digits():
    return load()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_training_raises_the_held_out_elbo(digits, likelihood):
    _, history = train(digits, replace(SHORT, likelihood=likelihood), quiet=True)
    assert history[-1]["held_out"] > history[0]["held_out"]
    last = history[-1]
    assert last["elbo"] == pytest.approx(-last["reconstruction"] - last["kl"])


def test_resume_continues_to_the_same_numbers(digits, tmp_path):
    for impl in ("kernels", "plain"):
        whole_model, whole = train(digits, replace(SHORT, impl=impl, epochs=4), tmp_path / "whole.pt", quiet=True)
        train(digits, replace(SHORT, impl=impl, epochs=2), tmp_path / "half.pt", quiet=True)
        torch.randn(100)  # whatever happens between the two runs
        model, resumed = train(digits, replace(SHORT, impl=impl, epochs=4), tmp_path / "half.pt", True, quiet=True)
        assert resumed == whole
        for a, b in zip(model.parameters(), whole_model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_resume_with_other_options_is_refused(digits, tmp_path):
    train(digits, replace(SHORT, epochs=1), tmp_path / "c.pt", quiet=True)
    with pytest.raises(ValueError, match="must have been trained with the same options; got another lr"):
        train(digits, replace(SHORT, lr=1.0), tmp_path / "c.pt", resume=True, quiet=True)


def test_reference_gives_the_same_curve_to_rounding(digits):
    _, ours = train(digits, replace(SHORT, epochs=5), quiet=True)
    _, theirs = train(digits, replace(SHORT, epochs=5, impl="reference"), quiet=True)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_held_out_elbo_agrees_with_the_tutorial_vae(digits):
    """The bound is a two-sided test at 0.1 % with ten degrees of freedom, and it must have power."""
    elbos_by_impl = final_elbos(digits, replace(SHORT, epochs=6), range(6))
    assert abs(gap_in_errors(elbos_by_impl)) < 4.6
    elbos_by_impl["kernels"] = [elbo + 2.0 for elbo in elbos_by_impl["kernels"]]
    assert abs(gap_in_errors(elbos_by_impl)) > 4.6


def run(*arguments, processes=None):
    command = [sys.executable, "-W", "ignore"]
    if processes is not None:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return subprocess.run([*command, "-m", "examples.vae", *map(str, arguments)], capture_output=True, text=True)


def check_that_processes_do_not_change_the_losses(digits, folder, processes):
    """70 of the last batch's rows are fewer than the others, so the processes share them unevenly."""
    options = replace(SHORT, epochs=2, hidden=16, batch=123)
    given = ("--epochs", 2, "--hidden", 16, "--batch", 123, "--out", folder)
    done = run("--distributed", *given, processes=processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images to train on") == done.stdout.count("pictures:") == 1
    _, want = train(digits, options, quiet=True)
    with open(folder / "kernels.csv") as file:
        got = list(csv.DictReader(file))
    for row, wanted in zip(got, want, strict=True):
        assert {name: float(value) for name, value in row.items()} == pytest.approx(wanted, rel=1e-6)


def test_two_processes_do_not_change_the_losses(digits, tmp_path):
    check_that_processes_do_not_change_the_losses(digits, tmp_path, 2)


@pytest.mark.distributed
def test_four_processes_do_not_change_the_losses(digits, tmp_path):
    check_that_processes_do_not_change_the_losses(digits, tmp_path, 4)


def test_distributed_training_needs_torchrun_and_noise_that_does_not_depend_on_it():
    for arguments, words in (
        ([], "must be started by torchrun"),
        (["--impl", "plain"], "must be kernels or reference"),
    ):
        done = run("--distributed", *arguments)
        assert done.returncode != 0
        assert words in done.stderr


def test_command_draws_its_pictures(tmp_path):
    done = run("--impl", "both", "--epochs", 2, "--hidden", 16, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    names = {"curves", "reconstructions", "samples", "manifold", "kernels_and_reference"}
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in done.stdout
    assert len((tmp_path / "kernels.csv").read_text().splitlines()) == 3


def test_command_takes_images_from_a_file(tmp_path):
    np.savez(tmp_path / "mine.npz", x=(np.random.default_rng(0).random((40, 5, 6)) * 255).astype(np.uint8))
    done = run("--data", tmp_path / "mine.npz", "--epochs", 1, "--latent", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32 images to train on, 8 held out, 5 x 6 pixels" in done.stdout


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((4, 3))}, r"must be \(N, H, W\)"),
        ({"a": np.ones((4, 2, 2)), "b": np.ones(4)}, "must hold one array, or images named x"),
        ({"x": np.full((4, 2, 2), np.nan)}, "pixels must be finite"),
    ],
)
def test_bad_images_are_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "bad.npz")
