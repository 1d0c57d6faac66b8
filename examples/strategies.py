# SPDX-License-Identifier: Apache-2.0
"""One prompt under several decoding strategies, their traces side by side.

Asks a running server through OpenAI's client at temperature 0. The traces stand one
below the other where the terminal is too narrow for a column each.
"""

import argparse
import os
import re
import shutil
import sys
from itertools import zip_longest
from pathlib import Path

from openai import OpenAI, OpenAIError
from quickstart import connect

from vllm_unmask.trace import (
    Trace,
    columns,
    pieces_of,
    render_html,
    render_terminal,
    trace_of,
)

STRATEGIES = ["static", "threshold", "factor", "local_leap"]
STRATEGIES += ["credit+local_leap+prophet"]
PROMPT = "Name three rivers of Europe and the seas they flow into."
MIN_WIDTH = 36
GAP = "   "


def ask(client: OpenAI, model: str, strategy: str, args: argparse.Namespace) -> Trace:
    """The trace of the answer under one strategy."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": args.prompt}],
        max_tokens=args.max_tokens,
        temperature=0,
        extra_body={
            "vllm_xargs": {"unmask_strategy": strategy, "unmask_trace": True},
        },
    )
    trace = trace_of(answer)
    if trace is None:
        raise ValueError(f"{strategy}: the answer has no trace")
    return trace


def side_by_side(blocks: list[list[str]], width: int) -> list[str]:
    """Blocks of lines as columns of this width; colours take none of it."""
    return [
        GAP.join(line + " " * (width - columns(line)) for line in row).rstrip()
        for row in zip_longest(*blocks, fillvalue="")
    ]


def show(client: OpenAI, address: str, args: argparse.Namespace) -> None:
    model = client.models.list().data[0].id
    traces = {name: ask(client, model, name, args) for name in args.strategies}
    terminal = shutil.get_terminal_size().columns
    width = (terminal + len(GAP)) // len(traces) - len(GAP)
    fits = width >= MIN_WIDTH
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def decode(ids: list[int]) -> str:
        body = {"model": model, "tokens": ids}
        return client.post(f"{address}/detokenize", body=body, cast_to=dict)["prompt"]

    blocks = []
    for name, trace in traces.items():
        pieces = pieces_of(trace, decode)
        text = render_terminal(
            trace, pieces, width=width if fits else terminal, color=color
        )
        blocks.append([name, "", *text.splitlines(), ""])
        if args.html:
            # A strategy is what the user wrote, and may hold a slash.
            page = args.html / (re.sub(r"[^\w+-]", "_", name) + ".html")
            page.write_text(render_html(trace, pieces, name), encoding="utf-8")
    lines = side_by_side(blocks, width) if fits else sum(blocks, [])
    sys.stdout.write("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument(
        "--strategies", nargs="+", default=STRATEGIES, help=" ".join(STRATEGIES)
    )
    parser.add_argument("--html", type=Path, metavar="DIR", help="also write pages")
    args = parser.parse_args()
    address = args.url.rstrip("/").removesuffix("/v1")
    try:
        if args.html:
            args.html.mkdir(parents=True, exist_ok=True)
        with connect(address) as client:
            show(client, address, args)
    except (OpenAIError, OSError, ValueError) as error:
        sys.exit(f"strategies: {error}")


if __name__ == "__main__":
    main()
