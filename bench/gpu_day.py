"""`python -m bench.gpu_day` checks and measures everything that needs a GPU, in parts, and writes one folder.

Each part is a command of its own with a time limit. A part that hangs, fails or is interrupted leaves the others alone,
and a part that has finished is not run again, so a second run goes on where the first was interrupted. No network is
used. The folder gets a log of each part, its CSV files, and page.md, which sets what was measured beside what was
predicted.
"""

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
# The tests whose kernels run on the device, in parts of some minutes each.
TESTS = {
    "latent": ["latent", "noise", "layouts", "modules", "log_prob"],
    "gradients": ["gradients", "zero_gradients", "mixture"],
    "properties": ["properties", "extremes", "op_metadata"],
}
OPS = ("latent", "noise", "sample", "kl", "packed", "prior", "log_prob", "tanh", "both", "joint")
COUNTERS = (
    "dram__bytes.sum",
    "smsp__inst_executed.sum",
    "launch__registers_per_thread",
    "smsp__inst_executed_op_local_ld.sum",
    "smsp__inst_executed_op_local_st.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__time_duration.sum",
)


class Part(NamedTuple):
    """A command, run in the repository."""

    name: str
    command: list[str]
    limit: int = 450  # seconds
    tool: str | None = None  # skipped where this program is missing
    env: dict[str, str] = {}  # noqa: RUF012  no part changes it


