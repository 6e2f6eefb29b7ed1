"""The predictions: the bound and the counts are checked against hand-written cases, and the committed table."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

from bench.compiled import Census, hot_path, impure, kind
from bench.static import DEVICES, DTYPES, occupancy, times

ROOT = Path(__file__).parents[1]


def census(registers=72, threads=128, **classes):
    return Census(
        "k", "sm_90", 16, sum(classes.values()), registers, 0, 0, threads, classes, Counter(), Counter(), []
    )  # fmt: skip


def test_the_bound_is_the_slowest_resource():
    """On 132 SMs at 1.755 GHz all SMs make 0.23166 clocks per ps."""
    ps = times(DEVICES["H100"], [census(float=40, integer=16, multiply=4, special=1)], 4, 3)
    assert ps["memory"] == pytest.approx(12 / 3.35)
    assert ps["issue"] == pytest.approx(61 / 128 / 0.23166)
    assert ps["float"] == pytest.approx(40 / 128 / 0.23166)
    assert ps["integer"] == pytest.approx(20 / 64 / 0.23166)
    assert ps["special"] == pytest.approx(1 / 16 / 0.23166)


@pytest.mark.parametrize(
    ("registers", "threads", "expected"),
    [(32, 128, 1.0), (64, 128, 0.5), (72, 128, 0.4375), (65, 128, 0.4375), (255, 256, 0.125), (16, 32, 0.5)],
)
def test_occupancy(registers, threads, expected):
    assert occupancy(census(registers, threads)) == expected


LISTING = [
    "LDG.E.128 R4, desc[UR4][R2.64]",  # 0x00
    "MUFU.RSQ R8, R4",
    "@!P0 BRA 0x60",  # 0x20
    "MOV R0, R4",
    "CALL.REL.NOINC 0xa0",  # 0x40: the slow path
    "BRA 0x70",
    "FMUL R9, R8, R4",  # 0x60
    "STG.E.128 desc[UR4][R2.64], R8",  # 0x70
    "EXIT",
    "BRA 0x90",  # the end: a jump to itself
    "FADD R1, R1, R1",  # the subroutine
    "NOP",
]


def test_the_hot_path_leaves_out_calls_subroutines_and_padding():
    hot = hot_path([(16 * i, line) for i, line in enumerate(LISTING)])
    assert hot == [LISTING[i] for i in (0, 1, 2, 6, 7, 8)]


def test_a_loop_counts_unless_it_is_said_to_be_a_slow_path():
    lines = ["@P0 BRA 0x40", "IADD3 R1, R1, R1, RZ", "FADD R1, R1, R1", "@P1 BRA 0x10", "EXIT", "BRA 0x50"]
    lines = [(16 * i, line) for i, line in enumerate(lines)]
    assert len(hot_path(lines)) == 5
    assert hot_path(lines, guarded_loops=True) == ["@P0 BRA 0x40", "EXIT"]


def test_instructions_have_their_classes():
    ops = ["FFMA", "FFMA2", "IMAD.WIDE.U32", "I2FP.F32.S32", "MUFU.RSQ", "LDG.E.128", "SHFL.BFLY", "LOP3.LUT", "IMAD"]
    classes = ["float", "packed", "multiply", "convert", "special", "memory", "shuffle", "integer", "integer"]
    assert [kind(op) for op in ops] == classes


def test_what_rounds_wrongly_is_named():
    right = ["add.rn.f32", "fma.rn.f32", "rsqrt.approx.ftz.f32", "cvt.rn.bf16x2.f32", "cvt.f32.bf16", "add.s32"]
    wrong = ["add.f32", "mul.rn.ftz.f32", "ex2.approx.f32", "sqrt.approx.f32", "atom.global.add.f32", "cvt.rz.bf16.f32"]
    assert impure("\n".join(f"{op} %r1, %r2;" for op in right)) == []
    assert impure("\n".join(f"{op} %r1, %r2;" for op in right + wrong)) == sorted(wrong)


def test_the_committed_table_is_whole_and_the_docs_show_it():
    rows = list(csv.DictReader((ROOT / "bench/results/gpu_static.csv").read_text().splitlines()))
    by_case = {(r["device"], r["dtype"], r["provider"], r["pass"]): r for r in rows}
    assert len(by_case) == len(rows) == len(DEVICES) * len(DTYPES) * 4
    docs = (ROOT / "docs/gpu.md").read_text()
    for device in DEVICES:
        for dtype in DTYPES:
            (line,) = [line for line in docs.splitlines() if line.startswith(f"| {device}, {dtype} |")]
            shown = [float(x) for x in re.findall(r"(\d+\.\d+) \(", line)]
            order = [(p, w) for w in ("forward", "backward") for p in ("ours", "torch.compile")]
            want = [float(by_case[(device, dtype, *key)]["predicted_ps"]) for key in order]
            assert shown == pytest.approx(want, abs=0.0051)
            assert line.endswith(f"| {(want[1] + want[3]) / (want[0] + want[2]):.2f} |")  # of the whole step
