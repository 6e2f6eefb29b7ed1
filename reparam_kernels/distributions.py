"""A drop-in torch.distributions.Normal that draws samples and computes its KL by the fused ops."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, distributions

from .core import checks, torch_modes
from .core.dtypes import FLOATS
from .ops.latent import kl_divergence, reparameterize, reparameterize_log_prob

__all__ = ["Normal", "TanhNormal"]


class Normal(distributions.Normal):
    """torch.distributions.Normal with samples and KL from the fused ops.

        z = loc + scale * eps,  kl_divergence(p, q) = KL(N(loc, scale^2) || N(q.loc, q.scale^2)), elementwise

    It is a subclass. Batch shapes, broadcasting, expand, Independent, log_prob, entropy, cdf and icdf come from torch,
    and so do the dtype and the device of every result, except that the KL of half dtypes is float32. A draw takes one
    seed from torch's generator and stores no noise. The KL with torch's Normal on either side is fused too.

    Args:
        loc: mean; a number or a tensor of float16, bfloat16, float32 or float64.
        scale: standard deviation; broadcasts with loc.
        validate_args: as in torch. The search for a NaN or a scale that is not positive takes two reductions and one
            read; it does not run if validation is off. A number is checked in the dtype in which it is stored.

    Raises:
        ValueError: the error of torch, if validation finds a bad value.
        TypeError: at the first draw, if loc does not have one of the four dtypes.
        ValueError: at the first draw or KL, if a tensor with dims is on another device.

    Source:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, section 2.4 and appendix B.

    Example:
        >>> import torch
        >>> from torch.distributions import kl_divergence
        >>> from reparam_kernels.distributions import Normal
        >>> q = Normal(torch.ones(2, 3), 1.0)
        >>> q.rsample((5,)).shape
        torch.Size([5, 2, 3])
        >>> kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])
    """

    def __init__(self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None) -> None:
        super().__init__(loc, scale, validate_args=False)
        if validate_args is None:
            del self._validate_args  # follow torch's default at each use
        else:
            self._validate_args = validate_args
        usual = self.arg_constraints is distributions.Normal.arg_constraints
        if self._validate_args and not (usual and self._looks_valid(loc, scale)):
            super().__init__(loc, scale, validate_args)  # raises torch's error

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return super().expand(batch_shape, self._get_checked_instance(Normal, _instance))  # type: ignore[no-untyped-call]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        z = self._draw(sample_shape)
        # torch draws in the dtype of loc, which decides if only the draw has dims
        return z.to(self.loc.dtype) if self.loc.dim() == 0 and z.dim() > 0 else z

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(sample_shape).to(self.loc.dtype)

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Compute (z, log_prob(z)) of a draw with gradients, in one pass; log_prob is float32 for the half dtypes."""
        return draw_and_log_prob(self, sample_shape, None)

    def _draw(self, sample_shape: Any) -> Tensor:
        loc, scale = common_parameters(self)
        return reparameterize(loc, scale, sample_shape=torch.Size(sample_shape), param="std")

    def _looks_valid(self, loc: Tensor | float, scale: Tensor | float) -> bool:
        """Return True if neither has a NaN and every scale is positive; False also if no value can be read here.

        The minimum is enough, since amin returns a NaN if there is one.
        """
        if torch_modes.in_transform() or self.loc.is_meta or self.loc.device != self.scale.device:
            return False
        if self.loc.dtype not in FLOATS or self.scale.dtype not in FLOATS:
            return False

        def minimum(given: Tensor | float, kept: Tensor) -> Tensor | float:
            if not isinstance(given, Tensor):
                return torch.tensor(given, dtype=kept.dtype, device="cpu").item()
            given = given.detach()
            return given.amin() if given.numel() else 1.0

        min_loc, min_scale = minimum(loc, self.loc), minimum(scale, self.scale)
        if isinstance(min_loc, Tensor) and isinstance(min_scale, Tensor):
            min_loc, min_scale = torch.stack((min_loc, min_scale)).tolist()  # one read for both
        return bool(min_loc == min_loc and min_scale > 0)


