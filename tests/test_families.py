"""In each family's script, the original code and ours give the same first step, and training uses the latents."""

import importlib
import re
import runpy
import sys

import pytest
import torch
from torch.nn.functional import binary_cross_entropy

import reparam_kernels as rk
from examples.vae.data import load

FAMILIES = ("plain", "distributions", "hierarchical", "packed", "recurrent", "total_correlation")
WAYS = [(family, way) for family in FAMILIES for way in ("before", "after")] + [("packed", "adapter")]


@pytest.fixture(scope="module")
def digits():
    return load()


@pytest.fixture
def one_noise(monkeypatch):
    """Replace torch's draws by ours, so that the original code and ours get the same eps."""
    normal = torch.distributions.normal
    monkeypatch.setattr(torch, "randn", rk.randn)
    monkeypatch.setattr(torch, "randn_like", lambda t: rk.randn(t.shape, dtype=t.dtype))
    monkeypatch.setattr(normal, "_standard_normal", lambda shape, dtype, device: rk.randn(shape, dtype=dtype))


def first_step(family, way, x, scale):
    """Return loss, ELBO and the gradient of every weight, for fixed weights and a fixed generator."""
    script = importlib.import_module(f"examples.families.{family}")
    make = script.RSSM if family == "recurrent" else script.VAE
    if family == "distributions":
        way = {"before": "TorchNormal", "after": "Normal"}[way]
    torch.manual_seed(0)
    model = make(getattr(script, way)).to(x.dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    terms = model(x)
    terms.loss.backward()
    return *terms, {name: weight.grad for name, weight in model.named_parameters()}


# With the initial weights, free bits clamp the KL of the hierarchy's upper layer; with doubled weights, no KL.
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize(("family", "way"), WAYS)
def test_first_step_matches_the_original_code_in_float64(digits, one_noise, family, way, scale):
    x = digits.train[:64]
    loss, elbo, gradients = first_step(family, way, x, scale)
    true_loss, true_elbo, true_gradients = first_step(family, "before", x.double(), scale)
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-6)
    assert elbo.item() == pytest.approx(true_elbo.item(), rel=1e-6)
    for name, true in true_gradients.items():
        if (family, name, scale) != ("hierarchical", "p2", 1):  # its only gradient is from the clamped KL
            assert true.abs().max() > 0, name
        error = (gradients[name].double() - true).abs().max()
        assert error <= 5e-6 * true.abs().max(), name


def test_adapter_z_bits_match_the_original_code():
    from examples.families import packed

    moments = torch.randn(8, 8, 2, 2)
    torch.manual_seed(1)
    z = packed.before(moments)[0]
    torch.manual_seed(1)
    assert torch.equal(packed.adapter(moments)[0], z)


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_training_raises_the_held_out_elbo(digits, monkeypatch, capsys, family, way):
    """The ELBO exceeds that of the mean image, which is the bound of a decoder that ignores z."""
    mean_image = digits.train.mean(0).expand_as(digits.test)
    without_z = -binary_cross_entropy(mean_image, digits.test, reduction="none").sum(1).mean().item()
    module = f"examples.families.{family}"
    flags = [] if way == "after" else [f"--{way}"]
    monkeypatch.setattr(sys, "argv", [module, "--epochs", "10" if way == "after" else "1", *flags])
    monkeypatch.delitem(sys.modules, module, raising=False)  # run_module warns of a module that is there already
    runpy.run_module(module, run_name="__main__")
    said = re.fullmatch(rf"{way}: held-out ELBO (\S+) at the start, (\S+) at the end, .*\n", capsys.readouterr().out)
    start, end = map(float, said.groups())
    assert end > (without_z if way == "after" else start + 1)
