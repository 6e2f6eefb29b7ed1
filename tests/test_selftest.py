"""The self-test passes if the backend is correct, and names what is wrong if it is not."""

import os
import subprocess
import sys

import pytest
import torch
from triton.runtime import interpreter

import reparam_kernels as rk
from reparam_kernels import selftest
from tests.conftest import forget, use_backend

pytestmark = pytest.mark.usefixtures("says_where")

CPU = torch.device("cpu")


@pytest.mark.parametrize("check", selftest.CHECKS, ids=lambda check: check.__name__)
def test_every_check_passes_or_says_why_it_cannot_run(backend, check):
    if check is selftest.roots and backend == "cpu":
        with pytest.raises(selftest.Skip, match="processor's own"):
            list(check(CPU))
    elif check.__name__ in ("large", "graph", "streams", "second_device", "launches"):
        with pytest.raises(selftest.Skip, match="CUDA"):
            list(check(CPU))
    else:
        assert list(check(CPU)) == []


def test_a_wrong_bit_is_found(monkeypatch):
    right = rk.randn

    def wrong(*args, **options):
        out = right(*args, **options)
        out.view(-1)[0] *= 1 + 2**-23
        return out

    monkeypatch.setattr(rk, "randn", wrong)
    eps = next(r for r in selftest.run(CPU) if r.name == "eps")
    assert eps.verdict == "FAILED"
    assert "1 of " in eps.detail


def test_a_wrong_gradient_and_a_wrong_z_are_found(monkeypatch):
    right = rk.reparameterize_kl

    def wrong(mu, x, **options):
        z, kl = right(mu, x, **options)
        return z + x * 1e-3, kl

    monkeypatch.setattr(rk, "reparameterize_kl", wrong)
    by_check = {r.name: r for r in selftest.run(CPU)}
    assert by_check["z"].verdict == by_check["gradients"].verdict == "FAILED"
    assert "other bits" in by_check["z"].detail
    assert "dx" in by_check["gradients"].detail


def test_a_wrong_density_and_a_wrong_gradient_of_it_are_found(monkeypatch):
    """1e-3 of the path by way of z, and of one component."""
    right, right_mixture = rk.reparameterize_log_prob, rk.mixture_log_prob

    def wrong(mu, x, **options):
        z, log_q = right(mu, x, **options)
        return z, log_q + 1e-3 * (z.sum(-1) - z.detach().sum(-1))

    monkeypatch.setattr(rk, "reparameterize_log_prob", wrong)
    monkeypatch.setattr(
        rk,
        "mixture_log_prob",
        lambda z, mu, x, **options: right_mixture(z, torch.cat([mu[:1] + 0.1, mu[1:]]), x, **options),
    )
    by_check = {r.name: r for r in selftest.run(CPU)}
    assert by_check["log_densities"].verdict == by_check["mixture"].verdict == "FAILED"
    assert "dmu, plain" in by_check["log_densities"].detail
    assert "log_q" not in by_check["log_densities"].detail
    assert "joint" in by_check["mixture"].detail


def test_a_wrong_square_root_is_found(monkeypatch):
    right = selftest.sqrt_of

    def wrong(x):
        out = right(x)
        out[0] = torch.nextafter(out[0], torch.tensor(torch.inf))
        return out

    monkeypatch.setattr(selftest, "sqrt_of", wrong)
    use_backend(monkeypatch, "triton")
    try:
        assert list(selftest.roots(CPU)) == ["sqrt: 1 of 1061 elements have other bits"]
    finally:
        forget()


def test_no_launch_lets_the_compiler_contract(monkeypatch):
    """Contraction would change the bits, also in the kernels of the self-test."""
    launched = []
    real = interpreter.GridExecutor.__call__

    def record(self, *args, **options):
        launched.append((self.fn.__name__, options.get("enable_fp_fusion")))
        return real(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    use_backend(monkeypatch, "triton")
    try:
        for check in (selftest.words, selftest.roots):
            assert list(check(CPU)) == []
        rk.randn(5)
        mu, x = (torch.zeros(1, 2100, requires_grad=True) for _ in "ab")  # a row long enough to be summed in parts
        z, kl = rk.reparameterize_kl(mu, x)
        (z.sum() + kl.sum()).backward()
    finally:
        forget()
    names = {name for name, _ in launched}
    ops = {"randn_kernel", "forward_kernel", "row_sum_kernel", "backward_kernel"}
    assert names == {"words_kernel", "roots_kernel", *ops}
    assert all(fusion is False for _, fusion in launched)


def test_a_check_that_breaks_is_a_failure(monkeypatch):
    def broken(device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(selftest, "CHECKS", [broken])
    (result,) = selftest.run(CPU)
    assert (result.verdict, result.detail) == ("FAILED", "RuntimeError: out of memory")


def command(**env):
    full = {k: v for k, v in os.environ.items() if not k.startswith(("REPARAM_", "TRITON_"))} | env
    run = [sys.executable, "-m", "reparam_kernels", "selftest", "--device", "cpu"]
    return subprocess.run(run, capture_output=True, text=True, env=full)


def test_the_command_prints_a_table_and_exits_well():
    done = command()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "selftest of the cpu backend on cpu" in done.stdout
    assert "7 passed, 0 failed, 6 skipped" in done.stdout


def test_without_kernels_there_is_nothing_to_test():
    done = command(REPARAM_BACKEND="reference")
    assert done.returncode == 1
    assert "nothing to test" in done.stdout
