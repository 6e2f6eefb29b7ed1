"""Adapters for packages that have a Gaussian bottleneck of their own; none of them is imported before its patch()."""

from . import diffusers, ldm, pyro, scvi

__all__ = ["diffusers", "ldm", "pyro", "scvi"]
