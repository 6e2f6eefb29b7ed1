"""Gates on the compiled GPU kernels, without a GPU: registers, spills, widths, rounding, instructions per element.

bench/compiled.py compiles them as a launch would, disassembles and counts. The default run checks the main variants on
one NVIDIA and one AMD target; `make test-gpu-code` checks every variant on every target.
"""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import triton

MAIN = ["sm_90", "gfx942"]
EVERY = ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"]

# The most (instructions per element, registers) on sm_90 by triton 3.9. Other NVIDIA targets get SLACK on both, an
# older triton 5 % of the instructions.
BUDGET = {
    ("noise float32", "randn_kernel"): (35, 48),
    ("noise bfloat16", "randn_kernel"): (37, 48),
    ("latent float32", "forward_kernel"): (67, 88),
    ("latent float32", "backward_kernel"): (71, 88),
    ("latent bfloat16", "forward_kernel"): (68, 88),
    ("latent bfloat16", "backward_kernel"): (74, 88),
    ("latent, prior float32", "forward_kernel"): (111, 96),
    ("latent, prior float32", "backward_kernel"): (124, 152),
    ("latent, prior bfloat16", "forward_kernel"): (116, 96),
    ("latent, prior bfloat16", "backward_kernel"): (132, 128),
    ("kl alone float32", "forward_kernel"): (31, 48),
    ("kl alone float32", "backward_kernel"): (31, 56),
    ("kl alone bfloat16", "forward_kernel"): (31, 48),
    ("kl alone bfloat16", "backward_kernel"): (32, 56),
    ("latent, a row a program float32", "forward_kernel"): (63, 88),
    ("latent, a row a program float32", "backward_kernel"): (66, 88),
    ("latent, D of 20 float32", "forward_kernel"): (73, 88),
    ("latent, D of 20 float32", "backward_kernel"): (74, 88),
    ("window, start of fours float32", "forward_kernel"): (70, 88),
    ("window, start of fours float32", "backward_kernel"): (73, 88),
    ("huge rows float32", "forward_kernel"): (64, 88),
    ("huge rows float32", "backward_kernel"): (68, 88),
    ("packed channels bfloat16", "forward_kernel"): (68, 88),
    ("packed channels bfloat16", "backward_kernel"): (74, 88),
}
OLDER = 1.05 if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9) else 1.0
SLACK = {"sm_80": 1.2, "sm_90": 1.0, "sm_100": 1.2}
# AMD: instructions per element and vector registers; a square root takes some twenty more instructions per pair.
BUDGET_AMD = {"noise": (60, 96), "latent": (110, 128), "kl alone": (50, 96), "latent, prior": (160, 192)}


def counts(which, target):
    """Start a process, in which Triton can compile, that prints the counts of the variants' kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu_variants", which, target]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@cache
def started(which):
    """Start all targets at once, since they share only the processor."""
    return {target: counts(which, target) for target in (MAIN if which == "main" else EVERY)}


@cache
def finished(which, target):
    process = started(which)[target]
    out, error = process.communicate()
    assert process.returncode == 0, error
    return json.loads(out)


def failures(count):
    """Return the gates that a kernel fails, as text."""
    target, name, kernel = count["target"], count["variant"], count["kernel"]
    nvidia = target.startswith("sm_")
    wrong = []

    def expect(fine, what):
        if not fine:
            wrong.append(f"{kernel} of '{name}' on {target}: expected {what}")

    expect(count["spills"] == 0, f"no stack and no spills; got {count['spills']}")
    expect(
        not count["forbidden"] or name.endswith("float64"),
        f"correctly rounded arithmetic and no float atomics; got {count['forbidden']}",
    )
    if nvidia:
        expect(count["registers"] <= 168, f"at most 168 registers; got {count['registers']}")
        most, registers = BUDGET.get((name, kernel), (None, None))
        slack = SLACK[target]
    else:
        most, registers = BUDGET_AMD.get(name.rsplit(" ", 1)[0], (None, None))
        slack = 1
    if most is not None:
        expect(
            count["instructions"] <= most * slack * OLDER,
            f"at most {most * slack * OLDER:.0f} instructions an element; got {count['instructions']:.1f}",
        )
        registers = int(registers * slack)
        expect(count["registers"] <= registers, f"at most {registers} registers; got {count['registers']}")
    size = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}[name.rsplit(" ", 1)[1]]
    if count["vector"] == 16 // size and kernel != "row_sum_kernel":
        words = elements_moved(name, kernel)
        if words is not None:
            loads, stores = words
            wide = {what: 128 * count[what].get("128", 0) / (8 * size) for what in ("loads", "stores")}
            expect(
                wide["loads"] >= loads * count["elements"], f"every operand loaded by 128 bits; got {count['loads']}"
            )
            expect(
                wide["stores"] >= stores * count["elements"], f"every result stored by 128 bits; got {count['stores']}"
            )
    return wrong


def elements_moved(name, kernel):
    """Return how many whole tensors a kernel of a plain variant loads and stores."""
    name = name.rsplit(" ", 1)[0]
    prior = 2 * name.endswith("prior")
    if name == "noise":
        return 0, 1
    if name.startswith("kl alone"):
        return (2, 0) if kernel == "forward_kernel" else (2, 2)
    if name.startswith(("latent", "logvar", "logstd", "std", "softplus")):
        return (2 + prior, 1) if kernel == "forward_kernel" else (3 + prior, 2 + prior)
    return None


def gate(which, target):
    counted = finished(which, target)
    assert len(counted) > 10
    wrong = [line for count in counted for line in failures(count)]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("target", MAIN)
def test_the_main_kernels_keep_their_budgets(target):
    gate("main", target)


@pytest.mark.gpu_code
@pytest.mark.parametrize("target", EVERY)
def test_every_kernel_keeps_its_budgets(target):
    gate("every", target)


def same_root(target):
    ours, theirs = json.loads(counts("roots", target).communicate()[0])
    assert ours == theirs
    assert ours == "fma((0.5*rsq(x))*fma(-(rsq(x)*x)*(rsq(x)*x), x), (rsq(x)*x))"


def test_the_square_root_is_what_ptxas_makes_of_a_correctly_rounded_one():
    same_root("sm_90")


@pytest.mark.gpu_code
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_the_square_root_is_that_on_every_nvidia_target(target):
    same_root(target)


def test_every_budget_is_of_a_kernel_that_is_compiled():
    compiled = {(count["variant"], count["kernel"]) for count in finished("main", "sm_90")}
    budgets = {(name, kernel) for name, kernel in BUDGET if name.startswith(("noise", "latent", "kl alone"))}
    assert budgets <= compiled


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 8}, "expected no stack and no spills; got 8"),
        ({"registers": 89}, "expected at most 88 registers; got 89"),
        ({"instructions": 75.0}, "instructions an element; got 75.0"),
        ({"forbidden": ["atom.global.add.f32"]}, "no float atomics; got ['atom.global.add.f32']"),
        ({"loads": {"32": 32}}, "every operand loaded by 128 bits; got {'32': 32}"),
    ],
    ids=["spills", "registers", "instructions", "atomics", "widths"],
)
def test_a_broken_budget_is_named(change, said):
    count = next(
        c for c in finished("main", "sm_90") if (c["variant"], c["kernel"]) == ("latent float32", "forward_kernel")
    )
    assert failures(count) == []
    (line,) = failures({**count, **change})
    assert line.startswith("forward_kernel of 'latent float32' on sm_90: ")
    assert said in line
