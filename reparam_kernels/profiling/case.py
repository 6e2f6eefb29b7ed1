"""One case of a measurement: an op on a shape with its options, its inputs, and the words that each pass must move."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.formats import CHANNELS_LAST

OPS = (
    "reparameterize_kl",
    "reparameterize",
    "kl_divergence",
    "reparameterize_log_prob",
    "reparameterize_mc_kl",
    "mixture_log_prob",
)


class Case(NamedTuple):
    """The shape is that of mu; packed moments have twice that in dim 1. A mixture has points x components x dims."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    param: str = "logvar"
    min_std: float = 0.0
    samples: int | None = None
    prior: bool = False
    packed: bool = False
    channels_last: bool = False
    squash: bool = False
    of: str = "joint"

    def refusal(self) -> str | None:
        """Return why there is no such case, in the names of the options, or None."""
        mixture = self.op == "mixture_log_prob"
        if self.min_std and self.param != "softplus":
            return f"--min-std needs --param softplus; got --param {self.param}"
        if self.prior and self.op not in ("reparameterize_kl", "kl_divergence", "reparameterize_mc_kl"):
            return f"--prior needs an op with a KL; got --op {self.op}"
        if self.samples and not self.draws:
            return f"--samples needs an op that samples; got --op {self.op}"
        if self.squash and self.op != "reparameterize_log_prob":
            return f"--squash needs --op reparameterize_log_prob; got --op {self.op}"
        if self.packed and (self.squash or self.op in ("reparameterize_mc_kl", "mixture_log_prob")):
            return f"--packed needs a method of rk.DiagonalGaussian; got --op {self.op}{' --squash' * self.squash}"
        if self.packed and len(self.shape) < 2:
            return f"--packed needs a shape of two or more dims; got {self.shape[0]}"
        if self.channels_last and (mixture or len(self.shape) not in CHANNELS_LAST):
            return f"--channels-last needs a shape of four or five dims; got {self.shape_text}"
        if self.of != "joint" and not mixture:
            return f"--of needs --op mixture_log_prob; got --op {self.op}"
        if mixture and len(self.shape) != 3:
            return f"a mixture needs a shape of points, components and dims, as 256x256x10; got {self.shape_text}"
        return None

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def dtype_text(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        parts = [self.op, self.shape_text, self.dtype_text, f"param {self.param}"]
        parts += (
            ["packed"] * self.packed
            + ["channels_last"] * self.channels_last
            + ["with prior"] * self.prior
            + ["squashed"] * self.squash
        )
        parts += [f"{self.samples} samples"] if self.samples else []
        return ", ".join([*parts, f"of {self.of}"] if self.op == "mixture_log_prob" else parts)

    @property
    def draws(self) -> bool:
        return self.op.startswith("reparameterize")

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return () if self.samples is None else (self.samples,)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims of mu that a KL or a log-density sums over, counted from the last."""
        return tuple(range(1 - len(self.shape), 0))

    @property
    def numel(self) -> int:
        """The elements of z; of a mixture, the pairs of a point and a component, times the dims."""
        return math.prod(self.shape) * (self.samples or 1)

    def parts(self) -> tuple[str, ...]:
        """Return the outputs of a mixture."""
        return ("joint", "dims") if self.of == "both" else (self.of,)

    def leaves(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)

        def made(scale: float, shape: tuple[int, ...] = self.shape, offset: float = 0.0) -> Tensor:
            t = torch.randn(shape, generator=generator) * scale + offset
            return t.to(self.device, self.dtype)

        def made_x(shape: tuple[int, ...] = self.shape) -> Tensor:
            if self.param == "std":
                return made(0.5, shape).abs() + 0.1
            return made(0.5, shape, -2.0 * self.squash)

        if self.op == "mixture_log_prob":
            points, components, dims = self.shape
            tensors = [made(1.0, (points, dims)), made(1.0, (components, dims)), made_x((components, dims))]
        else:
            pairs = [(made(0.5 if self.squash else 1.0), made_x()) for _ in range(2 if self.prior else 1)]
            tensors = [torch.cat(pair, dim=1) for pair in pairs] if self.packed else [t for pair in pairs for t in pair]
        if self.channels_last:
            tensors = [t.contiguous(memory_format=CHANNELS_LAST[t.dim()][0]) for t in tensors]
        return [t.requires_grad_() for t in tensors]

    def split(self, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return mu and the second argument, and the prior's, of packed moments too."""
        return tuple(part for t in leaves for part in t.chunk(2, dim=1)) if self.packed else leaves

    def inputs(self) -> int:
        """Count the elements of the inputs, and so of their gradients."""
        if self.op == "mixture_log_prob":
            points, components, dims = self.shape
            return (points + 2 * components) * dims
        return (4 if self.prior else 2) * math.prod(self.shape)

    def outputs(self) -> int:
        """Count the elements of the outputs, without one number for each row."""
        if self.op == "mixture_log_prob":
            return self.shape[0] * self.shape[2] * (self.of != "joint")
        return self.numel * self.draws

    def words(self) -> tuple[int, int]:
        """The fewest words that forward and backward read and write."""
        return self.inputs() + self.outputs(), 2 * self.inputs() + self.outputs()

    def sigma(self, x: Tensor) -> Tensor:
        match self.param:
            case "logvar":
                return torch.exp(0.5 * x)
            case "logstd":
                return torch.exp(x)
            case "softplus":
                return F.softplus(x) + self.min_std
            case _:
                return x
