"""rk.testing.assert_same_training: the fused line trains as the plain one, and each wrong adapter is caught."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reparam_kernels as rk
from reparam_kernels.testing import assert_same_training


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 12))

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, -1)
        z, kl = self.latent(mu, logvar)
        return self.decoder(z), kl

    def latent(self, mu, logvar):
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        return z, -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1)


class Fused(VAE):
    def latent(self, mu, logvar):
        return rk.reparameterize_kl(mu, logvar)


def elbo(model, x):
    logits, kl = model(x)
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1).mean() + kl.mean()


@pytest.fixture
def batches():
    return torch.rand(8, 10, 12, generator=torch.Generator().manual_seed(1))


def latent(name):
    """A wrong adapter."""

    def wrong(self, mu, logvar):
        z, kl = rk.reparameterize_kl(mu, logvar)
        if name == "sigma = exp(logvar)":
            return rk.reparameterize(mu, logvar, param="logstd"), kl
        if name == "KL of each element":
            return z, rk.kl_divergence(mu, logvar, event_ndim=0)
        if name == "half of the KL":
            return z, kl / 2
        if name == "no gradient to mu":
            return rk.reparameterize(mu.detach(), logvar), kl  # a second draw, too
        if name == "KL detached":
            return z, kl.detach()
        raise AssertionError(name)

    return type("Wrong", (VAE,), {"latent": wrong})()


def test_the_fused_model_trains_alike_and_nothing_is_left_changed(batches):
    torch.manual_seed(0)
    before, after = VAE(), Fused()
    held = [{n: p.clone() for n, p in model.state_dict().items()} for model in (before, after)]
    state = torch.get_rng_state()
    report = assert_same_training(before, after, batches, elbo)
    assert len(report.before) == len(report.after) == len(batches)
    assert report.before[-1] < report.before[0]
    assert 0 < report.largest.difference <= report.largest.allowed
    assert torch.equal(torch.get_rng_state(), state)
    for model, values in zip((before, after), held, strict=True):
        assert all(torch.equal(p, values[n]) for n, p in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("sigma = exp(logvar)", "same random tensors"),
        ("KL of each element", "loss"),
        ("half of the KL", "loss"),
        ("no gradient to mu", "same random tensors"),
        ("KL detached", "the gradient of encoder"),
    ],
)
def test_a_wrong_adapter_is_caught_in_the_first_step(batches, name, quantity):
    with pytest.raises(AssertionError, match=quantity):
        assert_same_training(VAE(), latent(name), batches[:1], elbo)


def test_losses_that_differ_by_a_constant_are_named_as_such(batches):
    with pytest.raises(AssertionError, match="The gradients agree: the losses differ by a constant"):
        assert_same_training(VAE(), VAE(), batches[:1], elbo, lambda model, batch: elbo(model, batch) + 3.676)


DRAWS = {
    "randn": lambda mu: torch.randn(4, 5),
    "randn of a size": lambda mu: torch.randn(size=(4, 5), dtype=torch.float32),
    "randn_like": lambda mu: torch.randn_like(mu, memory_format=torch.preserve_format),
    "normal": lambda mu: torch.normal(torch.zeros(5), torch.ones(4, 1)),
    "normal of a size": lambda mu: torch.normal(0.0, 1.0, (4, 5)),
    "normal_": lambda mu: torch.empty_like(mu).normal_(),
    "distribution": lambda mu: torch.distributions.Normal(torch.zeros_like(mu), 1.0).rsample(),
    "sample of a distribution": lambda mu: torch.distributions.Normal(torch.zeros_like(mu), 1.0).sample(),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_every_way_to_draw_normals_gets_the_noise_of_the_ops(draw):
    def plain(model, x):
        mu, x = model(x).chunk(2, -1)
        return (mu + x.exp() * DRAWS[draw](mu)).square().sum()

    def fused(model, x):
        return rk.reparameterize(*model(x).chunk(2, -1), param="logstd").square().sum()

    model = nn.Linear(3, 10)
    assert_same_training(model, model, torch.ones(2, 4, 3), plain, fused, optimizer=torch.optim.SGD)


def test_several_samples_and_noise_drawn_before_or_after_dropout():
    def plain(model, x):
        mu, logvar = F.dropout(model(x), 0.5).chunk(2, -1)
        return (mu + (0.5 * logvar).exp() * torch.randn(3, 4, 5)).square().sum()

    def noise_first(model, x):
        eps = torch.randn(3, 4, 5)
        return rk.reparameterize(*F.dropout(model(x), 0.5).chunk(2, -1), sample_shape=(3,), eps=eps).square().sum()

    def fused(model, x):
        return rk.reparameterize(*F.dropout(model(x), 0.5).chunk(2, -1), sample_shape=(3,)).square().sum()

    model = nn.Linear(3, 10)
    for after in (noise_first, fused):
        assert_same_training(model, model, torch.ones(2, 4, 3), plain, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_have_their_own_yardstick(batches, dtype):
    assert_same_training(VAE().to(dtype), Fused().to(dtype), batches.to(dtype), elbo)
    wrong = latent("half of the KL").to(dtype)
    with pytest.raises(AssertionError, match="loss"):
        assert_same_training(VAE().to(dtype), wrong, batches.to(dtype), elbo)


def test_errors_say_what_must_hold(batches):
    with pytest.raises(ValueError, match="an item for each step"):
        assert_same_training(VAE(), Fused(), [], elbo)
    with pytest.raises(RuntimeError, match="Missing key"):
        assert_same_training(nn.Linear(2, 3), VAE(), batches, elbo)


class KeepsItsLatent(torch.nn.Module):
    """Keeps tensors of a forward call, as code of graph autoencoders does, and a constant that is no buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.adjacency = torch.nn.Linear(4, 6), torch.eye(5)

    def forward(self, x):
        start = torch.zeros(5, 3)
        self.z, kl = rk.reparameterize_kl(*(self.adjacency @ self.layer(x)).chunk(2, -1))
        self.kept = [start + self.z]
        return (self.kept[0].square().sum(-1) + kl).mean()


def test_a_model_that_keeps_tensors_of_a_call_can_be_compared_and_checked():
    torch.manual_seed(0)
    model, x = KeepsItsLatent(), torch.rand(5, 4)
    model(x)
    z = model.z
    rk.testing.assert_same_training(model, model, [x, x], lambda m, x: m(x))
    assert rk.testing.gradcheck(model, x).wrong == []
    assert model.z is z
    assert model.adjacency.dtype == torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("draw", ["init", "out"])
def test_every_way_to_draw_a_normal_is_shared(draw):
    def old(model, x):
        mu, logvar = model(x).chunk(2, -1)
        eps = torch.zeros_like(mu)
        if draw == "init":
            torch.nn.init.normal_(eps)
        else:
            torch.randn(mu.shape, out=eps)
        return (mu + (logvar / 2).exp() * eps).sum()

    def new(model, x):
        return rk.reparameterize(*model(x).chunk(2, -1)).sum()

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 6)
    rk.testing.assert_same_training(model, model, [torch.randn(4, 3)] * 3, old, new)
