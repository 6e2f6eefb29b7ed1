"""What each provider must compute, by torch.distributions in float64. A wrong provider gets no number."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from . import measure
from .case import Case
from .providers import Function, mixture

CHECKED_POINTS = 64  # of a mixture, since the truth takes a tensor of all pairs


def checked(
    case: Case, functions: dict[str, Function], leaves: list[Tensor], option: str
) -> dict[str, dict[str, Callable[[], Any]]]:
    """Check each provider, and return its passes, each of which has run once, and so compiled.

    If a provider cannot run, the message names the option without which it is not asked for.
    """
    made = {}
    for name, f in functions.items():
        try:
            check(case, name, f, leaves)
            made[name] = measure.passes(f, leaves)
            for call in made[name].values():
                call()
        except AssertionError as error:
            raise SystemExit(f"{name} is wrong, so nothing is measured: {error}") from error
        except RuntimeError as error:
            if name in ("ours", "ours again"):
                raise
            lines = [line.strip() for line in str(error).splitlines()]
            why = next((line for line in lines if line and not line.endswith("raised:")), "")  # torch.compile's header
            raise SystemExit(
                f"{name}: must run here; got {type(error).__name__}: {why.rstrip('.')}. Leave it out ({option})."
            ) from error
    return made


def check(case: Case, name: str, f: Function, leaves: list[Tensor]) -> None:
    """Raise if a provider is wrong: z must have its mean and variance, and the other outputs their values."""
    if case.squash and case.dtype in (torch.float16, torch.bfloat16):
        # A rounded tanh does not tell the z of which log q is taken, so the same function is checked in float32.
        case, leaves = case._replace(dtype=torch.float32), [t.detach().float() for t in leaves]
    with torch.no_grad():
        out = f(*leaves)
    half = case.dtype in (torch.float16, torch.bfloat16)
    wide = [t.detach().double() for t in case.split(tuple(leaves))]
    values, u = list(out), None
    if case.draws:
        u = values.pop(0).double()
        if case.squash:
            limit = 1 - torch.finfo(case.dtype).eps / 4  # for a z that rounds to 1
            u = torch.atanh(u.clamp(-limit, limit))
        eps = (u - wide[0]) / case.sigma(wide[1])
        n = eps.numel()
        mean, variance = abs(eps.mean()), abs(eps.var() - 1) if n > 1 else 0.0
        if not (mean <= 5 / n**0.5 + 1e-2 * half and variance <= 5 * (2 / n) ** 0.5 + 1e-2 * half):
            raise AssertionError(f"{name}: z must have mean mu and variance sigma^2; got another")
    rtol = 3e-2 if half else 1e-3 if case.squash else 1e-4
    for value, want in zip(values, expected(case, wide, u), strict=True):
        torch.testing.assert_close(value[: len(want)].double(), want, rtol=rtol, atol=1e-2, msg=f"{name}: {case.op}")


def expected(case: Case, wide: list[Tensor], u: Tensor | None) -> list[Tensor]:
    """Return what an op gives beside z. u is z before it is squashed."""
    if case.op == "mixture_log_prob":
        q = Normal(wide[1], case.sigma(wide[2]))
        return [mixture(q, of).log_prob(wide[0][:CHECKED_POINTS]) for of in case.parts()]
    if case.op == "reparameterize":
        return []
    mu, x, *prior = wide
    q = Normal(mu, case.sigma(x))
    p = Normal(prior[0], case.sigma(prior[1])) if prior else Normal(torch.zeros_like(mu), torch.ones_like(mu))
    if u is None or case.op == "reparameterize_kl":
        return [kl_divergence(q, p).sum(case.dims)]
    value = q.log_prob(u)
    if case.squash:
        value = value - torch.log1p(-(torch.tanh(u) ** 2))
    if case.op == "reparameterize_mc_kl":
        value = value - p.log_prob(u)
    return [value.sum(case.dims)]
