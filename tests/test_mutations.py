"""The adapters' tests fail if the noise is scaled, the gradient to sigma is dropped, or the KL is scaled."""

import pytest
import torch

from reparam_kernels import diagonal_gaussian
from reparam_kernels.core.execute import execute
from reparam_kernels.integrations import diffusers
from reparam_kernels.integrations.diffusers import DiagonalGaussianDistribution, OobleckDiagonalGaussianDistribution
from reparam_kernels.ops import latent
from reparam_kernels.ops.latent.arguments import unpacked
from tests import test_distributions, test_drop_in, test_integrations, test_losses_balancing


def scaled_noise(op, arguments):
    z, *others = execute(op, arguments)
    mu = unpacked(arguments)[0]
    return None if z is None else mu + 1.5 * (z - mu), *others


def no_gradient_to_sigma(op, arguments):
    mu, x = unpacked(arguments)
    if arguments.x is None:
        return execute(op, arguments._replace(mu=torch.cat([mu, x.detach()], arguments.config.packed)))
    return execute(op, arguments._replace(x=x.detach()))


def scaled_kl(op, arguments):
    z, kl, log_q = execute(op, arguments)
    return z, None if kl is None else 1.01 * kl, log_q


def sample(cls, noise="philox"):
    return lambda: test_integrations.test_sample_and_its_gradient("cpu", cls, torch.float32, noise)


def kl_and_nll():
    test_integrations.test_kl_and_nll("cpu", (3, 8, 4, 5), False, torch.float32)


def oobleck():
    test_integrations.test_oobleck_kl_with_and_without_its_bugs(torch.float32)


def both_ways():
    test_distributions.test_kl_is_registered_with_torch_normal_on_either_side(
        (test_distributions.Normal, torch.distributions.Normal), torch.float32
    )


def draws():
    test_distributions.test_draws_are_normal(torch.float32)


def draw_gradients():
    test_distributions.test_gradients_of_a_draw_are_one_and_eps("cpu")


def balancing():
    test_losses_balancing.test_balancing_splits_the_gradient({})


@pytest.mark.parametrize(
    ("mutation", "test"),
    [
        (scaled_noise, sample(DiagonalGaussianDistribution)),
        (scaled_noise, sample(OobleckDiagonalGaussianDistribution)),
        (scaled_noise, test_integrations.test_philox_has_one_seed_for_each_item),
        (scaled_noise, test_distributions.test_a_draw_matches_the_op_and_takes_one_seed),
        (scaled_noise, draws),
        (scaled_noise, test_drop_in.test_monte_carlo_kl_has_the_closed_form_as_mean),
        (no_gradient_to_sigma, sample(DiagonalGaussianDistribution)),
        (no_gradient_to_sigma, sample(OobleckDiagonalGaussianDistribution)),
        (no_gradient_to_sigma, kl_and_nll),
        (no_gradient_to_sigma, both_ways),
        (no_gradient_to_sigma, draw_gradients),
        (no_gradient_to_sigma, balancing),
        (scaled_kl, kl_and_nll),
        (scaled_kl, oobleck),
        (scaled_kl, both_ways),
        (scaled_kl, test_drop_in.test_every_reduction_in_use),
        (scaled_kl, balancing),
    ],
)
def test_op_mutants_are_caught(mutation, test, monkeypatch):
    torch.manual_seed(0)
    test()
    for module in (latent, diagonal_gaussian):
        monkeypatch.setattr(module, "execute", mutation)
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize("cls", [DiagonalGaussianDistribution, OobleckDiagonalGaussianDistribution])
def test_torch_noise_mutants_are_caught(cls, monkeypatch):
    test = sample(cls, "torch")
    test()
    with monkeypatch.context() as patch:
        randn = diffusers.randn
        patch.setattr(diffusers, "randn", lambda *args: 1.5 * randn(*args))
        with pytest.raises(AssertionError):
            test()
    with monkeypatch.context() as patch:
        std = vars(cls)["std"]
        patch.setattr(cls, "std", property(lambda self: std.wrapped(self).detach()))
        with pytest.raises(AssertionError):
            test()
