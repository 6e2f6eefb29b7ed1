"""The CPU launch of the noise: csrc/ops/noise.cpp."""

import torch
from torch import Tensor

from ... import _C
from ...core.cpu import explain
from ...core.window import NONE, Window


def fill_eps(out: Tensor, seed: Tensor, window: Window = NONE) -> None:
    """Fill `out`, which is contiguous, with the noise of `seed`."""
    try:
        _C.randn(seed, out, torch.get_num_threads(), *window)
    except _C.InvalidArgument as refusal:
        raise explain(refusal, {"seed": seed, "out": out}) from None
