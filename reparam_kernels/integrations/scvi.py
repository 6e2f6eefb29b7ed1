"""scvi-tools: its encoders' torch Normal becomes ours."""

from torch import distributions

from ..distributions import Normal
from .patching import Patch, require

__all__ = ["patch"]

KNOWN = ("1.4.2",)


def patch() -> Patch:
    """Rebind torch's Normal to reparam_kernels.distributions.Normal in every loaded module of scvi.

    Posteriors are made there, so that their samples and their KL are the fused ops'. A prior that scvi makes inside a
    function, from torch itself, stays torch's; the KL with it is ours all the same.

    Args: none.

    Returns:
        A Patch: `rebound` lists the names (they are logged too); `restore()`, or leaving `with`, puts them back.

    Raises:
        ModuleNotFoundError, RuntimeError: scvi-tools is not there, not of a version that this was tested with, or
            patched already.

    Example:
        >>> import reparam_kernels as rk
        >>> with rk.integrations.scvi.patch():  # doctest: +SKIP
        ...     scvi.model.SCVI(adata).train()
    """
    require("scvi-tools", "scvi", KNOWN)
    import scvi.module  # noqa: F401

    return Patch("scvi", {distributions.Normal: Normal})
