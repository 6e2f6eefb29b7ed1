"""`python -m bench.pages` writes the tables of README.md and docs/ from the committed results; --check compares."""

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
PAGES = [ROOT / "README.md", ROOT / "docs/performance.md"]
PEERS = {
    "eager": "eager",
    "distributions": "torch.distributions",
    "compile": "torch.compile",
    "compile fallback": "torch.compile, fallback_random",
    "distributions compiled": "torch.distributions, compiled",
    "ours compiled": "ours, compiled",
}
SHORT = ("8x30", "128x20", "512x128", "1024x1024")
LIMITS = {"of copy": "of_bandwidth", "of noise": "of_noise"}
Row = dict[str, str]


def read(folder: str) -> list[Row]:
    with open(RESULTS / folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def ratios(rows: list[Row], *names: str, limits: dict[str, str] = LIMITS) -> str:
    """Format one line per case: our time, each peer's as a multiple of it, and our share of the limits."""
    cases: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["op"] not in ("noise", "step"):
            cases[tuple(row[n] for n in (*names, "size", "pass"))][row["provider"]] = row
    present = {row["provider"] for row in rows}
    peers = {key: name for key, name in PEERS.items() if key in present}
    lines = [
        "| " + " | ".join((*names, "mu", "pass", "ours", *peers.values(), *limits)) + " |",
        "|---" * (len(names) + 3 + len(peers) + len(limits)) + "|",
    ]
    for (*which, size, passes), by in cases.items():
        ours = by["ours"]
        time = float(ours["us_q50"])
        shown = f"{time:.0f} us" if time < 1e4 else f"{time / 1e3:.1f} ms"
        times = [f"{float(by[peer]['ratio_to_ours']):.1f}x" if peer in by else "" for peer in peers]
        reached = [f"{float(ours[k]):.0%}" if ours[k] else "" for k in limits.values()]
        lines.append("| " + " | ".join((*which, size.replace("x", " x "), passes, shown, *times, *reached)) + " |")
    return "\n".join(lines) + "\n"


def measured(folder: str, *names: str, op: str = "") -> str:
    rows = [row for row in read(folder) if op in ("", row["op"])]
    return ratios(rows, *names) + "\n" + conditions(rows)


def conditions(rows: list[Row]) -> str:
    known = rows[0]
    spread = max(abs(float(row["ratio_to_ours"]) - 1) for row in rows if row["provider"] == "ours again")
    return (
        f"{known['machine']}, {known['isa']}, {known['threads']} thread, torch {known['torch']}, commit "
        f"{known['commit']}; medians of interleaved runs of thread CPU time. The same code measured twice differs by "
        f"up to {spread:.0%}. A plain copy: {float(known['copy_gb_s']):.0f} GB/s.\n"
    )


def short() -> str:
    """Make the table of README: the op at three sizes, its parts at small ones, the noise, whole training steps."""
    rows = read("")
    noise = [row for row in rows if row["op"] == "noise" and row["provider"] == "torch.randn"]
    steps = [row for row in rows if row["op"] == "step" and row["provider"] == "eager"]
    return "\n".join(
        (
            ratios([row for row in rows if row["size"] in SHORT], "op", limits={}),
            conditions(rows),
            "torch.randn against rk.randn: "
            + ", ".join(f"{row['size'].replace('x', ' x ')} {float(row['ratio_to_ours']):.1f}x" for row in noise)
            + ".\n",
            "A whole training step, eager against ours: "
            + ", ".join(f"{row['size']} {float(row['ratio_to_ours']):.2f}x" for row in steps)
            + ".\n",
        )
    )


def scaling() -> str:
    with open(RESULTS / "scaling.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| | rows | cols | threads | op, ns an element | kernel alone |", "|---|---|---|---|---|---|"]
    for row in rows:
        op, kernel = float(row["op_ns"]), float(row["kernel_ns"])
        cells = (row["what"], row["rows"], row["cols"], row["threads"], f"{op:.2f}", f"{kernel:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "short": short,
    "main": lambda: measured("", op="latent"),
    "ops": lambda: ratios(read("ops") + read("packed"), "op"),
    "half": lambda: ratios(read("half"), "dtype"),
    "avx2": lambda: measured("avx2"),
    "zen4": lambda: measured("zen4", "op"),
    "scaling": scaling,
}


def written(text: str) -> str:
    """Return the page with each table replaced between its marks."""
    mark = re.compile(r"<!-- bench (\w+) -->\n.*?<!-- end -->\n", flags=re.S)
    return mark.sub(lambda m: f"<!-- bench {m[1]} -->\n{TABLES[m[1]]()}<!-- end -->\n", text)


def main() -> None:
    stale = [page for page in PAGES if written(page.read_text()) != page.read_text()]
    if "--check" in sys.argv:
        sys.exit(" ".join(page.name for page in stale) or 0)
    for page in stale:
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
