"""Outputs of 32 MB and more ask the system for huge pages before they are written; smaller ones do not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reparam_kernels as rk
from tests.cases import linux

SIZE = 2**23 + 5  # float32 elements of more than 32 MB

pytestmark = [
    linux,
    pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"),
]


def asks_for_huge_pages(t):
    """Return whether a page well inside a tensor is advised so; a gradient of moments is two outputs."""
    at, inside = t.data_ptr() + t.nbytes // 4, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name:
            first, last = (int(part, 16) for part in name.split("-"))
            inside = first <= at < last
        elif inside and name == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("the tensor's memory must be mapped")


@pytest.fixture
def fresh(monkeypatch):
    """Leave outputs unwritten, as outside of the tests."""
    monkeypatch.undo()


def test_large_outputs_ask_for_huge_pages(fresh):
    mu, x = torch.zeros(SIZE, requires_grad=True), torch.zeros(SIZE, requires_grad=True)
    z = rk.reparameterize(mu, x, seed=1)
    kl = rk.kl_divergence(mu, x, event_ndim=0)
    grads = torch.autograd.grad((z, kl), (mu, x), (torch.ones(SIZE), torch.ones(SIZE)))
    packed = torch.zeros(2, SIZE, requires_grad=True)
    moments_z = rk.DiagonalGaussian.from_moments(packed, dim=0).rsample(seed=1)
    (moments_grad,) = torch.autograd.grad(moments_z, packed, torch.ones(1, SIZE))
    outputs = (z, kl, *grads, moments_z, moments_grad, rk.randn(SIZE, seed=1))
    assert all(map(asks_for_huge_pages, outputs))
    assert not asks_for_huge_pages(torch.zeros(SIZE))


def test_smaller_outputs_do_not():
    """In a fresh process, whose heap does not reuse memory that a large output once had."""
    code = """
from tests.test_huge_pages import *
mu = torch.zeros(SIZE // 2)
assert not asks_for_huge_pages(rk.reparameterize(mu, mu, seed=1))"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)
