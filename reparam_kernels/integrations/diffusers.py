"""The posteriors of diffusers' autoencoders, with diffusers' noise or ours, over the fused KL."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions.utils import lazy_property
from torch.nn.functional import softplus

from ..core import checks
from ..core.dtypes import compute_dtype
from ..diagonal_gaussian import DiagonalGaussian
from ..ops.latent import kl_divergence
from .patching import Behaviour, Patch, check_behaviour, find

__all__ = ["DiagonalGaussianDistribution", "OobleckDiagonalGaussianDistribution", "patch"]

Generators = torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None


class Posterior:
    """The base of the classes: the packed parameters, the two noises, sample and mode."""

    mean: Tensor
    std: Any

    def __init__(
        self,
        parameters: Tensor,
        deterministic: bool = False,
        *,
        chunk_dim: int = 1,
        noise: str = "torch",
        fix_upstream_bugs: bool = False,
    ) -> None:
        where = type(self).__name__
        checks.floating(where, "parameters", parameters)
        if noise not in ("torch", "philox"):
            raise ValueError(
                f'{where}: noise must be "torch" or "philox"; got {noise!r}. '
                "The first draws what diffusers draws, the second stores nothing."
            )
        self.parameters, self.deterministic = parameters, deterministic
        self.chunk_dim, self.noise, self.fix_upstream_bugs = chunk_dim, noise, fix_upstream_bugs
        self.mean, self._x = torch.chunk(parameters, 2, dim=chunk_dim)

    def _packed(self) -> DiagonalGaussian:
        raise NotImplementedError

    def _mean_only(self) -> bool:
        raise NotImplementedError

    def _torch_noise(self, generator: Generators) -> Tensor:
        return randn(self.mean.shape, generator, self.mean.device, self.mean.dtype)

    def sample(self, generator: Generators = None, *, seed: int | Tensor | None = None) -> Tensor:
        """Draw z. The "philox" noise also takes `seed` instead of a generator: one for all, or one for each item."""
        if seed is not None and self.noise == "torch":
            raise ValueError(
                f'{type(self).__name__}.sample: seed goes with noise="philox"; got noise="torch". '
                'Pass a generator, or build the posterior with noise="philox".'
            )
        if self._mean_only():
            return self.mean.clone()
        if self.noise == "torch":
            sample: Tensor = self.mean + self.std * self._torch_noise(generator)
            return sample
        if seed is None:
            seed = item_seeds(self.mean.shape[0], generator, self.mean.device)
        return self._packed().rsample(seed=seed)

    def mode(self) -> Tensor:
        return self.mean

    def _zero(self, *shape: int) -> Tensor:
        """Return the KL of a deterministic posterior. That of diffusers is one zero on the CPU."""
        if not self.fix_upstream_bugs:
            return torch.zeros(1, device="cpu")
        return self.mean.new_zeros(shape, dtype=compute_dtype(self.mean.dtype))

    def _kl_from(self, prior: tuple[Tensor, Tensor], **options: Any) -> Tensor:
        """Compute the KL from a prior, where the shapes broadcast."""
        shape = torch.broadcast_shapes(self.mean.shape, prior[0].shape)  # type: ignore[no-untyped-call]
        return kl_divergence(self.mean.expand(shape), self._x.expand(shape), prior=prior, **options)


class DiagonalGaussianDistribution(Posterior):
    """The posterior of diffusers' AutoencoderKL and similar models, with the moments packed along a dim.

        z = mean + std * noise,  logvar clamped to [-30, 20],  kl = KL(N(mean, var) || N(0, I) or other)

    It has all members of diffusers' class: parameters, mean, logvar, std, var, deterministic, sample, mode, kl, nll.
    logvar, std and var are computed when they are read. kl and nll are float32 for the half dtypes, in which those of
    diffusers overflow.

    Args:
        parameters: encoder output, mean and logvar stacked along chunk_dim; float16, bfloat16, float32 or float64.
        deterministic: std and var are zero, so that sample returns the mean.
        chunk_dim: the dim of the moments; 1 in diffusers.
        noise: "torch" draws what diffusers' class draws and gives the same z to the bit; "philox" draws one seed for
            each item and stores no noise. With both, sample takes one generator, a list with one for each item, or a
            CPU generator for a tensor on a GPU.
        fix_upstream_bugs: False keeps the behaviour of diffusers: kl and nll sum over dims 1 to 3 whatever the rank
            (5-D gives (B, W), 3-D raises), and those of a deterministic posterior are torch.zeros(1) on the CPU. True
            sums over all but the first dim.

    Raises:
        TypeError, ValueError: if the dtype is not one of the four, or the noise is unknown.
        IndexError: at kl and nll of fewer than four dims, unless fix_upstream_bugs is True.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014; Rombach et al., "High-Resolution Image Synthesis
        with Latent Diffusion Models", 2022.

    Example:
        >>> import torch
        >>> from reparam_kernels.integrations.diffusers import DiagonalGaussianDistribution
        >>> posterior = DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4))
        >>> posterior.sample(torch.Generator().manual_seed(0)).shape, posterior.kl()
        (torch.Size([2, 4, 4, 4]), tensor([0., 0.]))
    """

    @lazy_property
    def logvar(self) -> Tensor:
        return torch.clamp(self._x, -30.0, 20.0)

    @lazy_property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @lazy_property
    def var(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def _packed(self, event_ndim: int | None = None) -> DiagonalGaussian:
        return DiagonalGaussian.from_moments(
            self.parameters, self.chunk_dim, clamp=(-30.0, 20.0), event_ndim=event_ndim
        )

    def _mean_only(self) -> bool:
        return self.deterministic and (self.fix_upstream_bugs or self.noise == "philox")  # diffusers draws nevertheless

    def _dims(self, method: str) -> tuple[int, ...]:
        ndim = self.mean.dim()
        if self.fix_upstream_bugs:
            return tuple(range(1, ndim))
        if ndim < 4:
            raise IndexError(
                f"{type(self).__name__}.{method}: parameters must have at least 4 dims, for it sums over dims 1 to 3 "
                f"as diffusers does; got shape {tuple(self.parameters.shape)}. "
                "Pass fix_upstream_bugs=True to sum over all dims but the first."
            )
        return (1, 2, 3)

    def kl(self, other: Any = None) -> Tensor:
        """Compute KL(self || other), with gradients to both; other is N(0, I), of this class or of diffusers' class."""
        if self.deterministic:
            return self._zero(self.mean.shape[0])
        dims = self._dims("kl")
        event_ndim = None if len(dims) == self.mean.dim() - 1 else 0
        if other is None:
            kl = self._packed(event_ndim).kl()
        else:
            logvar = torch.full_like(other.logvar, -math.inf) if other.deterministic else other.logvar
            kl = self._kl_from((other.mean, logvar), clamp=(-30.0, 20.0), event_ndim=event_ndim)
        return kl if event_ndim is None else kl.sum(dims)

    def nll(self, sample: Tensor, dims: Any = None) -> Tensor:
        """Compute -log N(sample; mean, var) in plain torch, summed over dims, by default those of kl."""
        if self.deterministic:
            return self._zero(self.mean.shape[0])
        dtype = compute_dtype(self.mean.dtype)
        logvar = self.logvar.to(dtype)
        squares = (sample.to(dtype) - self.mean.to(dtype)) ** 2 * torch.exp(-logvar)
        return 0.5 * torch.sum(
            math.log(2 * math.pi) + logvar + squares, dim=self._dims("nll") if dims is None else tuple(dims)
        )


