"""The kernels, the binding and the module under sanitizers, valgrind and libFuzzer: `python -m tests.sanitize`.

Writes tests/reports/sanitize.md. Any finding ends the run.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pybind11

from tests.report import machine, table

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-g1", "-O2", "-fopenmp-simd"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
CHECKS = ["-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
LEVELS = {"baseline": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
BINDING = ["csrc/bindings.cpp", "csrc/core/borrowed_tensor.cpp", "csrc/core/huge_pages.cpp"]
QUIET = ["-Wno-pass-failed", "-Wno-bitwise-conditional-parentheses"]
SEED = 1


def build(folder, compiler, levels, flags, sources=("tests/cpp/fuzz.cpp",), link=()):
    """Build a program or module of the sources and the kernels of these instruction sets; one set needs no dispatch."""
    choice = "-DREPARAM_X86_LEVELS" if len(levels) > 1 else f"-DREPARAM_ISA={levels[0]}"
    ops = sorted(ROOT.glob("csrc/ops/*.cpp"))
    parts = [(op, [f"-march={LEVELS[level]}", f"-DREPARAM_ISA={level}"]) for op in ops for level in levels]
    parts += [(source, [choice]) for source in ("csrc/core/dispatch.cpp", *sources)]
    objects = []
    for source, more in parts:
        objects.append(str(folder / f"{len(objects)}.o"))
        more = [*more, f"-iquote{ROOT / 'csrc'}", "-c", str(ROOT / source), "-o", objects[-1]]
        subprocess.run([compiler, *FLAGS, *flags, *more], check=True)
    program = str(folder / "built")
    subprocess.run([compiler, *flags, *objects, "-o", program, *link], check=True)
    return program


def version(tool):
    return subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


def sanitizers(folder):
    flags = ["-fsanitize=address,undefined", *CHECKS, "-fopenmp", "-fno-thread-jumps", "-DFUZZ_MAIN"]
    return "g++", [build(folder, "g++", list(LEVELS), flags), "20000", str(SEED)], {}


def valgrind(folder):
    program = build(folder, "g++", ["avx2"], ["-fno-thread-jumps", "-DFUZZ_MAIN"])
    return "valgrind", ["valgrind", "-q", "--error-exitcode=9", program, "3000", str(SEED)], {}


def fuzzing(program, runs):
    return [program, f"-runs={runs}", f"-seed={SEED}", "-max_len=512", "-len_control=0", "-timeout=60"]


def libfuzzer(folder):
    program = build(folder, "clang++", ["avx2"], ["-fsanitize=fuzzer,address,undefined", *CHECKS, *QUIET])
    return "clang++", fuzzing(program, 100_000), {}


def python_flags():
    return ["-fvisibility=hidden", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]


def binding(folder):
    flags = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize=alignment", *CHECKS, *QUIET, *python_flags()]
    library = sysconfig.get_config_var("LIBDIR")
    link = [f"-L{library}", f"-Wl,-rpath,{library}", f"-lpython{sysconfig.get_config_var('LDVERSION')}"]
    program = build(folder, "clang++", ["avx2"], flags, [*BINDING, "tests/cpp/fuzz_binding.cpp"], link)
    environment = {"PYTHONHOME": sys.base_prefix, "PYTHONMALLOC": "malloc", **KEEPS_LEAKS}
    return "clang++", fuzzing(program, 100_000), environment


def module(folder):
    """Build the extension and run it with numpy. The sanitizers' libraries must be loaded before Python's own."""
    flags = ["-fsanitize=address,undefined", *CHECKS, "-fopenmp", "-fno-thread-jumps", "-fPIC", *python_flags()]
    path = build(folder, "g++", list(LEVELS), flags, BINDING, ["-shared"])
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {"LD_PRELOAD": ":".join(libraries), "PYTHONPATH": str(ROOT), "PYTHONMALLOC": "malloc", **KEEPS_LEAKS}
    return "g++", [sys.executable, "-m", "tests.numpy_driver", path, "600", str(SEED)], environment


KEEPS_LEAKS = {"ASAN_OPTIONS": "detect_leaks=0"}  # CPython's own leaks at exit
WHOLE = "AddressSanitizer and UndefinedBehaviorSanitizer"
RUNS = {
    f"kernels: {WHOLE}, baseline, AVX2 and AVX-512": ("g++", sanitizers),
    "kernels: valgrind memcheck, AVX2": ("valgrind", valgrind),
    f"kernels: libFuzzer, {WHOLE}, AVX2": ("clang++", libfuzzer),
    f"binding: libFuzzer, CPython embedded, {WHOLE}, AVX2": ("clang++", binding),
    f"module: numpy against the formula, {WHOLE}, each instruction set": ("g++", module),
}
NOTES = """\
`tests/cpp/fuzz.cpp` and `fuzz_binding.cpp` say what an input is. Of the kernels' inputs each runs with every
instruction set there is, twice, outputs filled otherwise. "with a result": the other calls of the binding ended in an
exception, as they must. Leaks are looked for in the programs without Python.

Not run: true tensors of 2^20 to 2^62 elements in little memory (stride 0), which only take long; threads in what clang
builds, without OpenMP here; Python under valgrind. UndefinedBehaviorSanitizer's check of alignment is off for the
binding: torch lends float32 at any byte, x86 reads it there, and the fuzzer passes such tensors."""


def figures(output):
    """Read inputs and coverage from the output of the programs."""
    calls = sum(int(n) for n in re.findall(r"(\d+) (?:inputs|calls)$", output, re.M))
    inputs = [int(n) for n in re.findall(r"Done (\d+) runs", output)] or [calls]
    result = re.findall(r"\d+ calls of the kernels' functions, \d+ of them with a result", output)
    edges = [f"{n} edges" for n in re.findall(r"cov: (\d+)", output)[-1:]]
    return inputs[0], "; ".join(edges + result)


def main():
    assert platform.machine() == "x86_64", "the instruction sets named here are x86-64's"
    rows = []
    for what, (tool, prepare) in RUNS.items():
        if shutil.which(tool) is None:
            print(f"{what}: {tool} is not installed, left out")
            rows.append((what, "not installed", 0, "not run", "", ""))
            continue
        with tempfile.TemporaryDirectory() as folder:
            name, command, environment = prepare(Path(folder))
            environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **environment}
            start = time.monotonic()
            done = subprocess.run(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                encoding="utf-8", errors="replace", timeout=1800,  # a hang is a finding
            )  # fmt: skip
            seconds = time.monotonic() - start
        assert done.returncode == 0, f"{what}:\n{done.stdout[-8000:]}"
        inputs, reached = figures(done.stdout)
        rows.append((what, version(name), inputs, "none", reached, f"{seconds:.0f}"))
        print(f"{what}: {inputs} inputs, no findings, {seconds:.0f} s", flush=True)
    lines = ["# Memory and undefined behaviour", "", f"`make sanitize`; the seed of every run is {SEED}.", ""]
    lines += [f"{machine()}.", "", *table(("what", "tool", "inputs", "findings", "reached", "seconds"), rows), NOTES]
    (ROOT / "tests/reports").mkdir(exist_ok=True)
    (ROOT / "tests/reports/sanitize.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
