"""Compiles the kernels as a launch would, for a GPU that need not exist, and counts their machine code.

A stub driver replaces that of the GPU: the launcher runs on CPU tensors, and Triton specialises on the arguments and
compiles for the target, but launches nothing. The count is that of one thread's instructions per element, from entry to
exit, with address arithmetic and row sums, without padding and the slow paths of divisions and square roots.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from reparam_kernels.core import backends
from reparam_kernels.gpu.launch import PLANS
from reparam_kernels.ops.latent import triton as latent
from reparam_kernels.ops.noise import triton as noise

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


class Launch(NamedTuple):
    """One kernel as it would have been launched."""

    name: str
    target: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    code: Any  # Triton's compiled kernel


class Stub:
    """A driver without a device, which is enough for Triton to specialise and compile."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)  # Triton keeps a cache for each device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(target: str) -> Iterator[list[Launch]]:
    """Run the package's ops on CPU tensors; compile each launch for the target and record it."""
    assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET is set: the interpreter does not compile"
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        code = run(self, *args, grid=grid, warmup=True, **constants)
        constants |= {p.name: value for p, value in zip(self.params, args, strict=False) if p.is_constexpr}
        launches.append(Launch(self.__name__, target, grid, args, constants, code))

    try:
        with (
            mock.patch.object(JITFunction, "run", record),
            mock.patch.object(latent, "compiler", return_value=TARGETS[target].backend),
            mock.patch.object(noise, "compiler", return_value=TARGETS[target].backend),
            mock.patch.object(backends, "backend_name", return_value="triton"),
        ):
            backends.kernels.cache_clear()
            PLANS.clear()
            driver.set_active(Stub(target))
            yield launches
    finally:
        backends.kernels.cache_clear()
        PLANS.clear()


class Census(NamedTuple):
    """The instructions that a thread of the kernel issues, and its resources."""

    kernel: str
    target: str
    elements: float  # per thread
    instructions: float  # per element
    registers: int
    spills: int  # bytes of stack and local memory, or spilled registers
    shared: int  # bytes per block
    threads: int  # per block
    classes: dict[str, float]  # instructions per element, by class
    loads: Counter[int]  # their number, by bits per thread
    stores: Counter[int]
    forbidden: list[str]  # contracted, approximate or flushing arithmetic, float atomics


def census(launch: Launch, elements: int) -> Census:
    """Count a launch that computes this many elements in all."""
    read = sass if TARGETS[launch.target].backend == "cuda" else amdgcn
    return read(launch, elements)


# ---- NVIDIA


def tool(name: str, *args: str) -> str:
    folder = Path(triton.knobs.nvidia.cuobjdump.path).parent
    return subprocess.run([folder / name, *args], capture_output=True, text=True, check=True).stdout


