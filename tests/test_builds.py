"""Builds for another architecture and without OpenMP give the same bits."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = [
    "-std=c++17",
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-thread-jumps",
]


def output(folder, compiler, *, isa, flags=(), runner=()):
    """Build tests/cpp/bits.cpp and return the bytes that it writes."""
    program = folder / isa
    sources = [str(ROOT / path) for path in ("tests/cpp/bits.cpp", "csrc/core/dispatch.cpp", "csrc/ops/latent.cpp")]
    build = [compiler, *FLAGS, *flags, "-Wno-psabi", f"-DREPARAM_ISA={isa}", f"-I{ROOT / 'csrc'}", *sources]
    subprocess.run([*build, "-o", str(program)], check=True)
    return subprocess.run([*runner, str(program)], check=True, capture_output=True).stdout


@pytest.mark.arm
def test_neon_has_the_bits_of_x86(tmp_path):
    """The build is cross-compiled, run under qemu-user, and compared with the x86 build without a vector fma."""
    assert platform.machine() == "x86_64", "this test cross-compiles from x86-64"
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        assert shutil.which(tool), f"{tool} must be installed (Debian: g++-aarch64-linux-gnu, qemu-user)"
    neon = output(
        tmp_path, "aarch64-linux-gnu-g++", isa="neon", flags=["-O3", "-static", "-fopenmp"], runner=["qemu-aarch64"]
    )
    baseline = output(tmp_path, "g++", isa="baseline", flags=["-O3", "-march=x86-64", "-fopenmp"])
    assert len(neon) > 10**6
    assert neon == baseline


@pytest.mark.arm
def test_an_older_x86_gets_kernels_that_it_can_run(tmp_path):
    """A program with all three levels meets no illegal instruction on emulated CPUs without AVX or AVX-512.

    No level leaves a function to the linker that could replace that of another level.
    """
    assert shutil.which("qemu-x86_64"), "qemu-x86_64 must be installed (Debian: qemu-user)"
    levels = {"baseline": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
    compile_ = ["g++", *FLAGS, "-O3", "-Wno-psabi", f"-I{ROOT / 'csrc'}", "-c"]
    objects = [str(tmp_path / f"{name}.o") for name in (*levels, "dispatch", "bits")]
    for (name, march), target in zip(levels.items(), objects, strict=False):
        flags = [f"-march={march}", f"-DREPARAM_ISA={name}", "-o", target]
        subprocess.run([*compile_, *flags, str(ROOT / "csrc/ops/latent.cpp")], check=True)
        symbols = subprocess.run(["nm", "-C", target], check=True, capture_output=True, text=True).stdout
        shared = set(re.findall(r" [A-TV-Zuvw] (.*)", symbols)) - {"DW.ref.__gxx_personality_v0"}
        assert shared == {f"reparam::{name}::latent"}
    for source, target in zip(("csrc/core/dispatch.cpp", "tests/cpp/bits.cpp"), objects[-2:], strict=True):
        subprocess.run([*compile_, "-DREPARAM_X86_LEVELS", "-o", target, str(ROOT / source)], check=True)
    program = str(tmp_path / "levels")
    subprocess.run(["g++", "-static", *objects, "-o", program], check=True)
    native = subprocess.run([program], check=True, capture_output=True).stdout
    assert len(native) > 10**6
    for cpu in ("Nehalem", "SandyBridge", "Haswell"):
        emulated = subprocess.run(["qemu-x86_64", "-cpu", cpu, program], check=True, capture_output=True).stdout
        assert emulated == native, cpu


@pytest.mark.slow
def test_a_compiler_without_openmp_builds_a_serial_extension(tmp_path):
    """With a compiler that refuses -fopenmp, setup.py builds kernels that run on one thread and report it."""
    for name in ("cc", "c++"):
        wrapper = tmp_path / name
        real = shutil.which("gcc" if name == "cc" else "g++")
        wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" -fopenmp "*) exit 1;; esac\nexec {real} "$@"\n')
        wrapper.chmod(0o755)
    for name in ("reparam_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for path in (tmp_path / "reparam_kernels").glob("_C*.so"):
        path.unlink()
    env = {"PATH": "/usr/bin:/bin", "CC": str(tmp_path / "cc"), "CXX": str(tmp_path / "c++")}
    env["LDCXXSHARED"] = f"{tmp_path / 'c++'} -shared"
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, env=env, check=True)
    probe = (
        "import torch, reparam_kernels as rk; from reparam_kernels import _C; torch.set_num_threads(2);"
        "print(_C.has_openmp(), rk.__file__, rk.randn(1 << 20, seed=7).double().sum().item().hex())"
    )
    lines = [
        subprocess.run(
            [sys.executable, "-c", probe], cwd=cwd, check=True, capture_output=True, text=True
        ).stdout.split()
        for cwd in (tmp_path, ROOT)
    ]
    (serial, where, total), (_, _, expected) = lines
    assert serial == "False"
    assert where.startswith(str(tmp_path))
    assert total == expected
