# SPDX-License-Identifier: Apache-2.0
"""What the quality report says of its rows: rankings, verdicts, tables."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quality_grid import BASELINE, Config
from quality_numbers import ALL

Row = Mapping[str, Any]  # of the result

# What a composition must gain in tokens per forward, at no loss of exact match.
GAIN = 1.15
FINALISTS = 3  # compositions that are run again, of each group of prompts
_RATIO = "tokens_per_forward_ratio"


def question(
    rows: Sequence[Row], group: str, chosen: str | None = None
) -> dict[str, Any]:
    """Whether a composition gains enough at no loss, for one group of prompts.

    Ratios are to the threshold rule at its default. `ceiling_ratio` is that of one
    forward for each block; only a filler of the slot `ahead` can exceed it.

    Args:
        rows: of one list of records.
        group: of its prompts.
        chosen: label of the composition that is judged, if other prompts chose it.
    """
    base = next(r for r in rows if r["label"] == BASELINE.label)
    speed = base["tokens_per_forward_by_task"][group]

    def gain(of: Sequence[Row]) -> dict[str, Any] | None:
        if not of:
            return None
        return {"label": of[0]["label"], **of[0]["difference"][group]}

    if chosen is None:
        found = gain(ranked(rows, group, is_composition))
    else:
        found = gain([r for r in rows if r["label"] == chosen])
    holds = found and found["exact_match"] >= 0 and found[_RATIO] >= GAIN
    return {
        "exact_match": base["exact_match"][group],
        "tokens_per_forward": speed,
        "blocks_in_one_forward": base["blocks_in_one_forward"][group],
        "ceiling_ratio": base["ceiling"][group] / speed,
        "composition": found,
        "best_threshold": gain(ranked(rows, group, is_threshold)),
        "best_of_all": gain(ranked(rows, group)),
        "required_ratio": GAIN,
        "holds": holds,
    }


def ranked(
    rows: Sequence[Row], group: str, which: Callable[[Row], bool] = bool
) -> list[Row]:
    """Rows that are right as often as the threshold rule at least, the best first.

    Those that gain enough come first, by exact match; then the most parallel ones.
    """

    def order(item: Row) -> tuple[float, float, float]:
        gain = item["difference"][group]
        return min(gain[_RATIO], GAIN), gain["exact_match"], gain[_RATIO]

    kept = [r for r in rows if which(r) and r["difference"][group]["exact_match"] >= 0]
    return sorted(kept, key=order, reverse=True)


def held(rows: Sequence[Row], again: Sequence[Row], group: str) -> list[str]:
    """Compositions that gain enough at no loss on both lists of records."""

    def good(of: Sequence[Row]) -> list[str]:
        best = ranked(of, group, is_composition)
        return [r["label"] for r in best if r["difference"][group][_RATIO] >= GAIN]

    return [label for label in good(again) if label in good(rows)]


def is_composition(item: Row) -> bool:
    return bool(item["kind"] == "composition")


def is_threshold(item: Row) -> bool:
    return bool(item["preset"] == BASELINE.strategy)


def finalists(rows: Sequence[Row], groups: Iterable[str]) -> list[Config]:
    """What is run again: the baseline, and of each group of prompts the best."""
    chosen = [BASELINE]
    for group in groups:
        best = ranked(rows, group, is_composition)[:FINALISTS]
        best += ranked(rows, group, is_threshold)[:1] + ranked(rows, group)[:1]
        chosen += [Config(r["kind"], r["preset"], r["options"]) for r in best]
    return list({config.label: config for config in chosen}.values())


def written(result: Row) -> str:
    """The JSON text, a line for each row."""
    return json.dumps(rounded(result)).replace('{"kind": ', '\n{"kind": ') + "\n"


def rounded(value: Any) -> Any:
    """The same with 4 decimals in every number; none of them is known better."""
    if isinstance(value, Mapping):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


_COLUMNS = (
    "strategy",
    "exact match",
    "difference",
    "tokens per forward",
    "ratio",
    "rows per token",
)


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, slowest first."""
    lines = [
        f"| {' | '.join(_COLUMNS)} |",
        "|---|---|---|---|---|---|",
    ]
    for item in sorted(rows, key=lambda r: r["tokens_per_forward"]):
        name = f"`{item['preset']}`" + "".join(
            f", `{option}` {value}" for option, value in item["options"].items()
        )
        difference = item["difference"][ALL]
        low, high = difference["exact_match_interval"]
        slow, fast = difference[f"{_RATIO}_interval"]
        count = item["rows_per_token"]
        cells = (
            name,
            f"{item['exact_match'][ALL]:.3f}",
            f"{difference['exact_match']:+.3f} ({low:+.3f} to {high:+.3f})",
            f"{item['tokens_per_forward']:.2f}",
            f"{difference[_RATIO]:.2f} ({slow:.2f} to {fast:.2f})",
            "" if count is None else f"{count:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(result: Row) -> str:
    """What is worth printing: the front, the baseline, compositions, the question."""
    wanted = {*result["front"], BASELINE.label}
    for item in result["question"].values():
        wanted |= {item["composition"]["label"]} if item["composition"] else set()
    text = table([r for r in result["rows"] if r["label"] in wanted])
    again = result["confirmation"]
    if again is not None:
        text += "\nOn prompts that chose nothing:\n\n" + table(again["rows"])
    for name, part in (("grid", result), ("confirmation", again)):
        for group, item in part["question"].items() if part else ():
            text += f"\n{name}, {group}: {answer(item)}"
    if again is not None:
        for group, labels in again["held"].items():
            text += f"\nholds on both, {group}: {'; '.join(labels) or 'none'}"
    return text + "\n"


def answer(item: Row) -> str:
    """One answer to the question, in words."""
    found = item["composition"]
    said = "no composition is as often right"
    if found is not None:
        low, high = found[f"{_RATIO}_interval"]
        said = (
            f"{found['label']} gives {found[_RATIO]:.3f} times the tokens per forward "
            f"({low:.3f} to {high:.3f}) at {found['exact_match']:+.3f} exact match"
        )
    verdict = "holds" if item["holds"] else "MISSED"
    share = item["blocks_in_one_forward"]
    return (
        f"{said}; required {GAIN}: {verdict}. One forward a block would give "
        f"{item['ceiling_ratio']:.2f}; the threshold rule needs no more for {share:.0%}"
    )
