"""Compares a package's class with ours, rebinds it in every loaded module of the package, and restores it."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def find(package: str, where: str, name: str) -> Any:
    """Return what a package has under `where.name`, or raise an error that says what is missing."""
    top = where.partition(".")[0]
    try:
        installed = version(package)
    except PackageNotFoundError:
        raise ModuleNotFoundError(
            f"integrations.{top}.patch: {package} must be installed; got no such package. Install it."
        ) from None
    try:
        return getattr(import_module(where), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise RuntimeError(
            f"integrations.{top}.patch: {package} must have {where}.{name}; got version {installed}: {error}. "
            "Use the adapter's class where your model is built."
        ) from error


# ---- the comparison of two classes


class Behaviour(NamedTuple):
    """What is compared of two instances that are made with the same arguments, besides attributes and signatures.

    values: functions of an instance whose results must be equal.
    draws: functions of an instance and a generator that return samples.
    location, scale: the attributes with the mean and the standard deviation of a sample.
    same_noise: samples must be equal, and random states too; else only their distribution and which states move.
    excepted: the members that are known to differ.
    """

    arguments: tuple[Any, ...]
    values: dict[str, Callable[[Any], Any]]
    draws: dict[str, Callable[[Any, torch.Generator], Tensor]]
    location: str
    scale: str
    same_noise: bool
    excepted: frozenset[str] = frozenset()


def check_behaviour(module: str, package: str, theirs: type, ours: type, *behaviours: Behaviour) -> None:
    """Raise an error that names what differs between the two classes. Random states are as before afterwards."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        found = [line for b in behaviours for line in differences(theirs, ours, b)]
    if found:
        raise RuntimeError(
            f"integrations.{module}.patch: {theirs.__name__} of {package} {version(package)} must behave as the "
            f"adapter does; got {'; '.join(dict.fromkeys(found))}. Use the adapter's class where your model is built."
        )


def differences(theirs: type, ours: type, b: Behaviour) -> Iterator[str]:
    """Yield in words what differs, at most once for each member."""
    names = [n for n in dir(theirs) if not n.startswith("_") and callable(getattr(theirs, n)) and n not in b.excepted]
    for name in ("__init__", *names):
        if not takes_the_calls(getattr(theirs, name), getattr(ours, name, None)):
            yield f"a call of {name} that it takes and the adapter does not"
    a, q = theirs(*b.arguments), ours(*b.arguments)
    for name in dir(a):
        if not name.startswith("_") and name not in b.excepted and not callable(outcome(getattr, a, name)):
            yield from unequal(name, outcome(getattr, a, name), outcome(getattr, q, name))
    for name, value in b.values.items():
        if member(name) not in b.excepted:
            yield from unequal(name, outcome(value, a), outcome(value, q))
    for name, draw in b.draws.items():
        if member(name) not in b.excepted:
            yield from unlike(name, draw, a, q, b)


def member(name: str) -> str:
    return name.partition("(")[0]


def takes_the_calls(theirs: Any, ours: Any) -> bool:
    """Return True if every call that fits their signature fits ours. Defaults are compared by what calls return."""
    if not callable(ours):
        return False
    try:
        a, q = inspect.signature(theirs), inspect.signature(ours)
    except ValueError:  # written in C
        return True
    mine = list(q.parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in mine):
        return True
    for i, p in enumerate(a.parameters.values()):
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        match = q.parameters.get(p.name)
        if match is None or (p.default is not p.empty and match.default is match.empty):
            return False
        if p.kind is p.POSITIONAL_OR_KEYWORD and (i >= len(mine) or mine[i].name != p.name):
            return False
    required = {p.name for p in mine if p.default is p.empty and p.kind is not p.VAR_POSITIONAL}
    return required <= set(a.parameters)


