# SPDX-License-Identifier: Apache-2.0
"""Draw training logs (JSONL written by train.py) as one PNG. Needs matplotlib."""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def read_log(path: Path) -> list[dict]:
    """Lines in step order; a step repeated after --resume counts once, the last."""
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return sorted({line["step"]: line for line in lines}.values(), key=_step)


def _step(line: dict) -> int:
    return line["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("loss.png"))
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 4))
    for path in args.logs:
        lines = read_log(path)
        minutes = [line["cpu_seconds"] / 60 for line in lines]
        axes.plot(minutes, [line["loss"] for line in lines], label=path.stem)
    axes.set_yscale("log")
    axes.set_xlabel("CPU minutes")
    axes.set_ylabel("cross entropy (nats per scored token)")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
