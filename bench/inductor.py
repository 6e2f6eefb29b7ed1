"""Compiles what torch.compile's backend, Inductor, generates for CUDA, on a machine without a GPU.

Fake tensors on a described CUDA device go through Inductor's lowering, fusion and code generation. Its Triton kernels
are then compiled with its launch configurations. Autotuning among these would take a GPU, so the configuration with the
fewest instructions is counted.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.replace_random import fuse_seed_creation_pass
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from triton.compiler import ASTSource
from triton.runtime import driver

from .compiled import TARGETS, Launch, Stub

SMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}


def formula(mu: Tensor, logvar: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    z = mu + torch.exp(0.5 * logvar) * eps
    return z, 0.5 * (mu.square() + torch.exp(logvar) - 1 - logvar).sum(-1)


def forward(mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    """Compute z, kl and eps. eps is an output, since torch.compile stores its draw for backward."""
    seed = torch.ops.prims.inductor_seed(mu.device)
    eps = torch.ops.prims.inductor_random(list(mu.shape), seed, "randn").to(mu.dtype)
    return *formula(mu, logvar, eps), eps


def backward(mu: Tensor, logvar: Tensor, eps: Tensor, dz: Tensor, dkl: Tensor) -> tuple[Tensor, ...]:
    """Compute the derivatives of formula as autograd does."""
    half = 0.5 * dkl.unsqueeze(-1)
    dlogvar = 0.5 * (dz * eps * torch.exp(0.5 * logvar)) + (half * torch.exp(logvar) - half)
    return dz + half * (2 * mu), dlogvar


def described(target: str) -> list[Any]:
    """Make the patches of torch that describe the device."""
    arch = TARGETS[target].arch
    assert isinstance(arch, int)
    seen = SimpleNamespace(
        major=arch // 10,
        minor=arch % 10,
        multi_processor_count=SMS[target],
        warp_size=32,
        name=target,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        total_memory=80 << 30,
        gcnArchName=None,
        L2_cache_size=50 << 20,
        shared_memory_per_block_optin=160 << 10,
        shared_memory_per_multiprocessor=164 << 10,
        shared_memory_per_block=48 << 10,
    )
    here: Callable[..., Any] = lambda *args, **kwargs: seen  # noqa: E731
    return [
        mock.patch.object(torch.version, "cuda", "12.8"),
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            get_device_properties=here,
            get_device_capability=lambda *args: (arch // 10, arch % 10),
        ),
        mock.patch.multiple(
            CudaInterface,
            is_available=staticmethod(lambda: True),
            current_device=staticmethod(lambda: 0),
            get_compute_capability=staticmethod(lambda device=None: arch),
            get_device_properties=staticmethod(here),
        ),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", staticmethod(here)),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
        mock.patch.object(fake_tensor, "init_gpu_context"),  # a CUDA build of torch would start the driver
    ]


def source(function: Callable[..., Any], inputs: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> str:
    """Generate Inductor's code for a function of fake CUDA tensors."""
    mode = FakeTensorMode()
    with mode:
        tensors = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in inputs]
        traced = make_fx(function, decomposition_table=select_decomp_table())(*tensors)
    traced.graph.eliminate_dead_code()
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        fuse_seed_creation_pass(traced.graph)
        traced.recompile()
        graph = GraphLowering(traced, tensors)
        with V.set_graph_handler(graph):
            graph.run(*tensors)
            code = graph.codegen()[0]
    return str(getattr(code, "value", code))


def kernels(
    function: Callable[..., Any], inputs: Sequence[tuple[tuple[int, ...], torch.dtype]], target: str
) -> list[list[Launch]]:
    """Compile each generated kernel in each of its launch configurations."""
    driver.set_active(Stub(target))
    patches = described(target)
    for patch in patches:
        patch.start()
    try:
        compiled = []
        code = source(function, inputs)
        for name, text in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S):
            compiled.append(configurations(name, text, target))
        return compiled
    finally:
        for patch in patches:
            patch.stop()


def configurations(name: str, text: str, target: str) -> list[Launch]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.py")
        file.write_text(text)
        spec = spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        meta, sizes = tuner.triton_meta, tuner.size_hints
        names = tuner.fn.arg_names
        launches = []
        for config in tuner.configs:
            constants = {**meta.get("constants", {}), **config.kwargs}
            signature = {k: "constexpr" if k in constants else v for k, v in meta["signature"].items()}
            signature |= dict.fromkeys(config.kwargs, "constexpr")
            where = {(names.index(k),): v for k, v in constants.items()}
            code = triton.compile(
                ASTSource(tuner.fn, signature, where, dict(meta["configs"][0])),
                target=TARGETS[target],
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            )
            grid = -(-sizes["x"] // config.kwargs["XBLOCK"])
            launches.append(Launch(name, target, (grid,), (), {"num_warps": config.num_warps, **config.kwargs}, code))
        return launches
