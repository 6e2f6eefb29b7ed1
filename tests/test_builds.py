"""Builds for another architecture and without OpenMP give the same bits."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reparam_kernels import _C

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


def copied(folder):
    """Copy what a build needs, without a built extension."""
    ignore = shutil.ignore_patterns("_C*.so", "__pycache__")
    for name in ("reparam_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


def setup(folder, machine, *arguments):
    """Run setup.py on a machine of a given name, with a compiler that always fails."""
    code = (
        f"import platform, runpy, sys; platform.machine = lambda: {machine!r}; "
        f"sys.argv = ['setup.py', *{arguments!r}]; runpy.run_path('setup.py', run_name='__main__')"
    )
    env = {**os.environ, "CC": "false", "CXX": "false"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere no build is required")
def test_a_build_error_is_an_error_where_every_release_is_built(tmp_path):
    copied(tmp_path)
    for machine in ("x86_64", "aarch64"):
        done = setup(tmp_path, machine, "build_ext", "--inplace")
        assert done.returncode == 1
        assert "false" in done.stderr.splitlines()[-1]


def test_elsewhere_a_build_error_leaves_the_reference(tmp_path):
    copied(tmp_path)
    done = setup(tmp_path, "riscv64", "bdist_wheel", "-d", "dist")
    assert done.returncode == 0, done.stderr
    assert 'building extension "reparam_kernels._C" failed' in done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}]; "
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]; "
        "import reparam_kernels as rk; print(rk.__file__, rk.randn(4, seed=7)[2].item())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True)
    where, value = done.stdout.split()
    assert where == str(tmp_path / "site/reparam_kernels/__init__.py")
    assert float(value) == pytest.approx(1.788757, abs=1e-5)
    assert "site/reparam_kernels has no extension. Install the package again" in done.stderr


def interpreters():
    """Find the Pythons of this machine that may build the package."""
    found = {}
    for minor in range(10, 15):
        names = [shutil.which(f"python3.{minor}"), *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")]
        for name in filter(None, names):
            probe = [name, "-c", "import sys; print(sys.version_info[1])"]
            done = subprocess.run(probe, capture_output=True, text=True)
            if done.stdout.strip() == str(minor):
                found[f"3.{minor}"] = str(name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", interpreters())
def test_every_python_builds_an_extension_with_the_same_bits(tmp_path, version):
    """Only setuptools and pybind11 are there, and no network."""
    copied(tmp_path)
    for name in ("setuptools", "pybind11"):
        shutil.copytree(Path(importlib.util.find_spec(name).origin).parent, tmp_path / "tools" / name)
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "tools")}
    command = [interpreters()[version], "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    (built,) = (tmp_path / "reparam_kernels").glob("_C*.so")
    probe = (
        "import importlib.util as u; s = u.spec_from_file_location('reparam_kernels._C', " + repr(str(built)) + "); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.test_eps(7, 5, 1000).hex())"
    )
    done = subprocess.run(
        [interpreters()[version], "-c", probe], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == [_C.test_eps(7, 5, 1000).hex()]


@pytest.mark.slow
def test_a_compiler_without_openmp_builds_a_serial_extension(tmp_path):
    """With a compiler that refuses -fopenmp, setup.py builds kernels that run on one thread and report it."""
    for name in ("cc", "c++"):
        wrapper = tmp_path / name
        real = shutil.which("gcc" if name == "cc" else "g++")
        wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" -fopenmp "*) exit 1;; esac\nexec {real} "$@"\n')
        wrapper.chmod(0o755)
    copied(tmp_path)
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
