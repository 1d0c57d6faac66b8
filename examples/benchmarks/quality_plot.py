# SPDX-License-Identifier: Apache-2.0
"""The picture of the quality report."""

from pathlib import Path
from typing import Any

from quality_grid import BASELINE
from quality_numbers import ALL, pareto_front

LABELS = {
    "preset": "published preset",
    "filler": "one filler",
    "composition": "composition",
}
STYLES = {
    "preset": {"color": "#9aa5b1", "marker": "s"},
    "filler": {"color": "#1f77b4", "marker": "o"},
    "composition": {"color": "#ff7f0e", "marker": "D"},
}
# What lies further below the front than this is counted, not drawn.
DEPTH = 0.12


def plot(result: dict[str, Any], path: Path) -> None:
    """Exact match over tokens per forward, the Pareto front marked, by prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    groups = [g for g in (ALL, "json") if g in result["prompts"]]
    figure, panels = plt.subplots(
        1, len(groups), figsize=(7.5 * len(groups), 7), squeeze=False, layout="tight"
    )
    for axes, group in zip(panels[0], groups, strict=True):
        _panel(axes, rows, group, result["prompts"][group])
    panels[0][0].legend(loc="lower left")
    figure.savefig(path, dpi=130)


def _panel(axes: Any, rows: list[dict[str, Any]], group: str, count: int) -> None:
    points = [
        (r["tokens_per_forward_by_task"][group], r["exact_match"][group]) for r in rows
    ]
    front = pareto_front(points)
    base = next(i for i, r in enumerate(rows) if r["label"] == BASELINE.label)
    for kind, style in STYLES.items():
        members = [p for p, r in zip(points, rows, strict=True) if r["kind"] == kind]
        if members:
            axes.scatter(
                *zip(*members, strict=True),
                label=LABELS[kind],
                s=22,
                alpha=0.7,
                **style,
            )
    axes.plot(
        *zip(*(points[i] for i in front), strict=True),
        color="black",
        linewidth=1,
        label="Pareto front",
        zorder=0,
    )
    axes.plot(
        *points[base], "*", color="#d62728", markersize=16, label="threshold rule, 0.9"
    )
    # A front ends where more speed costs everything; the picture need not.
    low = points[base][1] - DEPTH
    below = sum(point[1] < low for point in points)
    drawn = [i for i in front if points[i][1] >= low]
    # Numbers, because the names are as long as the front: they stand beside it.
    for number, i in enumerate(drawn, 1):
        axes.annotate(
            str(number),
            points[i],
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            fontweight="bold",
        )
    names = [f"{number:2}  {rows[i]['label']}" for number, i in enumerate(drawn, 1)]
    axes.text(
        0.0,
        -0.16,
        "\n".join(names),
        transform=axes.transAxes,
        va="top",
        fontsize=8,
        family="monospace",
    )
    high = max(point[1] for point in points)
    axes.set(
        xlabel="output tokens per forward",
        ylabel="exact match",
        title=f"{'all tasks' if group == ALL else group}, {count} prompts"
        + (f" ({below} rows below)" if below else ""),
        ylim=(max(0.0, low), high + 0.02),
    )
    axes.grid(alpha=0.3)
