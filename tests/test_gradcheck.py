"""rk.testing.gradcheck: right gradients pass, wrong ones are found and named, kinks and dropout are no errors."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import reparam_kernels as rk
from reparam_kernels.testing import gradcheck


class WrongBackward(torch.autograd.Function):
    """The identity, with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


@dataclasses.dataclass
class Output:
    reconstruction: torch.Tensor
    kl: torch.Tensor


class Model(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.decoder = nn.Linear(4, 6)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        h = checkpoint(self.encoder, x, use_reentrant=False)
        z, kl = rk.reparameterize_kl(*self.head(h).chunk(2, -1))
        return {"output": [Output(self.decoder(WrongBackward.apply(z, self.factor)), kl)], "steps": 3}


def test_a_model_with_noise_dropout_and_buffers_passes_and_stays_as_it_is():
    torch.manual_seed(0)
    model, x = Model(), torch.rand(5, 6, requires_grad=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    report = gradcheck(model, x)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {s.tensor for s in report.slopes} == {"input 0"} | trained
    assert max(s.mismatch for s in report.slopes) < 1e-5
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert x.grad is None
    assert x.dtype == torch.float32


@pytest.mark.parametrize("factor", [0.0, 0.99, -1.0])
def test_a_wrong_gradient_is_named_with_the_parameters_that_it_reaches(factor):
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="gradients must equal finite differences") as caught:
        gradcheck(Model(factor), torch.rand(5, 6))
    wrong = {line.split()[1].rstrip(",") for line in str(caught.value).splitlines() if line.startswith("wrong:")}
    assert wrong
    assert not {"decoder.weight", "decoder.bias"} & wrong


class HeldInLists(nn.Module):
    """Layers in a plain list whose parameters are registered besides, and a parameter that is in a list too."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.layers = [nn.Linear(3, 8)]
        self.registered = nn.ParameterList(self.layers[0].parameters())
        self.w = nn.Parameter(torch.randn(8, 8))
        self.weights = [self.w]
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = self.layers[0](x) @ WrongBackward.apply(self.weights[0], self.factor)
        return rk.reparameterize_kl(*h.chunk(2, -1))


def test_a_parameter_is_checked_wherever_the_model_holds_it():
    torch.manual_seed(0)
    report = gradcheck(HeldInLists(1.0), torch.rand(2, 3))
    assert report.not_reached == ("unused",)
    assert "not reached by autograd: unused" in str(report)
    used = [s for s in report.slopes if s.tensor != "unused"]
    assert all(s.numerical != 0 for s in used)
    with pytest.raises(AssertionError) as caught:
        gradcheck(HeldInLists(50.0), torch.rand(2, 3))
    wrong = {line.split()[1].rstrip(",") for line in str(caught.value).splitlines() if line.startswith("wrong:")}
    assert wrong == {"w"}


def test_slopes_are_those_of_the_closed_form():
    x = torch.tensor([[0.5, -2.0], [3.0, 0.0]], requires_grad=True)
    for s in gradcheck(lambda t: (t**3).sum(), x).slopes:
        if s.entry is not None:
            want = 3 * x[s.entry].item() ** 2
            assert s.autograd == pytest.approx(want)
            assert s.numerical == pytest.approx(want, abs=1e-6)


def test_a_kink_is_no_error_and_a_wrong_slope_at_a_kink_is():
    at_kink = torch.zeros(3, requires_grad=True)
    assert {s.verdict for s in gradcheck(lambda t: t.relu().sum(), at_kink).slopes} == {"kink"}
    with pytest.raises(AssertionError, match="wrong"):
        gradcheck(lambda t: WrongBackward.apply(t.relu() + t, 3.0).sum(), at_kink)
    beside_kink = torch.full((3,), 3e-7, dtype=torch.float64, requires_grad=True)
    assert {s.verdict for s in gradcheck(lambda t: t.abs().sum(), beside_kink).slopes} == {"equal"}


def test_errors_say_what_must_hold():
    x = torch.ones(3, requires_grad=True)
    other = torch.Generator()
    with pytest.raises(ValueError, match="must require a gradient"):
        gradcheck(torch.sin, torch.ones(3))
    with pytest.raises(ValueError, match="same value for the same seed"):
        gradcheck(lambda t: t * torch.rand(3, generator=other), x)
    with pytest.raises(ValueError, match="must be finite"):
        gradcheck(lambda t: t / 0, x)
    with pytest.raises(TypeError, match="output 1 is torch"):
        gradcheck(lambda t: (t, t.float()), x)
    with pytest.raises(TypeError, match="floating output"):
        gradcheck(lambda t: "text", x)
