"""The adapter of Pyro: its Normal over the fused ops."""

from functools import lru_cache
from typing import Any

from .. import distributions
from .patching import Patch, check_behaviour, find, normals

__all__ = ["patch"]


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
        ModuleNotFoundError, RuntimeError: if pyro-ppl is not installed, its Normal does not behave as ours, or it is
            patched already.

    Example:
        >>> import reparam_kernels as rk
        >>> with rk.integrations.pyro.patch():  # doctest: +SKIP
        ...     svi.step(x)
    """
    theirs = find("pyro-ppl", "pyro.distributions", "Normal")
    behaviour = normals(theirs, {"to_event": lambda q: q.to_event(1).entropy()})
    check_behaviour("pyro", "pyro-ppl", theirs, _normal(), behaviour)
    return Patch("pyro", {theirs: _normal()})
