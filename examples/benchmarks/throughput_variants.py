# SPDX-License-Identifier: Apache-2.0
"""What the throughput benchmark compares."""

from typing import Any, NamedTuple

UNMASK, AR, TORCH = "unmask", "vllm-ar", "torch-loop"
THRESHOLD = 0.9
THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
# Of the systems that unmask by confidence, in the ratios.
RULE = ("threshold", THRESHOLD)


class Variant(NamedTuple):
    """What a row of the result is about."""

    system: str
    strategy: str | None = None
    threshold: float | None = None

    @property
    def label(self) -> str:
        if self.strategy is None:
            return self.system
        if self.threshold is None:
            return f"{self.system}, {self.strategy}"
        return f"{self.system}, {self.strategy} {self.threshold:g}"

    @property
    def extra_args(self) -> dict[str, Any] | None:
        """Request options of this plugin."""
        if self.strategy is None:
            return None
        options: dict[str, Any] = {"unmask_strategy": self.strategy}
        if self.threshold is not None:
            options["unmask_threshold"] = self.threshold
        return options


def variants(quick: bool) -> list[Variant]:
    """Every row of one concurrency; the two of the ratio next to each other."""
    others = [] if quick else [t for t in THRESHOLDS if t != THRESHOLD]
    return [
        Variant(AR),
        Variant(UNMASK, "threshold", THRESHOLD),
        Variant(UNMASK, "static"),
        *(Variant(UNMASK, "threshold", threshold) for threshold in others),
    ]
