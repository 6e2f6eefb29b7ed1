"""The profile as text of at most 80 columns, and as a dictionary for --json."""

from typing import Any

from . import options
from .breakdown import PASSES, Profile
from .launches import ncu

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def seconds(value: float) -> str:
    for unit, name in UNITS:
        if value >= 0.9995 * unit:  # which rounds to one
            return f"{value / unit:.3g} {name}"
    return "0"


def size(count: float) -> str:
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.3g} {name}"
    return f"{count:.0f} B"


def text(p: Profile, conditions: dict[str, Any], command: list[str]) -> str:
    """Format all; command is that of the profile, for Nsight Compute to repeat."""
    return "\n\n".join(
        [
            f"{p.case.title}\n{options.text(conditions)}",
            *(providers_table(p, which) for which in PASSES),
            memory_table(p),
            layers_table(p),
            limits_text(p),
            *([launches_text(p, command)] if p.launches["ours"][PASSES[1]] else []),
        ]
    )


def providers_table(p: Profile, which: str) -> str:
    timings = p.timings[which]
    own = timings["ours"].q50
    lines = [f"{which:22} {'median':>9}   {'10 % to 90 %':>19}  {'/ ours':>6}  {'elements/s':>10}"]
    for name, q in timings.items():
        spread = f"{seconds(q.q10)} to {seconds(q.q90)}"
        rate = p.case.numel / q.q50
        lines.append(f"  {name:20} {seconds(q.q50):>9}   {spread:>19}  {q.q50 / own:6.2f}  {rate:10.2e}")
    ours, again = timings["ours"], abs(timings["ours again"].q50 / own - 1)
    noise = max(again, (ours.q90 - ours.q10) / 2 / own, 0.01)
    lines.append(f"  Ratios within {noise:.0%} of 1 are noise: so much ours varies, by round or by run.")
    return "\n".join(lines)


def memory_table(p: Profile) -> str:
    lines = [f"{'memory':22} {'kept for backward':>18} {'peak':>12}"]
    for name, kept in p.saved.items():
        if name != "ours again":
            lines.append(f"  {name:20} {size(kept):>18} {size(p.peak[name]):>12}")
    lines.append("  Kept: beyond inputs and outputs. Peak: of forward+backward, beyond inputs.")
    return "\n".join(lines)


def layers_table(p: Profile) -> str:
    lines = [f"{'where our time goes':32} {PASSES[0]:>17} {PASSES[1]:>20}"]
    for name in p.layers[PASSES[0]]:
        cells = []
        for which in PASSES:
            part = p.layers[which][name]
            cells.append(f"{seconds(part):>9} {part / p.timings[which]['ours'].q50:5.0%}")
        lines.append(f"  {name:30} {cells[0]:>17} {cells[1]:>20}")
    lines.append("  Estimates: each part is measured alone, and the last is what remains.")
    if any(p.layers[which]["arithmetic and memory"] == 0 for which in PASSES):
        lines.append("  The parts took longer than the whole: this machine is busy. Run it again.")
    return "\n".join(lines)


def limits_text(p: Profile) -> str:
    copied, drawn = p.limits.copy_bytes / 1e9, p.limits.noise_elements / 1e9
    lines = [f"limits of the device: a copy {copied:.3g} GB/s, rk.randn {drawn:.3g} G normals/s"]
    for which in PASSES:
        bound = p.bound(which)
        name = max(bound, key=lambda key: bound[key])
        word = {"copy": "for its bytes", "noise": "for its noise"}[name]
        ratio = p.timings[which]["ours"].q50 / bound[name]
        lines.append(f"  {which:18} at least {seconds(bound[name])} {word}; ours {ratio:.3g} times that")
    if p.case.op == "mixture_log_prob":
        lines.append("  Neither counts the arithmetic, an exp for each pair and dim.")
    return "\n".join(lines)


def launches_text(p: Profile, command: list[str]) -> str:
    lines = [f"{'launches of a call':32} {PASSES[0]:>17} {PASSES[1]:>20}"]
    for name, by_pass in p.launches.items():
        if name != "ours again":
            lines.append(f"  {name:30} {by_pass[PASSES[0]].total():17} {by_pass[PASSES[1]].total():20}")
    lines.append("  Ours, of forward+backward:")
    lines += [f"    {count} x {name}"[:80] for name, count in p.launches["ours"][PASSES[1]].items()]
    line = ncu(p.launches["ours"][PASSES[1]], command)
    return "\n".join([*lines, f"the counters of our kernels, by Nsight Compute:\n{line}"] if line else lines)


def as_dict(p: Profile, conditions: dict[str, Any]) -> dict[str, Any]:
    case = p.case._asdict() | {"dtype": p.case.dtype_text, "device": str(p.case.device)}
    return {
        "case": case,
        "conditions": conditions,
        "elements": p.case.numel,
        "seconds": {which: {n: q._asdict() for n, q in by.items()} for which, by in p.timings.items()},
        "bytes_kept": p.saved,
        "bytes_peak": p.peak,
        "seconds_by_part": p.layers,
        "limits": p.limits._asdict(),
        "launches": p.launches,
        "least_seconds": {which: p.bound(which) for which in PASSES},
    }