class OobleckDiagonalGaussianDistribution(Posterior):
    """The posterior of diffusers' audio autoencoder (Oobleck), whose second half gives std by a softplus.

        z = mean + std * noise,  std = softplus(scale) + 1e-4

    It has all members of diffusers' class: parameters, mean, scale, std, var, logvar, deterministic, sample, kl, mode.

    Args:
        parameters, chunk_dim, noise: as for DiagonalGaussianDistribution.
        deterministic: see fix_upstream_bugs.
        fix_upstream_bugs: False keeps the behaviour of diffusers: kl is twice the divergence, kl(other) adds
            log(var / other.var), which the divergence subtracts, and a deterministic posterior still samples and has
            torch.zeros(1) for its kl. True gives the divergence in nats, and the mean for a deterministic sample. In
            both cases kl sums over the channels and takes the mean of the rest.

    Raises:
        TypeError, ValueError: as DiagonalGaussianDistribution.

    Source:
        Evans et al., "Stable Audio Open", 2024.

    Example:
        >>> import torch
        >>> from reparam_kernels.integrations.diffusers import OobleckDiagonalGaussianDistribution
        >>> posterior = OobleckDiagonalGaussianDistribution(torch.zeros(2, 8, 16), noise="philox")
        >>> posterior.sample(seed=7).shape, posterior.kl()
        (torch.Size([2, 4, 16]), tensor(0.8533))
    """

    @property
    def scale(self) -> Tensor:
        return self._x

    @lazy_property
    def std(self) -> Tensor:
        return softplus(self._x) + 1e-4

    @lazy_property
    def var(self) -> Tensor:
        return self.std * self.std

    @lazy_property
    def logvar(self) -> Tensor:
        return torch.log(self.var)

    def _packed(self, event_ndim: int | None = None) -> DiagonalGaussian:
        return DiagonalGaussian.from_moments(
            self.parameters, self.chunk_dim, param="softplus", min_std=1e-4, event_ndim=event_ndim
        )

    def _mean_only(self) -> bool:
        return self.deterministic and self.fix_upstream_bugs

    def kl(self, other: Any = None) -> Tensor:
        """Compute the divergence from N(0, I) or from other, of this class or of diffusers' class; a scalar."""
        if self.deterministic:
            return self._zero()
        places = self.mean.numel() // self.mean.shape[self.chunk_dim]
        if other is None:
            kl = self._packed().kl().sum() / places
            return kl if self.fix_upstream_bugs else 2 * kl
        kl = self._kl_from((other.mean, other.scale), param="softplus", min_std=1e-4).sum() / places
        if self.fix_upstream_bugs:
            return kl
        log_std, log_std_p = (torch.log(softplus(x.to(kl.dtype)) + 1e-4) for x in (self._x, other.scale))
        log_ratio: Tensor = (log_std - log_std_p).sum(self.chunk_dim).mean()
        return 2 * kl + 4 * log_ratio  # diffusers adds log(var / other.var) with the wrong sign


