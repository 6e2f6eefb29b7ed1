"""python -m bench.readme: writes the README's table of speed from the committed results; --check only compares."""

import csv
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/results.csv"
BEGIN, END = "<!-- made by python -m bench.readme -->\n", "<!-- end -->\n"
PEERS = {
    "eager": "eager",
    "distributions": "torch.distributions",
    "compile": "torch.compile",
    "compile fallback": "torch.compile, fallback_random",
}


def table(path: Path) -> str:
    """The main op in float32: our time, and how many times as long each peer takes."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    cases: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        if row["op"] == "latent" and row["dtype"] == "float32":
            cases[row["size"], row["pass"]][row["provider"]] = row
    lines = [
        "| mu | pass | ours | " + " | ".join(PEERS.values()) + " |",
        "|---|---|---|" + "---|" * len(PEERS),
    ]
    for (size, which), by in cases.items():
        ratios = " | ".join(f"{float(by[peer]['ratio_to_ours']):.1f}x" if peer in by else "" for peer in PEERS)
        time = float(by["ours"]["us_q50"])
        shown = f"{time:.0f} us" if time < 1e4 else f"{time / 1e3:.1f} ms"
        lines.append(f"| {size.replace('x', ' x ')} | {which} | {shown} | {ratios} |")
    noise = [row for row in rows if row["op"] == "noise" and row["provider"] == "torch.randn"]
    steps = [row for row in rows if row["op"] == "step" and row["provider"] == "eager"]
    spread = max(abs(float(row["ratio_to_ours"]) - 1) for row in rows if row["provider"] == "ours again")
    known = rows[0]
    said = [
        f"{known['machine']}, {known['isa']}, {known['threads']} thread, torch {known['torch']}, medians of "
        f"interleaved runs of thread CPU time; the same code measured twice differs by up to {spread:.0%}.",
        "torch.randn against rk.randn: "
        + ", ".join(f"{row['size'].replace('x', ' x ')} {float(row['ratio_to_ours']):.1f}x" for row in noise)
        + ".",
        "A whole training step, eager against ours: "
        + ", ".join(f"{row['size']} {float(row['ratio_to_ours']):.2f}x" for row in steps)
        + ".",
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(said) + "\n"


def main() -> None:
    page = ROOT / "README.md"
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    made = before + BEGIN + table(RESULTS) + END + after
    if "--check" in sys.argv:
        sys.exit(made != text)
    page.write_text(made)


if __name__ == "__main__":
    main()
