"""torch.distributions.Normal over the fused ops: a swap of one import."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, distributions

from .api import kl_divergence, reparameterize

__all__ = ["Normal"]


class Normal(distributions.Normal):
    """torch.distributions.Normal whose samples and KL are the fused ops'.

        z = loc + scale * eps,  kl_divergence(p, q) = KL(N(loc, scale^2) || N(q.loc, q.scale^2)), elementwise

    A subclass: batch shapes, broadcasting, expand, Independent, log_prob, entropy, cdf and icdf are torch's own. A draw
    takes one seed from torch's generator and stores no noise. The KL with torch's Normal on either side is ours too.

    Args:
        loc: mean; a number or a tensor of float16, bfloat16, float32 or float64.
        scale: standard deviation; broadcasts with loc.
        validate_args: as in torch; a NaN or a scale that is not positive is looked for by two reductions and one read,
            not at all when it is off.

    Raises:
        ValueError: torch's own, where validation finds a bad value.
        TypeError: at the first draw or KL, where loc is not of one of the four dtypes.

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
            del self._validate_args  # torch's default, as it stands at each use
        else:
            self._validate_args = validate_args
        usual = self.arg_constraints is distributions.Normal.arg_constraints
        if self._validate_args and not (usual and _looks_valid(loc, scale)):
            super().__init__(loc, scale, validate_args)  # says what is wrong

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return super().expand(batch_shape, self._get_checked_instance(Normal, _instance))  # type: ignore[no-untyped-call]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        loc, scale = one_dtype(self.loc, self.scale)
        return reparameterize(loc, scale, sample_shape=tuple(sample_shape), param="std")

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


def _looks_valid(loc: Tensor | float, scale: Tensor | float) -> bool:
    """No NaN and only positive scales; the least element tells, for a NaN is the least of all."""

    def least(t: Tensor | float) -> Tensor | float:
        if isinstance(t, Tensor):
            return t.detach().amin() if t.numel() else 1.0
        return t

    low, narrow = least(loc), least(scale)
    if isinstance(low, Tensor) and isinstance(narrow, Tensor):
        low, narrow = torch.stack((low, narrow)).tolist()  # one read for both
    return bool(low == low and narrow > 0)


def one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Promoted as torch's arithmetic promotes them."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    return [t.to(dtype) for t in tensors]


@distributions.register_kl(Normal, Normal)  # type: ignore[no-untyped-call, untyped-decorator]
@distributions.register_kl(Normal, distributions.Normal)  # type: ignore[no-untyped-call, untyped-decorator]
@distributions.register_kl(distributions.Normal, Normal)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl(p: distributions.Normal, q: distributions.Normal) -> Tensor:
    """float32 for the half dtypes, whose own range a KL leaves."""
    loc, scale, loc_q, scale_q = one_dtype(p.loc, p.scale, q.loc, q.scale)
    shape = torch.broadcast_shapes(loc.shape, loc_q.shape)  # type: ignore[no-untyped-call]
    return kl_divergence(loc.expand(shape), scale.expand(shape), prior=(loc_q, scale_q), param="std", event_ndim=0)