def outcome(f: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a call, or the type of its error."""
    try:
        return f(*args)
    except Exception as error:
        return type(error)


def unequal(name: str, a: Any, q: Any) -> Iterator[str]:
    """Yield what differs between the two values, theirs and ours."""
    if isinstance(a, Tensor) and isinstance(q, Tensor):
        kinds = [(tuple(t.shape), str(t.dtype), str(t.device), t.requires_grad) for t in (a, q)]
        if kinds[0] != kinds[1]:
            yield f"{name}: theirs {kinds[0]}, ours {kinds[1]}"
        elif not torch.allclose(a, q, rtol=1e-4, atol=1e-5, equal_nan=True):
            yield f"{name}: values that differ by up to {(a - q).abs().max().item():.2g}"
    elif type(a) is not type(q) or (has_equality(a) and a != q):
        yield f"{name}: theirs {a}, ours {q}"


def has_equality(value: Any) -> bool:
    """Return False for an object that is equal only to itself."""
    return getattr(type(value), "__eq__", None) is not object.__eq__


def unlike(
    name: str, draw: Callable[[Any, torch.Generator], Tensor], theirs: Any, ours: Any, b: Behaviour
) -> Iterator[str]:
    """Yield what differs between samples of the two."""
    z, states, moved = drawn(draw, theirs)
    y, states_of_ours, moved_by_ours = drawn(draw, ours)
    if not torch.equal(y, drawn(draw, ours)[0]):
        yield f"{name}: samples of ours that a seed does not repeat"
    if moved != moved_by_ours:
        yield f"{name}: another generator that advances"
    if b.same_noise:
        yield from unequal(name, z, y)
        if not all(map(torch.equal, states, states_of_ours)):
            yield f"{name}: another random state afterwards"
        return
    yield from unequal(name, z * 0, y * 0)
    location, scale = (getattr(theirs, attribute).double() for attribute in (b.location, b.scale))
    eps, n = (y.detach().double() - location) / scale, y.numel()
    if not (abs(eps.mean()) < 5 / n**0.5 and abs(eps.var() - 1) < 5 * (2 / n) ** 0.5):
        yield f"{name}: samples of ours that do not have their mean and variance"


def drawn(
    draw: Callable[[Any, torch.Generator], Tensor], posterior: Any
) -> tuple[Tensor, Sequence[Tensor], tuple[bool, ...]]:
    """Return a sample, the state of torch's generator and of the given one afterwards, and which of these moved."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    before = torch.get_rng_state(), generator.get_state()
    z = draw(posterior, generator)
    after = torch.get_rng_state(), generator.get_state()
    return z, after, tuple(not torch.equal(x, y) for x, y in zip(before, after, strict=True))


def normals(theirs: type, more: dict[str, Callable[[Any], Any]] | None = None) -> Behaviour:
    """Return what is compared of a Normal: everything but the values of its noise."""
    g = torch.Generator().manual_seed(0)
    loc, x, value = (torch.randn(4, 60, generator=g, device="cpu") for _ in range(3))

    def kl(p: Any, q: Any) -> Tensor:
        return torch.distributions.kl_divergence(p, q)

    values: dict[str, Callable[[Any], Any]] = {
        "log_prob": lambda q: q.log_prob(value),
        "cdf": lambda q: q.cdf(value),
        "icdf": lambda q: q.icdf(value.sigmoid()),
        "entropy": lambda q: q.entropy(),
        "expand": lambda q: q.expand((3, 4, 60)).stddev,
        "kl_divergence": lambda q: kl(q, type(q)(value, x.cosh())),
        "kl_divergence from theirs": lambda q: kl(theirs(value, x.cosh()), q),
    }
    draws: dict[str, Callable[[Any, torch.Generator], Tensor]] = {
        "sample": lambda q, g: q.sample((5,)),
        "rsample": lambda q, g: q.rsample((5,)),
    }
    arguments = loc.requires_grad_(), x.exp().requires_grad_()
    return Behaviour(arguments, values | (more or {}), draws, "mean", "stddev", same_noise=False)
