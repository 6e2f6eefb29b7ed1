"""Do two versions of a model train alike? Both get the same noise, and rounding is the yardstick."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.noise import randn
from .copies import copied

DROPOUTS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
}
SLACK = 8  # how many times the effect of a rounding two versions may differ


class Difference(NamedTuple):
    """One quantity of one step: the loss, or a parameter's gradient."""

    step: int
    quantity: str
    difference: float  # the norm of (after - before)
    allowed: float

    def __str__(self) -> str:
        name = self.quantity if self.quantity == "loss" else f"the gradient of {self.quantity}"
        return f"step {self.step}, {name}: the difference is {self.difference:.2g}, rounding allows {self.allowed:.2g}"


class TrainingReport(NamedTuple):
    """What assert_same_training compared: the losses of both versions, and every difference."""

    before: list[float]
    after: list[float]
    differences: list[Difference]

    @property
    def largest(self) -> Difference:
        return max(self.differences, key=lambda d: d.difference / d.allowed)

    def __str__(self) -> str:
        return (
            f"{len(self.before)} steps agree: the loss went from {self.before[0]:.6g} to {self.before[-1]:.6g} before, "
            f"and to {self.after[-1]:.6g} after.\nlargest difference: {self.largest}"
        )


def assert_same_training(
    before: nn.Module,
    after: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    loss_after: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.Adam,
    seed: int = 0,
) -> TrainingReport:
    """Train two versions of a model on the same noise and compare the losses and gradients of each step.

        |after - before| <= 8 |rounded - before| + 16 u |before|

    Both versions start from the parameters of `before`. Standard normals that plain torch draws (torch.randn,
    randn_like, normal, Tensor.normal_) are made by rk.randn, and dropout draws from a stream of its own, so that
    mu + sigma * torch.randn_like(mu) and rk.reparameterize get the same eps. "rounded" is the old version with its
    noise scaled by 1 + 2u and by 1 - 2u, where u is the spacing of the noise's dtype at 1: what the model itself makes
    of a rounding. The models and torch's generators stay as they are.

    Args:
        before, after: the two versions, nn.Modules with the same names and shapes of parameters.
        batches: one item for each step.
        loss: (model, batch) -> the scalar to minimise.
        loss_after: the loss of the new version, if that changes too, as when the KL is fused.
        optimizer: parameters -> an optimizer.
        seed: int, of torch's generators.

    Returns:
        A TrainingReport: the losses and every difference; as text, a summary.

    Raises:
        AssertionError: at the first step at which the versions differ by more than rounding explains, or draw
            different random numbers. The text names the quantities.
        RuntimeError: from load_state_dict, if the parameters do not fit.
        ValueError: if there is no batch.

    Source:
        The rounding of a training grows with its steps as that of any iterated map; hence a measured yardstick.

    Example:
        >>> import torch, reparam_kernels as rk
        >>> def plain(model, x):
        ...     mu, logvar = model(x).chunk(2, -1)
        ...     z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        ...     return z.square().mean() - 0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(-1).mean()
        >>> def fused(model, x):
        ...     z, kl = rk.reparameterize_kl(*model(x).chunk(2, -1))
        ...     return z.square().mean() + kl.mean()
        >>> model = torch.nn.Linear(3, 8)
        >>> report = rk.testing.assert_same_training(model, model, torch.ones(5, 2, 3), plain, fused)
        >>> len(report.after)
        5
    """
    old = Run(before, before, loss, optimizer, seed)
    rounded = [Run(before, before, loss, optimizer, seed, spacings=n) for n in (2, -2)]
    new = Run(after, before, loss_after or loss, optimizer, seed)
    report = TrainingReport([], [], [])
    for step, batch in enumerate(batches):
        want, got, *others = (run.step(batch) for run in (old, new, *rounded))
        differences = compare(step, want, got, others)
        report.before.append(want["loss"].item())
        report.after.append(got["loss"].item())
        report.differences.extend(differences)
        if old.drawn != new.drawn:
            raise AssertionError(
                "assert_same_training: both versions must draw the same random tensors in the same order; got other "
                f"states of torch's generators after step {step}. Draw the noise of one call in one tensor in both: "
                "for several samples of a posterior, torch.randn((samples, *mu.shape)) and sample_shape=(samples,)."
            )
        wrong = [d for d in differences if not d.difference <= d.allowed]
        if wrong:
            lines = "\n".join(map(str, sorted(wrong, key=lambda d: -d.difference / d.allowed)[:10]))
            advice = (
                "The gradients agree: the losses differ by a constant, such as log(2 pi) / 2 for each dim."
                if [d.quantity for d in wrong] == ["loss"]
                else "Compare sigma, the KL's dims and its weight in the two versions, and small numbers that one of "
                "them adds, as in log(sigma + 1e-7). If a kink such as ReLU's is near, another seed passes."
            )
            raise AssertionError(
                "assert_same_training: the versions must have the same loss and gradients but for rounding; got\n"
                f"the losses {report.before[-1]:.8g} before and {report.after[-1]:.8g} after\n{lines}\n{advice}"
            )
    if not report.before:
        raise ValueError("assert_same_training: batches must hold an item for each step; got none. Pass a list.")
    return report