class TanhNormal(distributions.TransformedDistribution):
    """The distribution of tanh(u), u ~ Normal(loc, scale), as in the policies of soft actor-critic.

        z = tanh(u),  log_prob(z) = log N(u; loc, scale^2) - log(1 - z^2)

    It is torch's TransformedDistribution of Normal. rsample_and_log_prob computes the density from u, not from z: it is
    exact where z is saturated, and log_prob(z) is not.

    Args:
        loc, scale, validate_args: as for Normal.

    Raises:
        ValueError, TypeError: as Normal.

    Source:
        Haarnoja et al., "Soft Actor-Critic", 2018, appendix C.

    Example:
        >>> import torch
        >>> from reparam_kernels.distributions import TanhNormal
        >>> policy = TanhNormal(torch.zeros(5, 3), torch.ones(5, 3))
        >>> action, log_prob = policy.rsample_and_log_prob()
        >>> log_prob.shape, torch.allclose(log_prob, policy.log_prob(action), atol=1e-4)
        (torch.Size([5, 3]), True)
    """

    base_dist: Normal

    def __init__(self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None) -> None:
        base = Normal(loc, scale, validate_args)
        super().__init__(base, distributions.TanhTransform(cache_size=1), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        instance = self._get_checked_instance(TanhNormal, _instance)  # type: ignore[no-untyped-call]
        return super().expand(batch_shape, instance)  # type: ignore[no-untyped-call]

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Compute (z, log_prob(z)) of a draw with gradients, in one pass; log_prob is float32 for the half dtypes."""
        return draw_and_log_prob(self.base_dist, sample_shape, "tanh")

    @property
    def mode(self) -> Tensor:
        """tanh(loc), the usual action in evaluation. The density itself may be largest elsewhere."""
        return torch.tanh(self.base_dist.loc)


def draw_and_log_prob(normal: distributions.Normal, sample_shape: Any, squash: str | None) -> tuple[Tensor, Tensor]:
    loc, scale = common_parameters(normal)
    shape = torch.Size(sample_shape)
    return reparameterize_log_prob(loc, scale, sample_shape=shape, param="std", event_ndim=0, squash=squash)


def common_parameters(normal: distributions.Normal) -> tuple[Tensor, Tensor]:
    """Return loc and scale in one dtype and on one device."""
    loc, scale = normal.loc, normal.scale
    if loc.dtype != scale.dtype or loc.device != scale.device:
        checks.floating("Normal.rsample", "loc", loc)
        loc, scale = to_common(arithmetic_dtype(loc, scale), loc, scale)
    return loc, scale


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that torch promotes to: floats come before integers, tensors with dims before 0-dim ones."""
    floats = [t for t in tensors if t.is_floating_point()] or tensors
    deciding = [t for t in floats if t.dim() > 0] or floats
    return reduce(torch.promote_types, (t.dtype for t in deciding))


def to_common(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Convert tensors to one dtype; a 0-dim tensor on the CPU moves to the device of the others, as in arithmetic."""
    fixed = [t.device for t in tensors if t.dim() > 0 or t.device.type != "cpu"]
    device = fixed[0] if fixed else tensors[0].device
    return [(t.to(device) if t.dim() == 0 and t.device.type == "cpu" else t).to(dtype) for t in tensors]


@distributions.register_kl(Normal, Normal)  # type: ignore[no-untyped-call, untyped-decorator]
@distributions.register_kl(Normal, distributions.Normal)  # type: ignore[no-untyped-call, untyped-decorator]
@distributions.register_kl(distributions.Normal, Normal)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl(p: distributions.Normal, q: distributions.Normal) -> Tensor:
    """Compute the KL, in float32 for the half dtypes, since it may exceed their range."""
    four = (p.loc, p.scale, q.loc, q.scale)
    dtype = arithmetic_dtype(*four)
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()  # torch divides integers in it
    elif any(t.dtype != dtype for t in four):
        dtype = torch.promote_types(dtype, torch.float32)  # so that no parameter loses digits to a half dtype
    loc, scale, loc_q, scale_q = to_common(dtype, *four)
    shape = torch.broadcast_shapes(loc.shape, loc_q.shape)  # type: ignore[no-untyped-call]
    return kl_divergence(loc.expand(shape), scale.expand(shape), prior=(loc_q, scale_q), param="std", event_ndim=0)
