# SPDX-License-Identifier: Apache-2.0
"""The picture of the speculation benchmark."""

from pathlib import Path
from typing import Any

from speculation_frontier import BASELINE

COLOURS = {
    "static": "#9aa5b1",
    "freedave": "#9ecae1",
    "freedave adaptive": "#1f77b4",
    "threshold": "#fdae6b",
    "threshold+freedave": "#a1d99b",
    "threshold+freedave adaptive": "#2ca02c",
    "s2d2_sdar_4": "#d62728",
    "s2d2_sdar_16": "#9467bd",
    "s2d2 always": "#e377c2",
    "s2d2_fast_dllm_v2": "#8c564b",
}
# Where a legend is.
BELOW: dict[str, Any] = {
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.12),
    "frameon": False,
}


def plot(result: dict[str, Any], path: Path) -> None:
    """Exact match over tokens per forward at temperature 0, and speeds over static."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    _frontier(left, [r for r in result["frontier"] if r["temperature"] == 0])
    _speeds(right, result["rows"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)


def _frontier(axes: Any, rows: list[dict[str, Any]]) -> None:
    series = list(dict.fromkeys((row["preset"], row["causal_kv"]) for row in rows))
    for preset, causal_kv in series:
        points = sorted(
            (row["tokens_per_forward"], row["exact_match"], row["threshold"])
            for row in rows
            if (row["preset"], row["causal_kv"]) == (preset, causal_kv)
        )
        is_base = preset == BASELINE
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            "--" if causal_kv else "-",
            marker="o" if is_base else "D",
            markerfacecolor="white" if causal_kv else None,
            color="black" if is_base else COLOURS[preset],
            label=preset + (", token-causal KV" if causal_kv else ""),
            zorder=2 if is_base else 3,
        )
        if is_base and not causal_kv:
            for speed, match, threshold in points:
                axes.annotate(
                    f"{threshold:g}",
                    (speed, match),
                    (0, -13),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
    axes.set(
        xlabel="output tokens per forward of a request",
        ylabel="exact match",
        title="Several right answers: S2D2 over threshold decoding, greedy",
    )
    axes.margins(y=0.12)
    if rows:
        axes.legend(fontsize=8, ncols=2, **BELOW)


def _speeds(axes: Any, rows: list[dict[str, Any]]) -> None:
    found = dict.fromkeys(row["preset"] for row in rows)
    presets = [preset for preset in found if preset in COLOURS]
    places = sorted({row["concurrency"] for row in rows})
    width = 0.85 / len(presets)
    for number, preset in enumerate(presets):
        mine = {row["concurrency"]: row for row in rows if row["preset"] == preset}
        offset = (number - (len(presets) - 1) / 2) * width
        alone = mine[places[0]]["tokens_per_forward"]
        bars = axes.bar(
            [place + offset for place in range(len(places))],
            [mine[c]["speed_over_static"] for c in places],
            0.92 * width,
            color=COLOURS[preset],
            label=f"{preset} ({alone:.2f} tokens per forward)",
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(places)), [str(c) for c in places])
    axes.set(
        xlabel="requests in flight",
        ylabel="tokens per second over static",
        title="Speed, all tasks (median of paired repeats)",
    )
    axes.legend(fontsize=8, ncols=2, **BELOW)
