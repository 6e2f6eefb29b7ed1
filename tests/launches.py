"""The GPU launches of a call: kernel, grid, arguments and constants, recorded instead of run.

    with recording() as launches:
        rk.reparameterize_kl(mu, logvar)
    launches[0].arguments["cols"], launches[0].constants["VEC"]

Tensors may be meta tensors, which have shapes and strides and no storage, so 2^45 elements cost nothing.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton.language as tl

from reparam_kernels.core import backends
from reparam_kernels.gpu import launch as launcher
from reparam_kernels.gpu import plan as planner
from reparam_kernels.ops.latent import triton as latent
from reparam_kernels.ops.mixture import triton as mixture
from reparam_kernels.ops.noise import triton as noise

LAUNCHERS = (latent, mixture, noise)
OUTPUTS = {"out_ptr", "z_ptr", "kl_ptr", "log_q_ptr", "dmu_ptr", "dx_ptr", "dmu_p_ptr", "dx_p_ptr"}


class Launch(NamedTuple):
    kernel: Any  # Triton's function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # of run time, by the names of the kernel's parameters
    compile_time: dict[str, Any]  # as passed: OPTIONS, TILING, num_warps, ...

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def constants(self) -> dict[str, Any]:
        return constants_of(self.compile_time)

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [t for name, t in self.arguments.items() if name in OUTPUTS and t is not None]

    @property
    def inputs(self) -> list[torch.Tensor]:
        given = leaves([value for name, value in self.arguments.items() if name not in OUTPUTS])
        return [t for t in given if isinstance(t, torch.Tensor)]

    def compiled(self) -> Any:
        """The kernel compiled for Triton's active driver, specialised on these very arguments."""
        return self.kernel.run(*self.arguments.values(), grid=self.grid, warmup=True, **self.compile_time)

    def passed(self, compiled: Any) -> list[Any]:
        """Return what the compiled kernel takes, in order: tensors and numbers that are not constants."""
        return kept([compiled.src.signature[name] for name in self.arguments], list(self.arguments.values()))


def constants_of(compile_time: dict[str, Any]) -> dict[str, Any]:
    """The compile-time constants of a launch, those in records by their fields."""
    flat: dict[str, Any] = {}
    for name, value in compile_time.items():
        flat.update(value._asdict() if hasattr(value, "_asdict") else {name: value})
    return flat


def leaves(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (tuple, list)) else [value]


def kept(signature: Any, value: Any) -> list[Any]:
    """The leaves whose type in the signature is not constexpr."""
    if isinstance(signature, (tuple, list)):
        return [leaf for parts in zip(signature, value, strict=True) for leaf in kept(*parts)]
    return [] if signature == "constexpr" else [value]


@contextmanager
def replaced(**names: Any) -> Iterator[None]:
    """Replace each name in every op's launch module that has it."""
    with ExitStack() as stack:
        for module in LAUNCHERS:
            for name, value in names.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextmanager
def planned(grid_limit: int | None = None, grid_2d_width: int | None = None, **tiling: Any) -> Iterator[None]:
    """Plan launches with other grid limits. tiling: fields of the plan's Tiling to override."""
    before = planner.GRID_LIMIT, planner.GRID_2D_WIDTH

    def plan_launch(spec: planner.LaunchSpec) -> planner.Plan:
        plan = planner.plan_launch(spec)
        return plan._replace(tiling=plan.tiling._replace(**tiling))

    launcher.PLANS.clear()
    planner.GRID_LIMIT = before[0] if grid_limit is None else grid_limit
    planner.GRID_2D_WIDTH = before[1] if grid_2d_width is None else grid_2d_width
    try:
        with replaced(plan_launch=plan_launch):
            yield
    finally:
        planner.GRID_LIMIT, planner.GRID_2D_WIDTH = before
        launcher.PLANS.clear()


@contextmanager
def recording(
    execute: Callable[[Launch], None] | None = None, compiler: str = "cuda", **plan: Any
) -> Iterator[list[Launch]]:
    """Send the ops to the Triton launcher; record each launch and pass it to `execute` instead of running it.

    compiler: as returned by gpu.launch.compiler. plan: the arguments of `planned`.
    """
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], passed: tuple[Any, ...], options: dict[str, Any]) -> None:
        parameters = inspect.signature(kernel.fn).parameters
        given = dict(zip(parameters, passed, strict=False)) | {n: v for n, v in options.items() if n in parameters}
        constant = {name for name, parameter in parameters.items() if parameter.annotation is tl.constexpr}
        arguments = {name: value for name, value in given.items() if name not in constant}
        rest = {name: value for name, value in options.items() if name not in parameters}
        compile_time = {name: given[name] for name in parameters if name in constant} | rest
        launches.append(Launch(kernel, grid, arguments, compile_time))
        if execute is not None:
            execute(launches[-1])

    def planned_launch(launch: launcher.Launch, *tensors: Any) -> None:
        record(launch.kernel, launch.grid, (*tensors, *launch.arguments), launch.options)

    def direct_launch(kernel: Any, grid: tuple[int, ...], device: Any, *arguments: Any, **options: Any) -> None:
        record(kernel, grid, arguments, options)

    backends.kernels.cache_clear()
    try:
        with (
            mock.patch.object(backends, "backend_name", return_value="triton"),
            mock.patch.object(launcher.Launch, "__call__", planned_launch),
            replaced(compiler=lambda: compiler, launch=direct_launch),
            planned(**plan),
        ):
            yield launches
    finally:
        backends.kernels.cache_clear()
