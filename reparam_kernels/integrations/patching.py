"""Rebinds classes in every loaded module of a package, logs which, and restores them."""

import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

log = logging.getLogger(__name__)
_patched: set[str] = set()


class Patch:
    """The result of a patch(): `rebound` lists the names; `restore()`, or leaving the with block, restores them.

    Modules that the package loads while it is patched are restored too. Names that your own modules have already
    imported stay as they are.
    """

    def __init__(self, module: str, swaps: dict[type, type]) -> None:
        if module in _patched:
            raise RuntimeError(
                f"integrations.{module}.patch: {module} must not be patched already; got a second patch. "
                "Call restore() on the first."
            )
        self._module, self._swaps = module, swaps
        _patched.add(module)
        self.rebound = self._rebind(swaps)
        log.warning("%s", self)

    def _rebind(self, swaps: dict[type, type]) -> tuple[str, ...]:
        rebound = []
        for name, module in sorted(sys.modules.items()):
            if name.partition(".")[0] == self._module:
                for key, value in list(vars(module).items()):
                    if isinstance(value, type) and value in swaps:
                        setattr(module, key, swaps[value])
                        rebound.append(f"{name}.{key}")
        return tuple(rebound)

    def restore(self) -> None:
        if self._swaps:
            self._rebind({ours: theirs for theirs, ours in self._swaps.items()})
            _patched.discard(self._module)
            self._swaps = {}

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"reparam_kernels rebound {', '.join(self.rebound)}"


def require(package: str, module: str, known: tuple[str, ...]) -> None:
    """Check that `package`, imported as `module`, is installed in a version that its adapter was tested with."""
    where = f"integrations.{module}.patch"
    try:
        installed = version(package)
    except PackageNotFoundError:
        raise ModuleNotFoundError(f"{where}: {package} must be installed; got no such package. Install it.") from None
    if installed not in known:
        raise RuntimeError(
            f"{where}: {package} must be a version that this adapter was tested with, {' or '.join(known)}; "
            f"got {installed}. Install that one, or use the adapter's class where your model is built."
        )