def parts(out: Path, device: str, workers: int, rehearse: bool) -> Iterator[Part]:
    """Yield all parts, what is most worth knowing first."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    on_device = {"TEST_DEVICE": device}
    yield Part("environment", [*python, "-m", "reparam_kernels"], 60)
    yield Part("driver", ["nvidia-smi"], 30, "nvidia-smi")
    if not any((ROOT / "reparam_kernels").glob("_C.*.so")):
        yield Part("build", [*python, "setup.py", "-q", "build_ext", "--inplace"], 300)
    yield Part("selftest", [*python, "-m", "reparam_kernels", "selftest", "--device", device], 240)
    few = ["-k", "small or rounded or checkpoint or channels_last or second_device"] if rehearse else []
    cuda = [*pytest, "-m", "cuda", "tests/test_cuda.py", f"--junitxml={out / 'tests-cuda.xml'}", *few]
    yield Part("tests-cuda", cuda, env=on_device)
    times = [*python, "-m", "bench.gpu_times", "--device", device, "--out", str(out)]
    yield Part("times", [*times, *(["--rounds", "2"] if rehearse else [])])
    rounds = ["--rounds", "2", "--quick"] if rehearse else ["--rounds", "20"]
    for op in OPS:
        csv_file = ["--csv", str(out / f"bench-{op}.csv")]
        bench = [*python, "-m", "reparam_kernels", "bench", "--device", device, "--op", op]
        yield Part(f"bench-{op}", [*bench, *rounds, *csv_file])
    for name, files in TESTS.items():
        xml = f"--junitxml={out / f'tests-{name}.xml'}"
        chosen = [f"tests/test_{file}.py" for file in files]
        few = ["-k", "empty or nothing or finite"] if rehearse else ["-n", str(workers)]
        yield Part(f"tests-{name}", [*pytest, *chosen, xml, *few], env=on_device)
    counters = ["ncu", "--csv", "--clock-control", "none", "--metrics", ",".join(COUNTERS)]
    regex = ["--kernel-name", "regex:forward_kernel|backward_kernel"]
    yield Part(
        "counters", [*counters, *regex, *python, "-m", "bench.gpu_times", "--once", "--device", device], 300, "ncu"
    )
    for tool in ("memcheck", "racecheck"):
        small = ["-m", "cuda", "tests/test_cuda.py", "-k", "small_calls"]
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
        # without torch's cache each tensor is an allocation of its own, whose ends the tool knows
        yield Part(
            tool, [*sanitizer, *pytest, *small], 450, sanitizer[0], {**on_device, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )


def run(part: Part, out: Path, limit: float) -> dict[str, object]:
    """Run a part within a limit, with its output in a log, and return how it ended."""
    if part.tool is not None and shutil.which(part.tool) is None:
        return {"result": "skipped", "why": f"{part.tool} is not installed", "seconds": 0}
    begin = time.monotonic()
    with (out / f"{part.name}.log").open("w") as log:
        log.write(f"$ {shlex.join(part.command)}\n")
        log.flush()
        env = {**os.environ, **part.env, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            result = {"result": "finished" if code == 0 else "failed", "why": f"exit status {code}" if code else ""}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            result = {"result": "cut", "why": f"longer than {limit:.0f} s"}
    return {**result, "seconds": round(time.monotonic() - begin, 1)}


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]], columns: list[str]) -> list[str]:
    """Format rows as Markdown."""
    if not rows:
        return ["Nothing was measured.", ""]
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return [*head, *(f"| {' | '.join(str(row.get(c, '')) for c in columns)} |" for row in rows), ""]


def failures(path: Path) -> list[str]:
    """Name the tests that failed in a report, each with its error; nothing if it was never written."""
    if not path.exists():
        return []
    cases = ElementTree.parse(path).getroot().iter("testcase")
    found = []
    for case in cases:
        for problem in (*case.findall("failure"), *case.findall("error")):
            first = (problem.get("message") or "no message").splitlines()[0][:160]
            found.append(f"- `{case.get('classname')}.{case.get('name')}`: {first}")
    return found


def counters(log: Path) -> list[dict[str, str]]:
    """Read what ncu printed: a row for each kernel, a column for each counter, with the least that it should be."""
    if not log.exists():
        return []
    lines = [line for line in log.read_text().splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        kernel = kernels.setdefault(row["ID"], {"kernel": re.sub(r"\(.*", "", row["Kernel Name"])})
        kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(kernels.values())


def page(out: Path, done: dict[str, dict[str, object]]) -> str:
    """Write down what ran, what failed, and each prediction beside what was measured."""
    ran = [{"part": name, **{k: str(v) for k, v in how.items()}} for name, how in done.items()]
    broken = [line for path in sorted(out.glob("tests-*.xml")) for line in failures(path)]
    host = read_csv(out / "host.csv")
    slow = sorted(host, key=lambda row: -float(row["first_us"]))[:5]
    least = sorted(float(row["median_us"]) for row in host)
    environment = out / "environment.log"
    lines = [
        "# A day on a GPU",
        "",
        "```",
        *(environment.read_text().splitlines() if environment.exists() else []),
        "```",
        "",
        "## What ran",
        "",
        *table(ran, ["part", "result", "why", "seconds"]),
        "## Tests that failed",
        "",
        *(broken or ["None."]),
        "",
        "## Kernels: predicted and measured",
        "",
        "Picoseconds per element, the median with the 10% and 90% quantiles. The prediction leaves out latency.",
        "",
        *table(
            read_csv(out / "times.csv"),
            ["device", "dtype", "pass", "predicted_ps", "measured_ps", "q10_ps", "q90_ps", "tb_s", "copy_tb_s"],
        ),
        "## Counters",
        "",
        "Predicted: 12 bytes an element forward and 20 backward in float32, half of that in bfloat16; no local memory.",
        "",
        *table(counters(out / "counters.log"), ["kernel", *COUNTERS]),
        "## The host's time of a step",
        "",
        *([f"Batches of 20 columns: the median step takes {least[len(least) // 2]} us. "] if least else []),
        "The five slowest first steps, of all batches (a new kernel would take a hundred milliseconds):",
        "",
        *table(slow, ["batch", "first_us", "least_us", "median_us"]),
        "## Benchmark",
        "",
    ]
    for op in OPS:
        rows = [
            {**row, "us": f"{float(row['us_q50']):.1f}", "over ours": f"{float(row['ratio_to_ours'] or 'nan'):.2f}"}
            for row in read_csv(out / f"bench-{op}.csv")
        ]
        lines += [f"### {op}", "", *table(rows, ["shape", "dtype", "pass", "provider", "us", "over ours"])]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_day"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="run only these; default: all not run yet")
    parser.add_argument("--list", action="store_true", help="print the parts with their limits, and run nothing")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long; go on another time")
    parser.add_argument("--workers", type=int, default=8, help="processes of a part of tests; default: 8")
    parser.add_argument("--rehearse", action="store_true", help="a little of each part, in Triton's interpreter")
    args = parser.parse_args()
    device = "cpu" if args.rehearse else args.device
    out = args.out.resolve()
    todo = list(parts(out, device, args.workers, args.rehearse))
    names = [part.name for part in todo]
    unknown = [name for name in args.parts or [] if name not in names]
    if unknown:
        parser.error(f"--parts: must be of {', '.join(names)}; got {', '.join(unknown)}.")
    if args.list:
        for part in todo:
            print(f"{part.name:20} {part.limit:4} s  {shlex.join(part.command)}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    state = out / "parts.json"
    done = json.loads(state.read_text()) if state.exists() else {}
    begin = time.monotonic()
    for part in todo:
        if args.parts is not None and part.name not in args.parts:
            continue
        if args.parts is None and done.get(part.name, {}).get("result") in ("finished", "failed", "skipped"):
            continue
        left = args.seconds - (time.monotonic() - begin)
        if left < 20:
            print(f"{part.name:20} not begun: {args.seconds:.0f} s are over")
            continue
        done[part.name] = run(part, out, min(part.limit, left))
        print(f"{part.name:20} {done[part.name]['result']:9} {done[part.name]['seconds']} s {done[part.name]['why']}")
        state.write_text(json.dumps(done, indent=1))
        (out / "page.md").write_text(page(out, done))
    print(f"{out / 'page.md'}")
    return int(any(how["result"] in ("failed", "cut") for how in done.values()))


if __name__ == "__main__":
    sys.exit(main())
