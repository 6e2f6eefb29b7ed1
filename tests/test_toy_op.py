"""tests/toy_op is an op in a folder; core/op.py derives autograd, compile and vmap from its record alone."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from tests.conftest import forget
from tests.toy_op import TOY, Arguments, Config, weighted_square

CASES = {
    "plain": lambda x, w: weighted_square(x, scale=3.0),
    "weight": lambda x, w: weighted_square(x, w),
    "expanded weight": lambda x, w: weighted_square(x, w[:1]),
    "one number": lambda x, w: weighted_square(x, w[0, 0], scale=0.5),
}
cases = pytest.mark.parametrize("f", CASES.values(), ids=CASES)


def leaves(dtype=torch.float64, requires_grad=True):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=g, dtype=dtype).t().requires_grad_(requires_grad) for _ in "xw"]


def gradients(f, tensors):
    return torch.autograd.grad(f(*tensors).sin().sum(), tensors, allow_unused=True, materialize_grads=True)


def test_the_kernels_give_the_formula():
    x, w = leaves()
    torch.testing.assert_close(weighted_square(x, w, scale=3.0), 3 * x**2 * w)
    assert "reparam_kernels::toy" in type(weighted_square(x, w).grad_fn).__name__


@cases
def test_gradcheck(f):
    assert gradcheck(f, leaves(), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, leaves(), check_batched_grad=True)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    x, w = leaves(requires_grad=requires_grad)
    for weight in (None, w.detach()[:1].requires_grad_(requires_grad)):
        flat = TOY.flatten(Arguments(x, weight, Config(2.0)))
        torch.library.opcheck(torch.ops.reparam_kernels.toy.default, flat)
        dy = torch.ones(4, 3, dtype=torch.float64).requires_grad_(requires_grad)
        wanted = [True, weight is not None]
        torch.library.opcheck(torch.ops.reparam_kernels.toy_backward.default, (*flat, dy, wanted))


@cases
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(f, backend):
    torch.compiler.reset()
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves()), f(*leaves()))
    torch.testing.assert_close(gradients(compiled, leaves()), gradients(f, leaves()))
    torch.compiler.reset()


@cases
def test_vmap_and_torch_func(f):
    x, w = (torch.stack([t, 2 * t]) for t in leaves(requires_grad=False))
    want = torch.stack([f(a, b) for a, b in zip(x, w, strict=True)])
    torch.testing.assert_close(torch.vmap(f)(x, w), want)
    got = torch.vmap(torch.func.grad(lambda a, b: f(a, b).sum()))(x, w)
    torch.testing.assert_close(got[0], torch.func.grad(lambda a, b: f(a, b).sum())(x[0], w[0]))


def test_fake_tensors_and_the_reference(monkeypatch):
    from reparam_kernels.core import backends

    with FakeTensorMode():
        assert weighted_square(torch.empty(4, 3)).shape == (4, 3)
    x, w = leaves()
    monkeypatch.setattr(backends, "FORCED", "reference")
    forget()
    assert type(weighted_square(x, w).grad_fn).__name__ == "MulBackward0"
    forget()


def test_errors_come_from_the_shared_checks():
    with pytest.raises(TypeError, match="weighted_square: x must be float16, bfloat16, float32 or float64; got int64"):
        weighted_square(torch.arange(3))
