"""The outputs of each registered op have the sizes, strides, dtypes and devices that its fake promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from reparam_kernels.core.execute import execute
from reparam_kernels.core.formats import format_of
from reparam_kernels.ops.latent.arguments import make_arguments
from reparam_kernels.ops.latent.op import LATENT
from tests.test_properties import DEPTH, QUIET, calls, laid_out

pytestmark = pytest.mark.usefixtures("says_where")

OPS = torch.ops.reparam_kernels
ASKED = {
    "reparameterize": {"z": True},
    "kl_divergence": {"kl": True},
    "reparameterize_kl": {"z": True, "kl": True},
    "packed": {"z": True, "kl": True},
}


def forward_arguments(op, leaves, options):
    """Make the arguments of the forward op from a drawn call."""
    if "mu_p" in leaves:
        options = {**options, "prior": (leaves["mu_p"], leaves["x_p"])}
    inputs = (leaves["moments"], None) if op == "packed" else (leaves["mu"], leaves["x"])
    call = make_arguments("test", *inputs, packed=leaves.get("dim"), **ASKED[op], **options)
    return call, LATENT.flatten(call)


@st.composite
def op_calls(draw):
    """Draw an op, and arguments of any layout, option, seed and sample shape."""
    if draw(st.integers(0, 5)) == 0:
        seeds, samples = draw(st.integers(1, 4)), draw(st.integers(0, 3))
        size = [samples, seeds, *draw(st.lists(st.integers(0, 5), max_size=2))]
        return OPS.noise.default, (torch.arange(seeds), size, samples)
    op, leaves, options, dz, dkl = draw(calls())
    call, args = forward_arguments(op, leaves, options)
    if draw(st.booleans()):
        return OPS.latent.default, args
    wanted = [t is not None and draw(st.booleans()) for t in call[:4]]
    return OPS.latent_backward.default, (*args, dz, dkl, None, wanted)


def described(tensors):
    tensors = tensors if isinstance(tensors, (tuple, list)) else [tensors]
    return [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors]


def faked(mode, args):
    return [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]


def test_real_outputs_are_as_the_fake_says(backend):
    @settings(QUIET, max_examples=DEPTH * (300 if backend == "cpu" else 25))
    @given(op_calls())
    def explore(op_call):
        op, args = op_call
        real = described(op(*args))
        with FakeTensorMode() as mode:
            assert described(op(*faked(mode, args))) == real

    explore()


def test_opcheck_passes_over_any_layout(backend):
    checked = []
    most = 10_000 if backend == "cpu" else 40  # elements, since opcheck calls an op a dozen times

    @settings(QUIET, max_examples=DEPTH * 25)
    @given(op_calls(), st.booleans())
    def explore(op_call, requires_grad):
        op, args = op_call[0], list(op_call[1])
        sizes = [a.numel() for a in args if isinstance(a, torch.Tensor)]
        sizes += [math.prod(args[1])] if op is OPS.noise.default else []
        if min(sizes) == 0 or max(sizes) > most:
            return  # opcheck itself cannot clone a tensor without elements; the test above has them
        checked.append(op)
        if requires_grad and op is not OPS.noise.default and (op is OPS.latent.default or any(args[-1])):
            args[:4] = [a if a is None else a.detach().requires_grad_() for a in args[:4]]
        torch.library.opcheck(op, args)

    explore()
    assert len(checked) > 5


def test_outputs_of_the_formula_have_the_format_of_mu_under_transforms():
    """They are contiguous unless mu is channels_last, so that z.view works inside a transform as well as outside."""

    @settings(QUIET, max_examples=60 * DEPTH)
    @given(st.data())
    def explore(data):
        shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
        samples = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
        mu, x = (data.draw(laid_out(shape, torch.float32)) for _ in range(2))
        seed = torch.arange(shape[0]) if data.draw(st.booleans()) else 7
        call = make_arguments("test", mu, x, z=True, kl=True, seed=seed, sample_shape=samples, event_ndim=0)

        def both(m, v):
            z, kl, _ = execute(LATENT, call._replace(mu=m, x=v))
            return z, kl

        for outputs in (
            both(mu, x),
            torch.func.vjp(both, mu, x)[0],
            torch.func.jvp(both, (mu.clone(), x.clone()), (x, mu))[0],  # a dual number may not overlap itself
            [t[0] for t in torch.vmap(both)(mu[None], x[None])],
        ):
            for t, whole in zip(outputs, (not samples, True), strict=True):
                assert t.is_contiguous(memory_format=format_of(mu) if whole else torch.contiguous_format)

    explore()


def test_a_gradient_has_the_metadata_of_its_input(backend):
    """dmu, dx, dmu_p and dx_p have the shape, the dtype and, if it is channels_last, the format of their inputs."""

    @settings(QUIET, max_examples=DEPTH * (100 if backend == "cpu" else 20))
    @given(calls())
    def explore(drawn):
        op, leaves, options, dz, dkl = drawn
        tensors = {n: t.detach().requires_grad_() for n, t in leaves.items() if isinstance(t, torch.Tensor)}
        call, _ = forward_arguments(op, {**leaves, **tensors}, options)
        grads = LATENT.gradients(call, (dz, dkl, None), [t is not None for t in call[:4]])
        for grad, like in zip(grads, call[:4], strict=True):
            if grad is not None and like is not None:
                assert (grad.shape, grad.dtype, grad.device) == (like.shape, like.dtype, like.device)
                assert grad.is_contiguous(memory_format=format_of(like))

    explore()
