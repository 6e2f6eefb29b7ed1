"""tests/cpp/fuzz.cpp under the sanitizers, valgrind and libFuzzer: `python -m tests.sanitize`.

Writes tests/reports/sanitize.md. Any finding ends the run.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pybind11

ROOT = Path(__file__).parent.parent
FLAGS = ["-std=c++17", "-g", "-O2", "-fopenmp-simd"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
CHECKS = ["-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
LEVELS = {"baseline": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
QUIET = ["-Wno-pass-failed", "-Wno-bitwise-conditional-parentheses"]
SEED = 1


def build(folder, compiler, levels, flags, sources=("tests/cpp/fuzz.cpp",), link=()):
    """A program or module of the sources and the kernels of these instruction sets; with one, no choice is compiled."""
    choice = "-DREPARAM_X86_LEVELS" if len(levels) > 1 else f"-DREPARAM_ISA={levels[0]}"
    parts = [("csrc/kernels.cpp", [f"-march={LEVELS[level]}", f"-DREPARAM_ISA={level}"]) for level in levels]
    parts += [(source, [choice]) for source in ("csrc/dispatch.cpp", *sources)]
    objects = []
    for source, more in parts:
        objects.append(str(folder / f"{len(objects)}.o"))
        command = [compiler, *FLAGS, *flags, *more, f"-iquote{ROOT / 'csrc'}", "-c", str(ROOT / source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    program = str(folder / "built")
    subprocess.run([compiler, *flags, *objects, "-o", program, *link], check=True)
    return program


def version(tool):
    return subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


def sanitizers(folder):
    flags = ["-fsanitize=address,undefined", *CHECKS, "-fopenmp", "-fno-thread-jumps", "-DFUZZ_MAIN"]
    return "g++", [build(folder, "g++", list(LEVELS), flags), "5000", str(SEED)], 5_000


def valgrind(folder):
    program = build(folder, "g++", ["avx2"], ["-fno-thread-jumps", "-DFUZZ_MAIN"])
    return "valgrind", ["valgrind", "-q", "--error-exitcode=9", program, "1500", str(SEED)], 1_500


def libfuzzer(folder):
    program = build(folder, "clang++", ["avx2"], ["-fsanitize=fuzzer,address,undefined", *CHECKS, *QUIET])
    return "clang++", [program, "-runs=50000", f"-seed={SEED}", "-max_len=512", "-timeout=60"], 50_000


def binding(folder):
    get = sysconfig.get_config_var
    flags = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize=alignment", *CHECKS, *QUIET]
    flags += ["-fvisibility=hidden", f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    link = [f"-L{get('LIBDIR')}", f"-Wl,-rpath,{get('LIBDIR')}", f"-lpython{get('LDVERSION')}"]
    sources = ["csrc/bindings.cpp", "tests/cpp/fuzz_binding.cpp"]
    program = build(folder, "clang++", ["avx2"], flags, sources, link)
    # what CPython leaks at its end is its own
    command = [program, "-runs=100000", f"-seed={SEED}", "-max_len=512", "-timeout=60"]
    command += ["-len_control=0", "-detect_leaks=0"]
    return "clang++", command, 100_000


RUNS = {
    "AddressSanitizer and UndefinedBehaviorSanitizer, baseline, AVX2 and AVX-512": ("g++", sanitizers),
    "valgrind memcheck, AVX2": ("valgrind", valgrind),
    "libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer, AVX2": ("clang++", libfuzzer),
}


def main():
    assert platform.machine() == "x86_64", "the instruction sets named here are x86-64's"
    lines = ["# Memory and undefined behaviour", "", "`make sanitize`; the seed of every run is 1.", ""]
    lines += ["| what | tool | inputs | findings | seconds |", "|---|---|---|---|---|"]
    for what, (tool, prepare) in RUNS.items():
        if shutil.which(tool) is None:
            print(f"{what}: {tool} is not installed, left out")
            lines.append(f"| {what} | not installed | 0 | not run | |")
            continue
        with tempfile.TemporaryDirectory() as folder:
            name, command, inputs = prepare(Path(folder))
            start = time.monotonic()
            environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
            subprocess.run(command, check=True, cwd=folder, env=environment)
            seconds = time.monotonic() - start
        lines.append(f"| {what} | {version(name)} | {inputs} | none | {seconds:.0f} |")
        print(lines[-1])
    (ROOT / "tests/reports").mkdir(exist_ok=True)
    (ROOT / "tests/reports/sanitize.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
