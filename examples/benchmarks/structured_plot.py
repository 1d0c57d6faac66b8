# SPDX-License-Identifier: Apache-2.0
"""The picture of the structured output benchmark."""

from pathlib import Path
from typing import Any

LABELS = {
    "unconstrained": "no schema",
    "fv": "schema",
    "fv_no_guard": "schema, no guard",
    "ar_xgrammar": "AR twin, stock vLLM",
}
COLOURS = {
    "unconstrained": "#9aa5b1",
    "fv": "#1f77b4",
    "fv_no_guard": "#9ecae1",
    "ar_xgrammar": "#ff7f0e",
}


def plot(result: dict[str, Any], path: Path) -> None:
    """Validity by mode and budget, tokens per forward, grammar work by vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    smallest = min(row["vocabulary"] for row in rows)
    _bars(
        axes[0],
        [row for row in rows if row["vocabulary"] == smallest],
        "valid",
        lambda value: f"{100 * value:.0f}",
    )
    axes[0].set(title="Complete and valid outputs", ylabel="share of outputs")
    axes[0].set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes[0].set_ylim(0, 1.12)
    _bars(
        axes[1],
        [r for r in rows if r["vocabulary"] == smallest and r["budget"] == "normal"],
        "tokens_per_forward",
        lambda value: f"{value:.1f}",
    )
    axes[1].set(title="Tokens per forward", ylabel="output tokens per forward pass")
    axes[1].margins(y=0.15)
    _costs(axes[2], rows)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.25)
        ax.set_axisbelow(True)
    figure.savefig(path, dpi=130)


def _bars(axes: Any, rows: list[dict[str, Any]], field: str, text: Any) -> None:
    """One group of bars for each task and budget, a bar for each mode."""
    groups = list(dict.fromkeys((row["task"], row["budget"]) for row in rows))
    modes = [mode for mode in LABELS if any(row["mode"] == mode for row in rows)]
    width = 0.8 / len(modes)
    for place, mode in enumerate(modes):
        found = {(r["task"], r["budget"]): r[field] for r in rows if r["mode"] == mode}
        places = [
            i + (place - (len(modes) - 1) / 2) * width for i in range(len(groups))
        ]
        heights = [found.get(group, 0) for group in groups]
        bars = axes.bar(
            places, heights, 0.92 * width, label=LABELS[mode], color=COLOURS[mode]
        )
        axes.bar_label(bars, [text(h) for h in heights], fontsize=8, padding=2)
    names = {"demo": "trained task", "real": "real schemas"}
    axes.set_xticks(
        range(len(groups)), [f"{names[task]}\n{b} budget" for task, b in groups]
    )


def _costs(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Host microseconds of one request's grammar in one step, beside a forward's."""
    rows = [
        row
        for row in rows
        if row["task"] == "real"
        and row["budget"] == "normal"
        and row["grammar_us_p50"] is not None
        and row["mode"] != "fv_no_guard"
    ]
    groups = list(dict.fromkeys((row["vocabulary"], row["mode"]) for row in rows))
    for place, (row, (_, mode)) in enumerate(zip(rows, groups, strict=True)):
        low, high = row["grammar_us_p50"], row["grammar_us_p99"]
        colour = COLOURS[mode]
        axes.bar(place, low, 0.55, color=colour)
        axes.plot([place, place], [low, high], color=colour, linewidth=2)
        axes.plot(place, high, marker="v", color=colour, markersize=7)
        forward = 1e3 * row["ms_per_forward"]
        axes.plot([place - 0.4, place + 0.4], [forward] * 2, "k--", linewidth=1)
        for value in (low, high):
            axes.annotate(
                f"{value:.0f}", (place, value), (7, 3), textcoords="offset points"
            )
        axes.annotate(
            f"forward {forward / 1e3:.1f} ms",
            (place, forward),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    names = [f"{LABELS[mode]}\n{vocabulary:,} tokens" for vocabulary, mode in groups]
    axes.set_xticks(range(len(groups)), names, fontsize=8)
    axes.set(
        title="Grammar work, p50 (bar) to p99 (mark)",
        ylabel="microseconds per request and step",
        yscale="log",
    )
    axes.margins(y=0.15)
