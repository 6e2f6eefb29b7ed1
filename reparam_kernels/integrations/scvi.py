"""The adapter of scvi-tools, whose encoders get our Normal in place of torch's."""

from torch import distributions

from ..distributions import Normal
from .patching import Patch, check_behaviour, find, normals

__all__ = ["patch"]


def patch() -> Patch:
    """Rebind torch's Normal to reparam_kernels.distributions.Normal in every loaded module of scvi.

    scvi makes its posteriors in these modules, so their samples and their KL are fused. A prior that scvi makes inside
    a function, from torch itself, stays torch's; the KL with it is fused nevertheless.

    Args: none.

    Returns:
        A Patch: `rebound` lists the names (they are logged too); `restore()`, or leaving `with`, restores them.

    Raises:
        ModuleNotFoundError, RuntimeError: if scvi-tools is not installed, torch's Normal does not behave as ours, or
            scvi is patched already.

    Example:
        >>> import reparam_kernels as rk
        >>> with rk.integrations.scvi.patch():  # doctest: +SKIP
        ...     scvi.model.SCVI(adata).train()
    """
    find("scvi-tools", "scvi.module", "VAE")  # loads the modules that have the name
    check_behaviour("scvi", "torch", distributions.Normal, Normal, normals(distributions.Normal))
    return Patch("scvi", {distributions.Normal: Normal})
