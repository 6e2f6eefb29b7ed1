"""Shared by the op tests: inputs for any option, and exact results in float64."""

import sys
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import reparam_kernels as rk
from reparam_kernels import reference

PARAMS = ("logvar", "logstd", "std", "softplus")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(), (1,), (7,), (4, 5), (128, 20), (3, 1), (2, 3, 5), (2, 4, 3, 3), (2, 2, 2, 3, 5), (2, 1029), (1, 5000)]
EMPTY = [(0,), (0, 5), (4, 0), (2, 0, 3)]
UNIT = {torch.float32: 2**-24, torch.float64: 2**-53, torch.bfloat16: 2**-9, torch.float16: 2**-12}

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks or preloads")


class Inputs(NamedTuple):
    mu: torch.Tensor
    x: torch.Tensor


def inputs(shape, dtype=torch.float32, param="logvar", scale=1.0, seed=0, requires_grad=False):
    """mu and a second argument that is valid for param, both exact in dtype."""
    g = torch.Generator().manual_seed(seed)
    mu = torch.randn(shape, generator=g, dtype=torch.float64) * scale
    x = torch.randn(shape, generator=g, dtype=torch.float64) * scale
    if param == "std":
        x = x.exp() if scale >= 1 else 1 + x
    return Inputs(*(t.to(dtype).requires_grad_(requires_grad) for t in (mu, x)))


@contextmanager
def copies_refused(numel):
    """Let a copy of a tensor with this many elements, or more, fail."""

    def guarded(copy):
        def checked(t, *args, **kwargs):
            assert t.numel() < numel, "a copy"
            return copy(t, *args, **kwargs)

        return checked

    with pytest.MonkeyPatch.context() as patch:
        for name in ("contiguous", "clone", "copy_"):
            patch.setattr(torch.Tensor, name, guarded(getattr(torch.Tensor, name)))
        yield


def sigma_of(x, param, min_std=0.0):
    return {"logvar": (x / 2).exp(), "logstd": x.exp(), "std": x, "softplus": F.softplus(x) + min_std}[param]


def double(value):
    """The same numbers in float64, as autograd leaves."""
    if isinstance(value, (tuple, list)):
        return tuple(double(v) for v in value)
    if isinstance(value, torch.Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def truth(mu, x, eps, **options):
    """Compute z and kl by the reference in float64, with the same eps as the call."""
    prior = options.pop("prior", None)
    wide = double((mu, x))
    prior = None if prior is None else double(prior)
    return wide, prior, reference.reparameterize_kl(*wide, eps=eps.double(), prior=prior, **options)


def noise(z_shape, seed, samples=()):
    """Draw the eps of a call by the public function, which puts the samples behind the items of per-item seeds."""
    if isinstance(seed, torch.Tensor) and seed.numel() > 1:
        items = len(samples)
        per_item = rk.randn(seed.numel(), *samples, *z_shape[items + 1 :], seed=seed)
        return per_item.movedim(0, items)
    return rk.randn(z_shape, seed=seed)


def assert_near(got, want, units=4.0, rtol=0.0, atol=0.0):
    """Check that got is within a few rounding units of its dtype, with NaN and inf only if want has them."""
    torch.testing.assert_close(
        got.double(), want.double(), rtol=max(rtol, units * UNIT[got.dtype]), atol=atol, equal_nan=True
    )
