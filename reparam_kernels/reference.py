"""The ops in plain torch, with the same signatures, to check the kernels against."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .core.seeds import make_seed
from .ops import latent
from .ops.latent.arguments import make_arguments
from .ops.latent.formula import formula
from .ops.noise.formula import reference_noise

__all__ = ["kl_divergence", "randn", "reparameterize", "reparameterize_kl"]


def randn(
    *size: Any,
    seed: Any = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """Draw the noise of reparam_kernels.randn, equal within its accuracy but not bit for bit."""
    shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
    where = torch.device(device) if device is not None else torch.get_default_device()
    seed = make_seed("reference.randn", seed, generator, where, shape[0] if shape else None)
    return reference_noise(seed, shape).float().to(dtype or torch.get_default_dtype())


def _in_plain_torch(function: Callable[..., Any], *, z: bool = False, kl: bool = False) -> Callable[..., Any]:
    """Make a public function that runs the formula in place of the kernels."""
    where = f"reference.{function.__name__}"
    keywords = inspect.signature(function).parameters

    @wraps(function)
    def plain(*args: Any, **options: Any) -> Any:
        for name in options:
            if name not in keywords:
                raise TypeError(f"{where}() got an unexpected keyword argument {name!r}")
        outputs = formula(make_arguments(where, *args, z=z, kl=kl, **options))
        return outputs if z and kl else outputs[0] if z else outputs[1]

    return plain


reparameterize = _in_plain_torch(latent.reparameterize, z=True)
kl_divergence = _in_plain_torch(latent.kl_divergence, kl=True)
reparameterize_kl = _in_plain_torch(latent.reparameterize_kl, z=True, kl=True)
