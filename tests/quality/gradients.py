"""Means of the gradients over many samples against closed forms, through the kernels, forward and backward."""

import math

import torch
from scipy import stats

import reparam_kernels as rk

from .results import Result

# f, then dE/dmu and dE/dsigma of E f(z), z ~ N(mu, sigma^2)
FUNCTIONS = {
    "z^2": (lambda z: z * z, lambda m, s: 2 * m, lambda m, s: 2 * s),
    "z^3": (lambda z: z**3, lambda m, s: 3 * m * m + 3 * s * s, lambda m, s: 6 * m * s),
    "cos z": (
        torch.cos,
        lambda m, s: -math.sin(m) * math.exp(-s * s / 2),
        lambda m, s: -s * math.cos(m) * math.exp(-s * s / 2),
    ),
}
# x of a sigma, and dsigma/dx
PARAMS = {
    "logvar": (lambda s: 2 * math.log(s), lambda s: s / 2),
    "logstd": (math.log, lambda s: s),
    "std": (lambda s: s, lambda s: 1.0),
    "softplus": (lambda s: math.log(math.expm1(s)), lambda s: -math.expm1(-s)),
}


def gradients(n, wrong=1.0):
    """d(E f(z) + KL): n items of one sample, and items of 1024 samples that backward sums in the kernel. A control
    takes the closed form `wrong` by a factor."""
    seed = 10**6
    for mu, sigma in ((0.5, 0.6), (-1.2, 1.35)):
        for param, (of_sigma, slope) in PARAMS.items():
            for label, (f, dmu, dsigma) in FUNCTIONS.items():
                expected = dmu(mu, sigma) + mu, (dsigma(mu, sigma) + sigma - 1 / sigma) * slope(sigma)
                for samples in (1, 1024):
                    leaves = [torch.full((n // samples,), v, requires_grad=True) for v in (mu, of_sigma(sigma))]
                    z, kl = rk.reparameterize_kl(*leaves, seed=seed, sample_shape=(samples,), event_ndim=0, param=param)
                    seed += 1
                    (f(z).sum() / samples + kl.sum()).backward()
                    for leaf, closed, of in zip(leaves, expected, ("mu", param), strict=True):
                        test = stats.ttest_1samp(leaf.grad.double().numpy(), closed * wrong)
                        name = f"d/d{of}, {label}, mu {mu}, sigma {sigma}, {param}, {samples} a sum"
                        mean = leaf.grad.double().mean().item()
                        yield Result("gradients", name, n, float(test.pvalue), f"{mean:.6f} for {closed:.6f}")
