"""`python -m bench.pages` writes the tables of README.md and docs/ from the committed results; --check compares."""

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from .charts import LABELS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
PAGES = [ROOT / "README.md", ROOT / "docs/performance.md"]
SHORT = ("8x30", "128x20", "512x128", "1024x1024")
LIMITS = {"of copy": "of_bandwidth", "of noise": "of_noise"}
Row = dict[str, str]


def read(*folders: str) -> list[Row]:
    """Read the results of some parts, without those that have not been measured."""
    rows = []
    for path in (RESULTS / folder / "results.csv" for folder in folders):
        if path.exists():
            with open(path, newline="") as file:
                rows += list(csv.DictReader(file))
    return rows


def ratios(rows: list[Row], *names: str, limits: dict[str, str] = LIMITS) -> str:
    """Format one line per case: our time, each peer's as a multiple of it, and our share of the limits."""
    limits = {name: key for name, key in limits.items() if any(row[key] for row in rows)}
    cases: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["op"] != "noise":
            cases[tuple(row[n] for n in (*names, "shape", "pass"))][row["provider"]] = row
    present = {row["provider"] for row in rows}
    peers = {key: name for key, name in LABELS.items() if key in present}
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
        lines.append("| " + " | ".join((*which, spaced(size), passes, shown, *times, *reached)) + " |")
    return "\n".join(lines) + "\n"


def spaced(shape: str) -> str:
    return re.sub(r"(?<=\d)x(?=\d)", " x ", shape)


def measured(folder: str, *names: str, op: str = "") -> str:
    rows = [row for row in read(folder) if op in ("", row["op"])]
    if not rows:
        return f"Not measured yet: `python -m bench {folder}`.\n"
    return ratios(rows, *names) + "\n" + conditions(rows)


def conditions(rows: list[Row]) -> str:
    known = rows[0]
    spread = max(abs(float(row["ratio_to_ours"]) - 1) for row in rows if row["provider"] == "ours again")
    copy = f" A plain copy: {float(known['copy_gb_s']):.0f} GB/s." if known.get("copy_gb_s") else ""
    return (
        f"{known['machine']}, {known['isa']}, {known['threads']} thread, torch {known['torch']}, commit "
        f"{known['commit']}; medians of interleaved runs of thread CPU time. The same code measured twice differs by "
        f"up to {spread:.0%}.{copy}\n"
    )


def short() -> str:
    """Make the table of README: the op at three sizes, its parts at small ones, the noise, whole training steps."""
    rows = [row for row in read("", "small") if row["provider"] != "compile" or row["op"] == "kl"]  # its noise is slow
    noise = [row for row in rows if row["op"] == "noise" and row["provider"] == "torch.randn"]

    def each(of: list[Row], digits: int) -> str:
        return ", ".join(f"{spaced(row['shape'])} {float(row['ratio_to_ours']):.{digits}f}x" for row in of)

    return "\n".join(
        (
            ratios([row for row in rows if row["shape"] in SHORT and row["pass"] != "forward"], "op", limits={}),
            conditions(rows),
            f"torch.randn against rk.randn: {each(noise, 1)}.\n",
        )
    )


def steps() -> str:
    """Make the table of whole training steps."""
    rows = read("steps", "recurrent")
    present = [name for name in LABELS if name in {row["provider"] for row in rows}]
    by: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by[row["shape"]][row["provider"]] = row
    lines = [
        "| " + " | ".join(("step", "ours", *(LABELS[name] for name in present))) + " |",
        "|---" * (2 + len(present)) + "|",
    ]
    for name, own in by.items():
        times = [f"{float(own[peer]['ratio_to_ours']):.2f}x" if peer in own else "" for peer in present]
        lines.append("| " + " | ".join((spaced(name), f"{float(own['ours']['us_q50']) / 1e3:.2f} ms", *times)) + " |")
    return "\n".join(lines) + "\n\n" + conditions(rows)


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
    "steps": steps,
    "cold": lambda: measured("cold", "op"),
    "ops": lambda: ratios(read("ops", "packed"), "op"),
    "densities": lambda: measured("densities", "op"),
    "mixtures": lambda: measured("mixtures", "op"),
    "half": lambda: ratios(read("half"), "dtype"),
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
