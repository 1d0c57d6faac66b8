# SPDX-License-Identifier: Apache-2.0
"""The picture of the throughput benchmark."""

from pathlib import Path
from typing import Any

from throughput_variants import AR, RULE, TORCH, UNMASK, Variant


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed over concurrency, and what parallel unmasking costs in accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    series: dict[Variant, list[dict[str, Any]]] = {}
    for item in result["rows"]:
        variant = Variant(item["system"], item["strategy"], item["threshold"])
        series.setdefault(variant, []).append(item)
    for variant, style in (
        (Variant(TORCH, *RULE), {"color": "C3", "marker": "x"}),
        (Variant(UNMASK, *RULE), {"color": "C0", "marker": "o"}),
        (Variant(AR), {"color": "C1", "marker": "s"}),
        (Variant(UNMASK, "static"), {"color": "C2", "marker": "^"}),
    ):
        if variant not in series:
            continue
        items = sorted(series[variant], key=lambda i: i["concurrency"])
        speed = [i["tokens_per_second"] for i in items]
        spread = [
            [s - i["tokens_per_second_min"] for s, i in zip(speed, items, strict=True)],
            [i["tokens_per_second_max"] - s for s, i in zip(speed, items, strict=True)],
        ]
        flights = [i["concurrency"] for i in items]
        left.errorbar(flights, speed, spread, label=variant.label, capsize=3, **style)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="requests in flight",
        ylabel="output tokens per second",
        title="Speed (median, min to max)",
    )
    ticks = sorted({i["concurrency"] for i in result["rows"]})
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    left.set_yticks(speed_ticks := [100, 200, 500, 1000, 2000, 5000, 10000])
    left.set_yticklabels([f"{tick:,}" for tick in speed_ticks])
    slowest = min(i["tokens_per_second_min"] for i in result["rows"])
    fastest = max(i["tokens_per_second_max"] for i in result["rows"])
    left.set_ylim(slowest / 1.2, fastest * 1.2)
    left.legend()

    most = max(i["concurrency"] for i in result["rows"])
    points = sorted(
        (items[-1]["tokens_per_forward"], items[-1]["exact_match"], variant)
        for variant, items in series.items()
        if items[-1]["concurrency"] == most and variant.system == UNMASK
    )
    right.plot([p[0] for p in points], [p[1] for p in points], "o-", color="C0")
    for forward, match, variant in points:
        name = variant.strategy if variant.threshold is None else f"{variant.threshold}"
        right.annotate(
            str(name), (forward, match), textcoords="offset points", xytext=(4, 7)
        )
    twin = [i["exact_match"] for i in series.get(Variant(AR), [])]
    if twin:
        right.axhline(twin[-1], color="C1", linestyle="--", label=AR)
        right.legend()
    low = min([p[1] for p in points] + twin)
    right.set(
        xlabel="output tokens per forward",
        ylabel="exact match",
        title=f"Accuracy by threshold, {most} in flight",
        ylim=(max(0.0, low - 0.05), 1.005),
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
