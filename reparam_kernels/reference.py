"""The ops in plain torch, with the same signatures, to check the kernels against."""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from .core import checks
from .core import window as windows
from .core.window import Window
from .ops import latent, mixture
from .ops.latent.arguments import Density, make_arguments
from .ops.latent.op import LATENT
from .ops.latent.priors import as_pair
from .ops.mixture.arguments import make_arguments as make_mixture_arguments
from .ops.mixture.op import MIXTURE
from .ops.noise.formula import reference_noise

__all__ = [
    "kl_divergence",
    "mixture_log_prob",
    "randn",
    "reparameterize",
    "reparameterize_kl",
    "reparameterize_log_prob",
    "reparameterize_mc_kl",
]


def randn(
    *size: Any,
    seed: Any = None,
    generator: torch.Generator | None = None,
    window: Window | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Tensor:
    """Draw the noise of reparam_kernels.randn, equal within its accuracy but not bit for bit."""
    checks.some_size("reference.randn", size)
    checks.float_dtype("reference.randn", dtype)
    shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
    where = torch.device(device) if device is not None else torch.get_default_device()
    seed, place = windows.place("reference.randn", seed, generator, where, shape, window)
    return reference_noise(seed, shape, 1, place).float().to(dtype or torch.get_default_dtype())


def _in_plain_torch(
    function: Callable[..., Any], z: bool = False, kl: bool = False, density: Callable[..., Density] | None = None
) -> Callable[..., Any]:
    """Make a public function that runs the formula in place of the kernels."""
    where = f"reference.{function.__name__}"
    keywords = inspect.signature(function).parameters

    @wraps(function)
    def plain(mu: Any, logvar: Any, **options: Any) -> Any:
        for name in options:
            if name not in keywords:
                raise TypeError(f"{where}() got an unexpected keyword argument {name!r}")
        if density is not None:
            options["density"] = density(**{name: options.pop(name) for name in Density._fields if name in options})
        if "prior" in options:
            param, min_std = options.get("param", "logvar"), options.get("min_std", 0.0)
            options["prior"] = as_pair(where, options["prior"], param, min_std)
        arguments = make_arguments(where, mu, logvar, z, kl, **options)
        outputs = [t for t in LATENT.in_place_of_kernels(arguments) if t is not None]
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    return plain


reparameterize = _in_plain_torch(latent.reparameterize, z=True)
kl_divergence = _in_plain_torch(latent.kl_divergence, kl=True)
reparameterize_kl = _in_plain_torch(latent.reparameterize_kl, z=True, kl=True)
reparameterize_log_prob = _in_plain_torch(latent.reparameterize_log_prob, z=True, density=Density)
reparameterize_mc_kl = _in_plain_torch(latent.reparameterize_mc_kl, z=True, density=partial(Density, minus_log_p=True))


@wraps(mixture.mixture_log_prob)
def mixture_log_prob(*args: Any, **options: Any) -> Any:
    arguments = make_mixture_arguments("reference.mixture_log_prob", *args, **options)
    joint, dims = MIXTURE.in_place_of_kernels(arguments)
    return (joint, dims) if arguments.config.of == "both" else dims if joint is None else joint
