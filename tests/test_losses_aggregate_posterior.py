"""The losses of the aggregate posterior, against the definitions of the paper and an enumeration."""

import math
from itertools import permutations

import pytest
import torch
from torch.distributions import Normal

import reparam_kernels as rk


def test_the_three_parts_add_up_to_the_kl_integrand():
    g = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(8, 3, generator=g), torch.randn(8, 3, generator=g)
    z = rk.reparameterize(mu, logvar, seed=1)
    log_qzx, log_pz = Normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(1), Normal(0.0, 1.0).log_prob(z).sum(1)
    weights = rk.losses.stratified_log_weights(8, 100)
    log_qz, log_qz_dims = rk.mixture_log_prob(z, mu, logvar, log_weights=weights, of="both")
    mi, tc, dwkl = rk.losses.total_correlation(log_qzx, log_qz, log_qz_dims, log_pz)
    torch.testing.assert_close(mi + tc + dwkl, log_qzx - log_pz)
    torch.testing.assert_close(mi, log_qzx - log_qz)
    torch.testing.assert_close(dwkl, log_qz_dims.sum(1) - log_pz)


def test_one_factorised_component_has_no_total_correlation():
    z, mu, logvar = torch.randn(5, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    log_qz, dims = rk.mixture_log_prob(z, mu, logvar, of="both")
    mi, tc, dwkl = rk.losses.total_correlation(log_qz, log_qz, dims, log_qz)
    for part in (mi, tc, dwkl):
        torch.testing.assert_close(part, torch.zeros(5), rtol=0, atol=2e-6)


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_stratified_weights_are_unbiased_over_all_minibatches(batch):
    n_data = 5
    g = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(n_data, 2, generator=g).double(), torch.randn(n_data, 2, generator=g).double()
    z = torch.zeros(1, 2).double()
    truth = rk.mixture_log_prob(z, mu, logvar).exp()
    weights = rk.losses.stratified_log_weights(batch, n_data).double()
    torch.testing.assert_close(weights.exp().sum(1), torch.ones(batch).double(), rtol=0, atol=1e-6)
    for row in range(batch):
        estimates = []
        for others in permutations(range(1, n_data), batch - 1):
            chosen = [*others[:row], 0, *others[row:]]  # point 0 is the one that z belongs to
            estimates.append(rk.mixture_log_prob(z, mu[chosen], logvar[chosen], log_weights=weights[row]).exp())
        torch.testing.assert_close(torch.stack(estimates).mean(0), truth, rtol=1e-6, atol=0)


def test_minibatch_weights():
    assert rk.losses.minibatch_log_weights(4, 100) == pytest.approx(math.log(1 / 400))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rk.losses.stratified_log_weights(1, 10), "batch must lie in [2, n_data]; got batch 1, n_data 10."),
        (lambda: rk.losses.minibatch_log_weights(11, 10), "batch must lie in [1, n_data]; got batch 11, n_data 10."),
        (
            lambda: rk.losses.total_correlation(*(torch.zeros(s) for s in ((4,), (4,), (4, 2), (4, 2)))),
            "log_qzx, log_qz and log_pz must have one shape, with which log_qz_dims begins; "
            "got (4,), (4,), (4, 2) and (4, 2).",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    assert message in str(error.value)
