"""A Gaussian posterior as an object. Packed encoder outputs are read in place and get their gradient in one tensor."""

import math
from typing import Any

import torch
from torch import Tensor

from .core import checks
from .core.dtypes import compute_dtype
from .core.execute import execute
from .ops.latent.arguments import Arguments, Density, make_arguments, unpacked
from .ops.latent.formula import log_sigma, sigma_of
from .ops.latent.op import LATENT


class DiagonalGaussian:
    """N(mu, sigma^2) with independent elements, as a VAE's encoder gives it.

        z = mu + sigma * eps,  kl = KL(N(mu, sigma^2) || other)

    Args:
        mu, logvar, event_ndim, param, min_std, clamp: as for reparameterize_kl; event_ndim also says what log_prob
            sums over.

    Raises:
        TypeError, ValueError: as reparameterize_kl.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, appendix B and C.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> q = rk.DiagonalGaussian.from_moments(torch.zeros(2, 8, 4, 4))
        >>> q.rsample().shape, q.kl()
        (torch.Size([2, 4, 4, 4]), tensor([0., 0.]))
    """

    def __init__(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        event_ndim: int | None = None,
        param: str = "logvar",
        min_std: float = 0.0,
        clamp: tuple[float, float] | None = None,
    ) -> None:
        self._parts: tuple[Tensor, Tensor | None, int | None] = (mu, logvar, None)
        self._options: dict[str, Any] = {"param": param, "min_std": min_std, "clamp": clamp}
        self._event_ndim = event_ndim
        self._view = self._arguments(kl=True)

    @classmethod
    def from_moments(
        cls,
        moments: Tensor,
        dim: int = 1,
        *,
        event_ndim: int | None = None,
        param: str = "logvar",
        min_std: float = 0.0,
        clamp: tuple[float, float] | None = None,
    ) -> "DiagonalGaussian":
        """Make the posterior of a packed encoder output: mu is the first half of `dim`, logvar the second."""
        where = "DiagonalGaussian.from_moments"
        checks.floating(where, "moments", moments)
        if not -moments.dim() <= dim < moments.dim() or moments.shape[dim] % 2:
            raise ValueError(
                f"{where}: moments must have an even size in dim {dim}; got shape {tuple(moments.shape)}. "
                "Let the encoder's last layer give twice the latent channels."
            )
        self = cls.__new__(cls)
        self._parts = (moments, None, dim % moments.dim())
        self._options = {"param": param, "min_std": min_std, "clamp": clamp}
        self._event_ndim = event_ndim
        self._view = self._arguments(kl=True)
        return self

    def _arguments(self, **asked: Any) -> Arguments:
        mu, x, packed = self._parts
        if asked.get("kl") or asked.get("density"):
            asked["event_ndim"] = self._event_ndim
        return make_arguments("DiagonalGaussian", mu, x, packed=packed, **asked, **self._options)

    def _prior(self, other: "DiagonalGaussian | None") -> tuple[Tensor, Tensor] | None:
        if other is None:
            return None
        if not isinstance(other, DiagonalGaussian):
            raise TypeError(
                f"DiagonalGaussian.kl: other must be a DiagonalGaussian; got {type(other).__name__}. "
                "Make one of the prior's mu and logvar; sample_shape goes by its keyword."
            )
        same = {key: value for key, value in self._options.items() if key != "clamp"}
        if any(other._options[key] != value for key, value in same.items()):
            raise ValueError(
                "DiagonalGaussian.kl: other must have the same param and min_std; "
                f"got {other._options['param']}, {other._options['min_std']}. "
                "Give both distributions the same parameterisation."
            )
        mu, x = unpacked(other._view)
        clamp = other._options["clamp"]
        return mu, x if clamp is None else x.clamp(*clamp)

    def rsample(
        self,
        sample_shape: tuple[int, ...] = (),
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
    ) -> Tensor:
        """Draw z of shape sample_shape + mu.shape, with gradients. The keywords are those of reparameterize."""
        noise = {"seed": seed, "generator": generator, "eps": eps}
        return execute(LATENT, self._arguments(z=True, sample_shape=sample_shape, **noise))[0]  # type: ignore[return-value]

    def sample(
        self,
        sample_shape: tuple[int, ...] = (),
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
    ) -> Tensor:
        """Draw z as rsample does, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, seed=seed, generator=generator, eps=eps)

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """Compute KL(self || other), with gradients to both; other is N(0, I) by default."""
        return execute(LATENT, self._arguments(kl=True, prior=self._prior(other)))[1]  # type: ignore[return-value]

    def rsample_kl(
        self,
        other: "DiagonalGaussian | None" = None,
        sample_shape: tuple[int, ...] = (),
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute (rsample(sample_shape), kl(other)) in one pass."""
        noise = {"seed": seed, "generator": generator, "eps": eps}
        prior = self._prior(other)
        arguments = self._arguments(z=True, kl=True, prior=prior, sample_shape=sample_shape, **noise)
        return execute(LATENT, arguments)[:2]  # type: ignore[return-value]

    def rsample_and_log_prob(
        self,
        sample_shape: tuple[int, ...] = (),
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
        path_derivative: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Compute (z, log q(z)) of rsample(sample_shape) in one pass, as reparameterize_log_prob does."""
        noise = {"seed": seed, "generator": generator, "eps": eps}
        density = Density(path_derivative=path_derivative)
        arguments = self._arguments(z=True, sample_shape=sample_shape, density=density, **noise)
        z, _, log_q = execute(LATENT, arguments)
        return z, log_q  # type: ignore[return-value]

    def sample_and_log_prob(
        self,
        sample_shape: tuple[int, ...] = (),
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the same without gradients."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape, seed=seed, generator=generator, eps=eps)

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute log N(z; mu, sigma^2) in nats, summed over the event dims, in float32 (float64 for float64)."""
        checks.floating("DiagonalGaussian.log_prob", "z", z)
        dtype = compute_dtype(self.mean.dtype)
        mu, x = self.mean.to(dtype), self._x().to(dtype)
        l = log_sigma(x, self._options["param"], self._options["min_std"])  # noqa: E741
        sigma = sigma_of(x, self._options["param"], self._options["min_std"])
        out = -(((z.to(dtype) - mu) / sigma) ** 2) / 2 - l - math.log(2 * math.pi) / 2
        dims = self._view.config.event_ndim
        return out.sum(dim=tuple(range(-dims, 0))) if dims else out

    def mode(self) -> Tensor:
        """Return a copy of mu, which may be changed in place, as a sample may."""
        return self.mean.clone(memory_format=torch.contiguous_format)

    def _x(self) -> Tensor:
        x = unpacked(self._view)[1]
        clamp = self._options["clamp"]
        return x if clamp is None else x.clamp(*clamp)

    @property
    def mean(self) -> Tensor:
        """mu; a view of the moments if they are packed."""
        return unpacked(self._view)[0]

    @property
    def std(self) -> Tensor:
        """sigma in mu's dtype, as a new tensor."""
        x = self._x()
        sigma = sigma_of(x.to(compute_dtype(x.dtype)), self._options["param"], self._options["min_std"])
        return sigma.to(x.dtype, copy=True)  # sigma may be x itself, or what the backward of exp needs

    @property
    def logvar(self) -> Tensor:
        """2 log sigma in mu's dtype, clamped if asked."""
        x = self._x()
        log_std = log_sigma(x.to(compute_dtype(x.dtype)), self._options["param"], self._options["min_std"])
        return (2 * log_std).to(x.dtype)
