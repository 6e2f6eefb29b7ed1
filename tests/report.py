"""`pytest --report FILE` writes what ran, how long, where, and the figures that tests recorded by record_property.

A figure with the name "table" holds Markdown lines and is printed below the others.
"""

import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import triton

from reparam_kernels import _C
from reparam_kernels.profiling.processor import processor


def memory():
    """ ", 24 GiB", if Linux tells it."""
    try:
        return f", {int(Path('/proc/meminfo').read_text().split()[1]) / 2**20:.0f} GiB"
    except OSError:
        return ""


def machine():
    """The processor, the memory, and the versions of what ran."""
    return (
        f"{processor()}{memory()}, {' '.join(_C.available_isas())}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, triton {triton.__version__}, numpy {np.__version__}"
    )


def table(head, rows):
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(str(cell) for cell in row)} |"
    yield ""


def pytest_addoption(parser):
    parser.addoption("--report", type=Path, metavar="FILE", help="write what ran and its figures, as Markdown")
    parser.addoption("--report-title", default="Tests", help="the report's first line")


def pytest_configure(config):
    config.stash["started"] = time.monotonic()


def pytest_terminal_summary(terminalreporter, config):
    target = config.getoption("report")
    if target is None:
        return
    ran = [
        (outcome, r)
        for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
        for r in terminalreporter.getreports(outcome)
        if r.when == "call" or outcome in ("error", "skipped")
    ]
    counts = {o: sum(outcome == o for outcome, _ in ran) for o, _ in ran}
    command = shlex.join(a for a in sys.argv[1:] if not a.startswith("--report"))
    rows, tables = [], []
    for name in dict.fromkeys(r.nodeid.split("[")[0] for _, r in ran):
        cases = [(o, r) for o, r in ran if r.nodeid.split("[")[0] == name]
        outcomes = ", ".join(
            f"{sum(o == this for o, _ in cases)} {this}" for this in dict.fromkeys(o for o, _ in cases)
        )
        figures = [f for _, r in cases for f in r.user_properties]
        tables += [value for key, value in figures if key == "table"]
        shown = "; ".join(f"{key}: {value}" for key, value in figures if key != "table")
        rows.append((name.removeprefix("tests/"), outcomes, f"{sum(r.duration for _, r in cases):.0f}", shown))
    lines = [
        f"# {config.getoption('report_title')}",
        "",
        f"`pytest {command}`: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())} in "
        f"{time.monotonic() - config.stash['started']:.0f} s.",
        "",
        f"{machine()}.",
        "",
        *table(("test", "cases", "seconds", "figures"), rows),
    ]
    lines += [line for text in tables for line in (text, "")]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines).rstrip() + "\n")