def hot_path(lines: list[tuple[int, str]], guarded_loops: bool = False) -> list[str]:
    """Return the kernel's instructions without padding, subroutines, and the blocks that call them.

    guarded_loops: also leave out loops behind a branch, in which sin and cos reduce arguments beyond 100000.
    """
    aim = {a: int(m[1], 16) for a, t in lines if (m := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", t))}
    for a, to in list(aim.items()) if guarded_loops else []:
        around = [(aim[b] - b, b) for b in aim if b < to < a < aim[b]]
        if to < a and around:
            _, b = min(around)
            lines = [(at, t) for at, t in lines if not b < at < aim[b]]
    end = next((i for i, (a, _) in enumerate(lines) if aim.get(a) == a), len(lines))  # the closing jump to itself
    lines = lines[:end]
    starts = set(aim.values())
    blocks: list[list[str]] = [[]]
    joined = [True]  # whether a block is entered from elsewhere than the previous one
    for a, t in lines:
        if blocks[-1] and (a in starts or re.search(r"\b(BRA|CALL|EXIT)\b", blocks[-1][-1])):
            blocks.append([])
            joined.append(a in starts)
        blocks[-1].append(t)
    kept: list[str] = []
    cold = False
    for block, join in zip(blocks, joined, strict=True):
        calls = any("CALL" in t for t in block)
        cold = calls or (cold and not join)  # the blocks after a call, until others join
        if not cold:
            kept += block
    return [t for t in kept if not t.startswith("NOP")]


KINDS = {
    "packed": r"F(ADD|MUL|FMA)2",  # two float32 operations
    "float": r"F(ADD|MUL|FMA|MNMX|SEL|SETP|CHK|SWZADD)|DADD|DMUL|DFMA|DSETP|DMNMX",
    "half": r"H(ADD|MUL|FMA|SETP)2",
    "multiply": r"IMAD\.(WIDE|HI)|UIMAD\.WIDE",
    "convert": r"I2F|F2I|F2F|I2I|FRND|F2FP",
    "special": r"MUFU",
    "memory": r"LD[GSL]|ST[GSL]|ATOM|RED",
    "shuffle": r"SHFL|BAR|BSSY|BSYNC|WARPSYNC|BRA|EXIT|CALL|RET",
}


def kind(op: str) -> str:
    return next((name for name, pattern in KINDS.items() if re.match(pattern, op)), "integer")


def disassembled(launch: Launch) -> tuple[list[tuple[int, str]], str]:
    """Return addresses and instructions, and the resource usage."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(launch.code.asm["cubin"])
        text, usage = tool("cuobjdump", "-sass", str(file)), tool("cuobjdump", "-res-usage", str(file))
    return [(int(a, 16), t) for a, t in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text, re.M)], usage


def sass(launch: Launch, elements: int) -> Census:
    lines, usage = disassembled(launch)
    hot = hot_path(lines, guarded_loops=not launch.args)  # our kernels have no such loops, but loops over samples
    ops = [re.sub(r"^@!?U?P\w+\s+", "", t).split()[0] for t in hot]
    threads = launch.constants["num_warps"] * 32
    share = elements / (threads * programs(launch))
    used = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL", "SHARED")}  # type: ignore[index]
    local = sum(op.startswith(("LDL", "STL")) for op in ops)
    return Census(
        launch.name,
        launch.target,
        share,
        len(ops) / share,
        used["REG"],
        used["STACK"] + used["LOCAL"] + local,
        launch.code.metadata.shared,
        threads,
        {name: n / share for name, n in Counter(map(kind, ops)).items()},
        Counter(width(op) for op in ops if op.startswith("LDG")),
        Counter(width(op) for op in ops if op.startswith("STG")),
        impure(launch.code.asm["ptx"]),
    )


def width(op: str) -> int:
    match = re.search(r"\.(U8|S8|U16|S16|64|128)", op)
    return {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}[match[1]] if match else 32


# The only approximation is in sqrt_rn of gpu/philox.py, whose two corrections then round as sqrt.rn does.
ROOT = r"rsqrt\.approx\.ftz\.f32"


def impure(ptx: str) -> list[str]:
    ops = re.findall(r"\b(?:add|sub|mul|fma|div|sqrt|rsqrt|rcp|ex2|lg2|sin|cos|mad|cvt)\.[\w.]*", ptx)
    ops += re.findall(r"\b(?:atom|red)\.[\w.:]*f(?:16|32|64)\b", ptx)
    return sorted({op for op in ops if not re.fullmatch(ROOT, op) and not exact(op)})


def exact(op: str) -> bool:
    """Return True for an integer operation, or one that rounds correctly."""
    if re.match(r"atom|red", op) or re.search(r"\.(approx|ftz|full)\b", op):
        return False
    if not re.search(r"\.b?f(16|32|64)", op):
        return True
    if op.startswith("cvt"):
        return ".rn" in op or op in WIDENING
    return ".rn" in op


WIDENING = ("cvt.f32.bf16", "cvt.f32.f16", "cvt.f64.f32", "cvt.f64.f16", "cvt.f64.bf16")


def programs(launch: Launch) -> int:
    return launch.grid[0] * (launch.grid[1] if len(launch.grid) > 1 else 1)


# ---- AMD


def amdgcn(launch: Launch, elements: int) -> Census:
    text = launch.code.asm["amdgcn"]
    body = text[text.index(f"{launch.name}:") : text.index(".end_amdhsa_kernel")]
    ops = [m[1] for m in re.finditer(r"^\s+([vs]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+|flat_\w+)\b", body, re.M)]
    ops = [op for op in ops if not op.startswith(("s_nop", "s_code_end", "s_waitcnt"))]
    threads = launch.constants["num_warps"] * 64
    share = elements / (threads * programs(launch))

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

    return Census(
        launch.name,
        launch.target,
        share,
        len(ops) / share,
        field("vgpr_count"),
        field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size"),
        launch.code.metadata.shared,
        threads,
        {name: n / share for name, n in Counter(map(amd_kind, ops)).items()},
        Counter(amd_width(op) for op in ops if re.match(r"(global|buffer|flat)_load", op)),
        Counter(amd_width(op) for op in ops if re.match(r"(global|buffer|flat)_store", op)),
        sorted({op for op in ops if re.search(r"atomic.*f(16|32|64)|v_(exp|log|sin|cos)_f32", op)}),
    )  # fmt: skip


def amd_kind(op: str) -> str:
    return {"v": "vector", "s": "scalar"}.get(op.split("_")[0], "memory")


def amd_width(op: str) -> int:
    match = re.search(r"dwordx(\d)", op)
    return 32 * int(match[1]) if match else 16 if "short" in op else 8 if "byte" in op else 32
