"""Builds reparam_kernels._C: each file of csrc/ops once per instruction set, the rest once, without torch headers."""

import platform
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# The noise has the same bits everywhere, so the compiler may not contract, reorder or assume anything.
KERNEL_FLAGS = [
    "-O3",
    "-g0",  # debug information names the folders of the machine that built it
    "-fopenmp-simd",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-thread-jumps",  # else GCC vectorises both sides of a choice, with all polynomials
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors are passed only within a file
]
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS = {
        "baseline": ["-march=x86-64"],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }
else:
    LEVELS = {"neon" if platform.machine().lower() in ("arm64", "aarch64") else "portable": []}

# Elsewhere, C++ that does not compile leaves a package that runs in plain torch and says so when it is first used.
MUST_COMPILE = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")


class BuildPerInstructionSet(build_ext):
    """Compiles csrc/ops/*.cpp with each level's flags and links all of the objects into the one module."""

    def build_extension(self, ext):
        openmp = ["-fopenmp"] if self.compiles_openmp() else []
        names = list(LEVELS)
        macros = [("REPARAM_X86_LEVELS", None)] if len(names) > 1 else [("REPARAM_ISA", names[0])]
        ext.define_macros += macros
        ext.extra_compile_args += ["-O2", *openmp]
        ext.extra_link_args += openmp
        for name, flags in LEVELS.items():
            ext.extra_objects += self.compiler.compile(
                sorted(map(str, Path("csrc/ops").glob("*.cpp"))),
                output_dir=str(Path(self.build_temp) / name),
                macros=[("REPARAM_ISA", name)],
                include_dirs=ext.include_dirs,
                extra_postargs=["-std=c++17", *KERNEL_FLAGS, *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)

    def compiles_openmp(self):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, str(Path(folder) / "probe"), extra_postargs=["-fopenmp"])
            except Exception:  # any failure means that there is no OpenMP
                return False
        return True


setup(
    ext_modules=[
        Pybind11Extension(
            "reparam_kernels._C",
            ["csrc/bindings.cpp", *sorted(map(str, Path("csrc/core").glob("*.cpp")))],
            include_dirs=["csrc"],
            depends=sorted(map(str, Path("csrc").rglob("*.*"))),
            cxx_std=17,
            optional=not MUST_COMPILE,
        )
    ],
    cmdclass={"build_ext": BuildPerInstructionSet},
)
