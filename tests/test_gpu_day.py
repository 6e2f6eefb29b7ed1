"""The day on a GPU survives parts that fail, hang or are cut, goes on where it was cut, and reads what tools print."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_day
from tests.on_device import Kernels, moved

ROOT = Path(__file__).parent.parent
NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","forward_kernel(1, 2)","dram__bytes.sum","Gbyte","0.40"
"0","7","forward_kernel(1, 2)","launch__registers_per_thread","register/thread","72"
"1","7","backward_kernel","dram__bytes.sum","Gbyte","0.67"
"""


def script(text):
    return [sys.executable, "-c", text]


def test_a_part_that_fails_or_hangs_leaves_the_others_and_a_second_run_goes_on(tmp_path, monkeypatch, capsys):
    marks = tmp_path / "marks"
    parts = [
        gpu_day.Part("good", script(f"open({str(marks)!r}, 'a').write('x')")),
        gpu_day.Part("bad", script("print('why it failed'); raise SystemExit(3)")),
        gpu_day.Part("hangs", script("import time; time.sleep(60)"), 1),
        gpu_day.Part("tool", ["nothing"], tool="a-tool-that-nobody-has"),
    ]
    monkeypatch.setattr(gpu_day, "parts", lambda *args: iter(parts))
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path)])
    assert gpu_day.main() == 1
    done = json.loads((tmp_path / "parts.json").read_text())
    assert {name: how["result"] for name, how in done.items()} == {
        "good": "finished",
        "bad": "failed",
        "hangs": "cut",
        "tool": "skipped",
    }
    assert "why it failed" in (tmp_path / "bad.log").read_text()
    parts[2] = gpu_day.Part("hangs", script("pass"))
    gpu_day.main()
    assert marks.read_text() == "x"  # finished, so not run again
    assert json.loads((tmp_path / "parts.json").read_text())["hangs"]["result"] == "finished"
    assert "| bad | failed | exit status 3 |" in (tmp_path / "page.md").read_text()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path), "--parts", "unknown"])
    with pytest.raises(SystemExit):
        gpu_day.main()
    assert "--parts: must be of good, bad, hangs, tool; got unknown." in capsys.readouterr().err


def test_the_counters_of_ncu_become_a_row_for_each_kernel(tmp_path):
    (tmp_path / "log").write_text(NCU)
    assert gpu_day.counters(tmp_path / "log") == [
        {
            "kernel": "forward_kernel",
            "dram__bytes.sum": "0.40 Gbyte",
            "launch__registers_per_thread": "72 register/thread",
        },
        {"kernel": "backward_kernel", "dram__bytes.sum": "0.67 Gbyte"},
    ]


def test_every_part_names_files_that_exist(tmp_path):
    for part in gpu_day.parts(tmp_path, "cuda", 8, rehearse=False):
        assert part.limit <= 480
        for word in part.command:
            assert not word.startswith("tests/") or (ROOT / word).exists(), word


@pytest.mark.parametrize(
    "t",
    [
        torch.arange(24.0).view(4, 6),
        torch.arange(24.0).view(4, 6).t(),
        torch.arange(24.0)[3:21].view(3, 6)[:, 1:4],
        torch.arange(4.0).expand(3, 4),
        torch.zeros(0, 5),
        torch.tensor(7.0),
    ],
)
def test_a_tensor_is_moved_with_its_layout_and_alignment(t):
    got = moved((t, None, 3), "cpu")[0]
    assert got.data_ptr() != t.data_ptr() or t.numel() == 0
    assert (got.shape, got.stride()) == (t.shape, t.stride())
    assert t.numel() == 0 or got.data_ptr() % 16 == t.data_ptr() % 16
    assert torch.equal(got, t)


def test_kernels_on_a_device_return_to_the_cpu_and_fill_in_place():
    class Doubling:
        @staticmethod
        def forward(arguments):
            return arguments[0] * 2, None

        @staticmethod
        def fill_eps(out, seeds):
            out.fill_(seeds.item())

    kernels = Kernels(Doubling, "cpu")
    assert kernels.forward((torch.ones(3),))[0].tolist() == [2, 2, 2]
    out = torch.zeros(4)
    kernels.fill_eps(out, torch.tensor([5]))
    assert out.tolist() == [5] * 4


@pytest.mark.slow
def test_the_day_can_be_rehearsed_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_day", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert {how["result"] for how in parts.values()} <= {"finished", "skipped"}, done.stdout
    page = (tmp_path / "page.md").read_text()
    assert "| CPU | float32 | forward |" in page
    assert "| float32 | forward | ours |" in page