def compare(
    step: int, want: dict[str, Tensor], got: dict[str, Tensor], rounded: list[dict[str, Tensor]]
) -> list[Difference]:
    differences = []
    for name, value in want.items():
        effect = max((other[name] - value).norm().item() for other in rounded)
        floor = 16 * torch.finfo(value.dtype).eps * value.norm().item() + torch.finfo(value.dtype).tiny
        differences.append(Difference(step, name, (got[name] - value).norm().item(), SLACK * effect + floor))
    return differences


class Run:
    """One training: a copy of the model, its optimizer, and its own state of torch's generators."""

    def __init__(
        self,
        model: nn.Module,
        start: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        optimizer: Callable[[Any], torch.optim.Optimizer],
        seed: int,
        spacings: int = 0,
    ) -> None:
        self.model, self.loss = copied(model), loss
        self.model.load_state_dict(start.state_dict())
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer(self.parameters.values())
        self.generators = Generators([p.device for p in self.model.parameters()])
        with self.generators.restored():
            torch.manual_seed(seed + 1)
            dropout = self.generators.state()
            torch.manual_seed(seed)
            self.drawn = self.generators.state()
        self.noise = SharedNoise(self.generators, dropout, spacings)

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Do one step. Return the loss and the gradients."""
        with self.generators.restored():
            self.generators.set(self.drawn)
            self.optimizer.zero_grad()
            with self.noise:
                loss = self.loss(self.model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
            self.drawn = self.generators.state()
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.parameters.items()}
        self.optimizer.step()
        return {"loss": loss.detach().clone(), **found}


class Generators:
    """The states of torch's default generators of the CPU and of the devices of a model."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.devices = sorted({d.index for d in devices if d.type == "cuda"})

    def state(self) -> tuple[bytes, ...]:
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in self.devices)]
        return tuple(bytes(s.tolist()) for s in states)

    def set(self, state: tuple[bytes, ...]) -> None:
        cpu, *others = (torch.frombuffer(bytearray(s), dtype=torch.uint8) for s in state)
        torch.set_rng_state(cpu)
        for device, other in zip(self.devices, others, strict=True):
            torch.cuda.set_rng_state(other, device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            yield


class SharedNoise(TorchFunctionMode):
    """Makes torch's normals by rk.randn, scaled by 1 + spacings * eps, and draws dropout from a stream of its own."""

    def __init__(self, generators: Generators, dropout: tuple[bytes, ...], spacings: int) -> None:
        super().__init__()
        self.generators, self.dropout, self.spacings = generators, dropout, spacings

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return self.randn(*args, **kwargs)
        if func is torch.randn_like:
            return self.randn_like(*args, **kwargs)
        if func is torch.normal:
            return self.normal(*args, **kwargs)
        if func is torch.Tensor.normal_:
            return self.normal_(*args, **kwargs)
        if func is nn.init.normal_:  # which calls Tensor.normal_ where no mode sees it
            with torch.no_grad():
                return self.normal_(kwargs.pop("tensor"), **kwargs)
        if func in DROPOUTS:
            return self.from_own_stream(func, args, kwargs)
        return func(*args, **kwargs)

    def scaled(self, eps: Tensor) -> Tensor:
        return eps if self.spacings == 0 else eps * (1 + self.spacings * torch.finfo(eps.dtype).eps)

    def randn(self, *size: Any, **options: Any) -> Tensor:
        named = [options.pop("size")] if "size" in options else []
        eps = randn(*size, *named, **options)
        return self.scaled(eps) if options.get("out") is None else eps.copy_(self.scaled(eps))

    def randn_like(self, like: Tensor, **options: Any) -> Tensor:
        options.pop("memory_format", None)  # which does not change a number
        return self.scaled(randn(like.shape, **{"dtype": like.dtype, "device": like.device, **options}))

    def normal(
        self, mean: Any, std: Any = 1.0, size: Any = None, *, out: Tensor | None = None, **options: Any
    ) -> Tensor:
        with torch.no_grad():
            if size is None:
                eps = self.randn_like(torch.as_tensor(mean) + torch.as_tensor(std), **options)
            else:
                eps = self.randn(size, **options)
            result = eps * std + mean
            return result if out is None else out.copy_(result)

    def normal_(
        self, t: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: torch.Generator | None = None
    ) -> Tensor:
        return t.copy_(self.randn_like(t, generator=generator) * std + mean)

    def from_own_stream(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Dropout does not move the stream of the noise, wherever a version draws its noise."""
        noise = self.generators.state()
        self.generators.set(self.dropout)
        result = func(*args, **kwargs)
        self.dropout = self.generators.state()
        self.generators.set(noise)
        return result
