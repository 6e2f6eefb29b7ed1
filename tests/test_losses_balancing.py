"""rk.losses.balanced_kl: its value, and how it splits the gradient."""

import pytest
import torch

import reparam_kernels as rk
from reparam_kernels import losses

pytestmark = pytest.mark.usefixtures("says_where")

MU = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LOGVAR = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
MU_P = torch.randn(4, generator=torch.Generator().manual_seed(2))
LOGVAR_P = torch.randn(4, generator=torch.Generator().manual_seed(3))


def true_kl():
    p, q = (torch.distributions.Normal(m.double(), (x.double() / 2).exp()) for m, x in ((MU_P, LOGVAR_P), (MU, LOGVAR)))
    return torch.distributions.kl_divergence(q, p).sum(-1)


@pytest.mark.parametrize("options", [{}, {"to_prior": 0.5, "to_posterior": 0.1, "floor": 2.0}], ids=str)
def test_balancing_splits_the_gradient(options):
    def leaves():
        return [t.clone().requires_grad_() for t in (MU, LOGVAR, MU_P, LOGVAR_P)]

    mu, logvar, mu_p, logvar_p = ours = leaves()
    kl = losses.balanced_kl(mu, logvar, (mu_p, logvar_p), **options)
    kl.sum().backward()
    mu, logvar, mu_p, logvar_p = plain = leaves()
    whole = rk.kl_divergence(mu, logvar, prior=(mu_p, logvar_p))
    floor = options.get("floor", 0.0)
    to_prior, to_posterior = options.get("to_prior", 0.8), options.get("to_posterior", 0.2)
    rows = true_kl()
    torch.testing.assert_close(kl.double(), (to_prior + to_posterior) * rows.clamp(min=floor), rtol=1e-5, atol=0.0)
    assert floor == 0 or rows.min() < floor < rows.max()
    whole.clamp(min=floor).sum().backward()
    for o, p, weight in zip(ours, plain, [to_posterior, to_posterior, to_prior, to_prior], strict=True):
        assert o.grad is not None
        torch.testing.assert_close(o.grad, weight * p.grad, rtol=1e-5, atol=1e-6)


def test_the_parts_of_a_balanced_kl_are_its_terms_each_with_one_gradient():
    mu, logvar, mu_p, logvar_p = leaves = [t.clone().requires_grad_() for t in (MU, LOGVAR, MU_P, LOGVAR_P)]
    options = {"to_prior": 0.5, "to_posterior": 0.1, "floor": 2.0}
    parts = losses.balanced_kl(mu, logvar, (mu_p, logvar_p), return_parts=True, **options)
    want = true_kl()
    torch.testing.assert_close(parts.value.double(), want, rtol=1e-5, atol=0.0)
    assert not parts.value.requires_grad
    for part in (parts.dyn, parts.rep):
        torch.testing.assert_close(part.double(), want.clamp(min=2.0), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(parts.loss, 0.5 * parts.dyn + 0.1 * parts.rep)
    assert torch.equal(parts.loss, losses.balanced_kl(*leaves[:2], tuple(leaves[2:]), **options))
    for part, own in ((parts.dyn, {2, 3}), (parts.rep, {0, 1})):
        grads = torch.autograd.grad(part.sum(), leaves, allow_unused=True)
        assert {i for i, g in enumerate(grads) if g is not None and g.abs().sum() > 0} == own
