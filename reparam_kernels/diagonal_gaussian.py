"""A Gaussian posterior as an object. Packed encoder outputs are read in place and get their gradient in one tensor."""

import math
from typing import Any

import torch
from torch import Tensor, distributions

from .core import checks
from .core.dtypes import compute_dtype
from .core.execute import execute
from .core.formats import format_of, in_format
from .core.window import Window
from .ops.latent.arguments import Arguments, Density, make_arguments, unpacked
from .ops.latent.formula import clamped, log_sigma, sigma_of
from .ops.latent.op import LATENT
from .ops.latent.priors import as_pair, converted


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
        if not -moments.dim() <= dim < moments.dim():
            raise ValueError(
                f"{where}: dim must be one of the {moments.dim()} dims of moments; got {dim}, and moments of shape "
                f"{tuple(moments.shape)}. Pass the dim that holds mu and logvar."
            )
        if moments.shape[dim] % 2:
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

    def _prior(self, other: "DiagonalGaussian | distributions.Normal | None") -> tuple[Tensor, Tensor] | None:
        if other is not None and not isinstance(other, (DiagonalGaussian, distributions.Normal)):
            raise TypeError(
                "DiagonalGaussian.kl: other must be a DiagonalGaussian or a torch.distributions.Normal; "
                f"got {type(other).__name__}. Make one of the prior's mu and logvar; sample_shape goes by its keyword."
            )
        pair = as_pair("DiagonalGaussian.kl", other, self._options["param"], self._options["min_std"])
        return pair  # type: ignore[no-any-return]

    def _pair(self, where: str, param: str, min_std: float) -> tuple[Tensor, Tensor]:
        """Return mu and the second argument, converted to another parameterisation; for ops/latent/priors.py."""
        given = (self._options["param"], self._options["min_std"])
        return self.mean, converted(where, self._x(), given, (param, min_std))

    def rsample(
        self,
        sample_shape: tuple[int, ...] = (),
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """Draw z of shape sample_shape + mu.shape, with gradients. The keywords are those of reparameterize."""
        noise = {"seed": seed, "generator": generator, "eps": eps, "window": window}
        return execute(LATENT, self._arguments(z=True, sample_shape=sample_shape, **noise))[0]  # type: ignore[return-value]

    def sample(
        self,
        sample_shape: tuple[int, ...] = (),
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """Draw z as rsample does, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, seed=seed, generator=generator, eps=eps, window=window)

    def kl(self, other: "DiagonalGaussian | distributions.Normal | None" = None) -> Tensor:
        """Compute KL(self || other), with gradients to both; other is N(0, I) by default.

        It is a DiagonalGaussian or a torch.distributions.Normal that expands to the shape of mu.
        """
        return execute(LATENT, self._arguments(kl=True, prior=self._prior(other)))[1]  # type: ignore[return-value]

    def rsample_kl(
        self,
        other: "DiagonalGaussian | distributions.Normal | None" = None,
        sample_shape: tuple[int, ...] = (),
        *,
        seed: Any = None,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
        window: Window | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute (rsample(sample_shape), kl(other)) in one pass."""
        noise = {"seed": seed, "generator": generator, "eps": eps, "window": window}
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
        window: Window | None = None,
        path_derivative: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Compute (z, log q(z)) of rsample(sample_shape) in one pass, as reparameterize_log_prob does."""
        noise = {"seed": seed, "generator": generator, "eps": eps, "window": window}
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
        window: Window | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the same without gradients."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape, seed=seed, generator=generator, eps=eps, window=window)

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute log N(z; mu, sigma^2) in nats, summed over the event dims, in float32 (float64 for float64)."""
        checks.floating("DiagonalGaussian.log_prob", "z", z)
        mu = self.mean
        try:
            torch.broadcast_shapes(z.shape, mu.shape)  # type: ignore[no-untyped-call]
        except RuntimeError:
            raise ValueError(
                f"DiagonalGaussian.log_prob: z must broadcast with mu; got mu {tuple(mu.shape)}, z {tuple(z.shape)}. "
                "Give z the shape of mu, after any sample dims."
            ) from None
        dtype = compute_dtype(mu.dtype)
        sigma = sigma_of(self._x().to(dtype), self._options["param"], self._options["min_std"])
        squares = ((z.to(dtype) - mu.to(dtype)) / sigma) ** 2
        return self._sum(-squares / 2 - self._log_std() - math.log(2 * math.pi) / 2)

    def entropy(self) -> Tensor:
        """Compute the entropy in nats, summed over the event dims, in float32 (float64 for float64)."""
        return self._sum(self._log_std() + (1 + math.log(2 * math.pi)) / 2)

    def mode(self) -> Tensor:
        """Return a copy of mu, which may be changed in place, as a sample may."""
        return in_format(self.mean.clone(), format_of(self.mean))

    def _sum(self, values: Tensor) -> Tensor:
        dims = len(self.event_shape)
        return values.sum(dim=tuple(range(-dims, 0))) if dims else values

    def _log_std(self) -> Tensor:
        x = self._x()
        return log_sigma(x.to(compute_dtype(x.dtype)), self._options["param"], self._options["min_std"])

    def _x(self) -> Tensor:
        return clamped(unpacked(self._view)[1], self._options["clamp"])

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
        return (2 * self._log_std()).to(self.mean.dtype)

    @property
    def batch_shape(self) -> torch.Size:
        """The dims of mu that kl, log_prob and entropy keep."""
        shape = self.mean.shape
        return shape[: len(shape) - self._view.config.event_ndim]

    @property
    def event_shape(self) -> torch.Size:
        """The dims of mu that kl, log_prob and entropy sum over."""
        return self.mean.shape[len(self.batch_shape) :]

    def __repr__(self) -> str:
        shapes = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"DiagonalGaussian({shapes}, {options}, dtype={self.mean.dtype}, device={self.mean.device})"


@distributions.register_kl(DiagonalGaussian, DiagonalGaussian)  # type: ignore[no-untyped-call, untyped-decorator]
@distributions.register_kl(DiagonalGaussian, distributions.Normal)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl(p: DiagonalGaussian, q: DiagonalGaussian | distributions.Normal) -> Tensor:
    """For torch.distributions.kl_divergence."""
    return p.kl(q)
