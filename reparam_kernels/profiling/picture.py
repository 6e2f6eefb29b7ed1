"""The profile as one picture. matplotlib is imported only if a picture is asked for."""

from pathlib import Path

from .breakdown import PASSES, Profile
from .report import seconds

COLOURS = {"ours": "#1f5fbf", "ours compiled": "#6f9fdf"}
PART_COLOURS = ["#8c8c8c", "#c9c9c9", "#e0b439", "#3a9a5b", "#1f5fbf"]


def draw(p: Profile, caption: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in p.timings[PASSES[0]] if name != "ours again"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 5.5), constrained_layout=True, width_ratios=(3, 2))
    for row, which in zip(axes, PASSES, strict=True):
        timings, bound = p.timings[which], p.bound(which)
        unit, label = (1e-3, "ms") if max(q.q50 for q in timings.values()) >= 1e-3 else (1e-6, "us")
        left, right = row
        medians = [timings[n].q50 / unit for n in names]
        spread = [
            [(timings[n].q50 - timings[n].q10) / unit for n in names],
            [(timings[n].q90 - timings[n].q50) / unit for n in names],
        ]
        bars = left.barh(names, medians, xerr=spread, color=[COLOURS.get(n, "#e07b39") for n in names], ecolor="black")
        left.bar_label(bars, [f"  {seconds(timings[n].q50)}" for n in names], padding=3)
        limit = max(bound.values()) / unit
        left.axvline(limit, color="black", ls=":", lw=1, label="least time by copy bandwidth and noise rate")
        left.invert_yaxis()
        left.margins(x=0.25)
        left.set(xlabel=f"{label}, with 10 % and 90 % quantiles", title=which)
        start = 0.0
        for (part, value), colour in zip(p.layers[which].items(), PART_COLOURS, strict=True):
            right.barh(["ours"], [value / unit], left=start, color=colour, label=part)
            start += value / unit
        right.axvline(limit, color="black", ls=":", lw=1)
        right.set(xlabel=label, title=f"where our time goes, {which}")
    handles, labels = axes[0][1].get_legend_handles_labels()
    line, text = axes[0][0].get_legend_handles_labels()
    figure.legend(line + handles, text + labels, loc="outside lower center", ncol=3, fontsize=8, frameon=False)
    figure.suptitle(f"{p.case.title}\n{caption}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
