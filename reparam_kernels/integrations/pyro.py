"""The adapter of Pyro: its Normal over the fused ops."""

from functools import lru_cache
from typing import Any

from .. import distributions
from .patching import Patch, require

__all__ = ["patch"]

KNOWN = ("1.9.2",)


@lru_cache
def _normal() -> type:
    import pyro.distributions

    return type(
        "Normal",
        (distributions.Normal, pyro.distributions.Normal),
        {"__module__": __name__, "__doc__": distributions.Normal.__doc__},
    )


def __getattr__(name: str) -> Any:
    """Make `Normal`, which is reparam_kernels.distributions.Normal with Pyro's methods, when it is first read."""
    if name == "Normal":
        return _normal()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def patch() -> Patch:
    """Rebind Pyro's Normal to this module's `Normal` in every loaded module of pyro; it is a subclass of both.

    Args: none.

    Returns:
        A Patch: `rebound` lists the names (they are logged too); `restore()`, or leaving `with`, restores them.

    Raises:
        ModuleNotFoundError, RuntimeError: if pyro-ppl is not installed, has a version that was not tested, or is
            patched already.

    Example:
        >>> import reparam_kernels as rk
        >>> with rk.integrations.pyro.patch():  # doctest: +SKIP
        ...     svi.step(x)
    """
    require("pyro-ppl", "pyro", KNOWN)
    import pyro.distributions

    return Patch("pyro", {pyro.distributions.Normal: _normal()})