def randn(shape: torch.Size, generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw torch.randn on the generator's device, as diffusers' randn_tensor does. A list draws one item with each."""
    if isinstance(generator, (list, tuple)):
        if len(generator) == 1:
            generator = generator[0]
        else:
            check_count(generator, shape[0])
            items = [randn(torch.Size((1, *shape[1:])), g, device, dtype) for g in generator[: shape[0]]]
            return torch.cat(items)
    return torch.randn(shape, generator=generator, device=drawing_device(generator, device), dtype=dtype).to(device)


def item_seeds(count: int, generator: Generators, device: torch.device) -> Tensor:
    """Draw one seed for each item, from one generator or each from its own."""
    if isinstance(generator, (list, tuple)):
        if len(generator) == 1:
            generator = generator[0]
        else:
            check_count(generator, count)
            return torch.cat([item_seeds(1, g, device) for g in generator[:count]])
    at = drawing_device(generator, device)
    return torch.randint(2**63 - 1, (count,), generator=generator, device=at).to(device)


def drawing_device(generator: torch.Generator | None, device: torch.device) -> torch.device:
    """Return the tensor's device, or the CPU if the generator is on the CPU."""
    if generator is None or generator.device.type == device.type:
        return device
    if generator.device.type != "cpu":
        raise ValueError(
            f"sample: a generator must be on {device} or on the CPU; got {generator.device}. "
            "Make it with torch.Generator(device)."
        )
    return generator.device


def check_count(generators: Any, count: int) -> None:
    if len(generators) < count:
        raise ValueError(
            f"sample: a list must have a generator for each of the {count} items; got {len(generators)}. "
            "Give one for each, or one for all."
        )


def patch(noise: str = "torch", fix_upstream_bugs: bool = False) -> Patch:
    """Rebind diffusers' two posteriors to these, in every module of diffusers that has them.

    Args:
        noise, fix_upstream_bugs: as for DiagonalGaussianDistribution; the default changes no image and fixes no bug.

    Returns:
        A Patch: `rebound` lists the names (they are logged too); `restore()`, or leaving `with`, restores them.

    Raises:
        ModuleNotFoundError, RuntimeError: if diffusers is not installed, its classes do not behave as these, or it is
            patched already.

    Example:
        >>> import reparam_kernels as rk
        >>> with rk.integrations.diffusers.patch() as patched:  # doctest: +SKIP
        ...     posterior = vae.encode(image).latent_dist
    """
    where = "diffusers.models.autoencoders"
    adapters = {"vae": DiagonalGaussianDistribution, "autoencoder_oobleck": OobleckDiagonalGaussianDistribution}
    swaps: dict[type, type] = {}
    for module, ours in adapters.items():
        theirs = find("diffusers", f"{where}.{module}", ours.__name__)
        swaps[theirs] = with_options(ours, noise, fix_upstream_bugs)
        check_behaviour("diffusers", "diffusers", theirs, swaps[theirs], *behaviours(ours, noise, fix_upstream_bugs))
    return Patch("diffusers", swaps)


def with_options(ours: type[Posterior], noise: str, fix_upstream_bugs: bool) -> type:
    """Return the class with the options as its defaults and the constructor of diffusers' class."""

    class Bound(ours):  # type: ignore[misc, valid-type]
        def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
            super().__init__(parameters, deterministic, noise=noise, fix_upstream_bugs=fix_upstream_bugs)

    Bound.__name__ = Bound.__qualname__ = ours.__name__
    return Bound


def behaviours(ours: type[Posterior], noise: str, fix_upstream_bugs: bool) -> list[Behaviour]:
    """Return what is compared of a posterior of diffusers: first one that samples, then a deterministic one."""
    g = torch.Generator().manual_seed(0)
    parameters, value, other = (torch.randn(3, n, 12, 12, generator=g, device="cpu") for n in (8, 4, 8))
    parameters[2, 4:, 0, :2] = torch.tensor([25.0, -35.0], device="cpu")  # beyond the clamp
    parameters.requires_grad_()
    values: dict[str, Any] = {
        "mode": lambda q: q.mode(),
        "kl": lambda q: q.kl(),
        "kl(other)": lambda q: q.kl(type(q)(other)),
    }
    if ours is DiagonalGaussianDistribution:
        values |= {"nll": lambda q: q.nll(value), "nll(dims)": lambda q: q.nll(value, [1])}
    draws: dict[str, Any] = {
        "sample": lambda q, g: q.sample(),
        "sample(generator)": lambda q, g: q.sample(g),
        "sample(generators)": lambda q, g: q.sample([g, g, g]),
    }
    wrong_kl = fix_upstream_bugs and ours is OobleckDiagonalGaussianDistribution
    same = Behaviour(
        (parameters,), values, draws, "mean", "std", noise == "torch", frozenset({"kl"} if wrong_kl else ())
    )
    # A deterministic posterior of diffusers draws nevertheless, and has torch.zeros(1) for its kl.
    excepted = {"kl", "nll", "sample"} if fix_upstream_bugs else set() if noise == "torch" else {"sample"}
    return [same, same._replace(arguments=(parameters, True), excepted=frozenset(excepted))]
