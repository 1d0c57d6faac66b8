# SPDX-License-Identifier: Apache-2.0
"""What a strategy costs beyond the plain threshold, beside a model's forward pass.

A group of 16 requests with blocks of 32 positions, the later half of them masked, and
152,000 float32 logits a position, on the CPU. One step of the plain threshold scores
every position and accepts. A strategy reads the logits before that (`read`) and
decides in the place of acceptance (`decide`):

    extra_ms          read + decide - acceptance
    extra_ms_shared   the same, less the plain scoring, where the scores follow from
                      what was read (greedy requests)

Both also as a share of the forward of a model of 100 million parameters (12 layers,
hidden size 768, MLP 2048, 12 heads, 512 rows; without embedding, and without and with
the LM head) in bfloat16 and float32, as plain torch layers. Everything is measured in
turns in one process; the numbers are medians.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
# Not a package: the tests import this file by its path.
sys.path[:0] = [str(HERE)]

from machine import load_average, say, surroundings  # noqa: E402

from vllm_unmask.decoding.composition import (  # noqa: E402
    Evidence,
    decide,
    read_logits,
)
from vllm_unmask.decoding.denoise import Strategy, accept  # noqa: E402
from vllm_unmask.decoding.learned import Filter  # noqa: E402
from vllm_unmask.decoding.reading import score  # noqa: E402
from vllm_unmask.decoding.scoring import Scores  # noqa: E402
from vllm_unmask.decoding.statistics import RowStatistics, greedy_scores  # noqa: E402
from vllm_unmask.decoding.strategy import Block, State  # noqa: E402
from vllm_unmask.options import decoding_limits  # noqa: E402
from vllm_unmask.presets import FILLERS  # noqa: E402
from vllm_unmask.request_options import DecodingOptions  # noqa: E402

# These read more of a row than its largest logits and its entropy, or change it.
WHOLE_ROW = {"klass", "credit"}
# From what these read, the scores of greedy requests follow.
SHARED = {
    "entropy_bounded",
    "entropy_distance",
    "entropy_threshold",
    "edit",
    "prophet",
    "sched",
}
TARGET = 0.05  # of the forward, for all others
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Sizes(NamedTuple):
    """What is measured."""

    requests: int = 16
    block: int = 32
    vocabulary: int = 152_000
    layers: int = 12
    hidden: int = 768
    inner: int = 2048
    heads: int = 12


TINY = Sizes(2, 4, 5000, 1, 64, 128, 2)


class Step:
    """A denoising step of a group of requests that share a strategy."""

    def __init__(self, sizes: Sizes, filler: str, block: Block) -> None:
        self.strategy = filler
        options = DecodingOptions(strategy=filler)
        self.fillers = options.fillers
        self.block = block
        unset = {"steps": sizes.block, "sub_block_length": max(sizes.block // 4, 1)}
        self.parameters = {}
        for name, limits in decoding_limits().items():
            value = options.value(name)
            if value is None:
                value = unset.get(name, 0)
            if limits.choices:
                value = limits.choices.index(value) if value else 0
            if limits.kind not in ("strategy", "text"):
                self.parameters[name] = torch.full((sizes.requests,), float(value))
        shapes = ((64, sizes.block), (64,), (sizes.block, 64), (sizes.block,))
        self.learned = Filter(*map(torch.zeros, shapes))

    def read(self, logits: torch.Tensor) -> tuple[Evidence, State]:
        state = dict(self.state)
        evidence = read_logits(self.fillers, self.block, logits, self.parameters, state)
        return evidence, state

    def decide(self, scores: Scores, evidence: Evidence, state: State) -> None:
        arguments = (self.fillers, self.block, scores, evidence, self.parameters)
        decide(*arguments, state, 0, self.learned)

    def prepare(self, logits: torch.Tensor, scores: Scores) -> None:
        """Take the step before the one that is measured, so that there is a state."""
        self.state: State = {}
        evidence, state = self.read(logits)
        self.decide(scores, evidence, state)
        self.state = state


def open_blocks(sizes: Sizes) -> Block:
    """Blocks that are unmasked as far as their middle."""
    shape = (sizes.requests, sizes.block)
    column = torch.arange(sizes.block).expand(shape)
    masked = column >= sizes.block // 2
    everywhere = torch.ones(shape, dtype=torch.bool)
    count = torch.full((sizes.requests,), sizes.block)
    return Block(
        ids=torch.where(masked, 0, 1),
        masked=masked,
        output=everywhere,
        live=everywhere,
        num_masks=count,
        step=count // 2,
        stop_ids=torch.full((sizes.requests, 2), 2),
        progress=torch.zeros(sizes.requests),
        seeds=torch.arange(sizes.requests),
        positions=column.contiguous(),
        is_delimiter=torch.arange(sizes.vocabulary) % 50 == 0,
    )


def random_logits(sizes: Sizes) -> torch.Tensor:
    """float32 [requests, block, vocab]: noise and one token that leads, more or less.

    The mask is banned, as in every step.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.requests, sizes.block, sizes.vocabulary)
    logits = torch.randn(shape, generator=generator).mul_(2)
    lead = 20 * torch.rand((*shape[:2], 1), generator=generator)
    place = torch.randint(1, sizes.vocabulary, lead.shape, generator=generator)
    logits.scatter_add_(2, place, lead)
    logits[..., 0] = -torch.inf
    return logits


def plain_score(logits: torch.Tensor) -> Scores:
    """What the plain threshold reads of the logits, each tensor [requests, block]."""
    flat = score(
        logits.flatten(0, 1),
        None,
        sampled=False,
        raw_confidence=None,
        orders=None,
        orders_used=frozenset({0}),
    )
    return Scores(*(x.view(logits.shape[:2]) for x in flat))


def plain_accept(scores: Scores, block: Block) -> torch.Tensor:
    count = block.num_masks
    strategy = Strategy(
        count, torch.full(count.shape, 0.9), torch.ones_like(count).bool()
    )
    return accept(scores, block.masked, count, block.step, strategy)


def shared_score(step: Step, evidence: Evidence) -> Scores | None:
    """The same from what was read already, if there is enough of it."""
    if 0 not in evidence.orders or evidence.statistics is None:
        return None
    flat = RowStatistics(*(x.flatten() for x in evidence.statistics))
    order = step.parameters["order"].long().repeat_interleave(step.block.ids.shape[1])
    shape = step.block.ids.shape
    return Scores(*(x.view(shape) for x in greedy_scores(flat, order)))


class Model:
    """Layers of a transformer and its LM head, without embedding."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        hidden, inner = sizes.hidden, sizes.inner
        self.sizes = sizes
        shapes = ((3 * hidden, hidden), (hidden, hidden), (2 * inner, hidden))
        self.layers = [
            [0.02 * torch.randn(s, dtype=dtype) for s in (*shapes, (hidden, inner))]
            for _ in range(sizes.layers)
        ]
        self.scale = torch.ones(hidden, dtype=dtype)
        self.lm_head = 0.02 * torch.randn(sizes.vocabulary, hidden, dtype=dtype)
        self.rows = torch.randn(sizes.requests, sizes.block, hidden, dtype=dtype)

    def forward(self) -> torch.Tensor:
        x, sizes = self.rows, self.sizes
        split = (sizes.requests, sizes.block, 3, sizes.heads, -1)
        functional = torch.nn.functional
        for qkv, out, up, down in self.layers:
            normed = functional.rms_norm(x, (sizes.hidden,), self.scale)
            heads = functional.linear(normed, qkv).view(split).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*heads)
            x = x + functional.linear(mixed.transpose(1, 2).reshape(x.shape), out)
            normed = functional.rms_norm(x, (sizes.hidden,), self.scale)
            gate, value = functional.linear(normed, up).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * value, down)
        return x


class Clock:
    """Milliseconds of what is measured, by name.

    One thread that never waits is measured by the processor time of the process,
    which leaves out what other programs take; several threads are by the wall clock.
    """

    def __init__(self, threads: int = 1) -> None:
        self.now = time.process_time if threads == 1 else time.perf_counter
        self.times: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.times.setdefault(name, []).append(1e3 * (self.now() - start))

    def __getitem__(self, name: str) -> float:
        return median(self.times[name])


def strategy_of(filler: str) -> str:
    """The filler, with the plain threshold where it needs a rule that it may have."""
    if FILLERS[filler].slot == "accept" or filler == "rcr":
        return filler
    return f"{filler}+threshold"


@torch.inference_mode()
def measure(
    sizes: Sizes,
    fillers: list[str],
    threads: int,
    repeats: int,
    logits: torch.Tensor,
    tell: Callable[[str], None] = say,
) -> list[dict[str, Any]]:
    """One row a filler."""
    torch.set_num_threads(threads)
    block = open_blocks(sizes)
    models = {name: Model(sizes, dtype) for name, dtype in DTYPES.items()}
    clock = Clock(threads)
    steps = {name: Step(sizes, strategy_of(name), block) for name in fillers}
    # The first round is a warm-up.
    for repeat in range(repeats + 1):
        tell(f"{threads} threads, repeat {repeat} of {repeats}")
        if repeat == 1:
            clock.times.clear()
        for name, model in models.items():
            with clock(f"forward {name}"):
                hidden = model.forward()
            with clock(f"lm_head {name}"):
                torch.nn.functional.linear(hidden, model.lm_head)
            del hidden
        with clock("score"):
            scores = plain_score(logits)
        with clock("accept"):
            plain_accept(scores, block)
        for name, step in steps.items():
            step.prepare(logits, scores)
            with clock(f"read {name}"):
                evidence, state = step.read(logits)
            if name in SHARED:
                with clock(f"shared {name}"):
                    shared_score(step, evidence)
            with clock(f"decide {name}"):
                step.decide(scores, evidence, state)
            # KLASS keeps a distribution of every position: freed outside the clock.
            step.state = {}
            del evidence, state
    return [row(name, threads, clock, name in SHARED) for name in fillers]


def row(filler: str, threads: int, clock: Clock, shared: bool) -> dict[str, Any]:
    """What one filler costs."""
    forwards = {name: clock[f"forward {name}"] for name in DTYPES}
    heads = {name: clock[f"lm_head {name}"] for name in DTYPES}
    parts = {part: clock[f"{part} {filler}"] for part in ("read", "decide")}
    extra = sum(parts.values()) - clock["accept"]
    less = extra + clock[f"shared {filler}"] - clock["score"] if shared else extra
    return {
        "filler": filler,
        "strategy": strategy_of(filler),
        "threads": threads,
        "plain_ms": clock["score"] + clock["accept"],
        "forward_ms": forwards,
        "lm_head_ms": heads,
        **{f"{part}_ms": value for part, value in parts.items()},
        "extra_ms": extra,
        "extra_ms_shared": less,
        "share": {name: extra / ms for name, ms in forwards.items()},
        "share_shared": {name: less / ms for name, ms in forwards.items()},
        "share_with_lm_head": {
            name: less / (ms + heads[name]) for name, ms in forwards.items()
        },
        "whole_row": filler in WHOLE_ROW,
        "holds": less / min(forwards.values()) < TARGET,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for threads in sorted({item["threads"] for item in result["rows"]}):
        items = [item for item in result["rows"] if item["threads"] == threads]
        forward = ", ".join(f"{k} {v:.0f}" for k, v in items[0]["forward_ms"].items())
        plain = items[0]["plain_ms"]
        head = ", ".join(f"{k} {v:.0f}" for k, v in items[0]["lm_head_ms"].items())
        lines.append(
            f"{threads} threads: forward {forward} ms, LM head {head} ms, plain "
            f"{plain:.1f} ms"
        )
        heads = ("read", "decide", "extra", "share", "shared", "share", "w. head")
        lines.append(f"{'':20}" + "".join(f"{head:>9}" for head in heads))
        for item in sorted(items, key=lambda i: i["extra_ms_shared"]):
            verdict = "reads rows" if item["whole_row"] else ""
            if not item["holds"] and not item["whole_row"]:
                verdict = f"MISSES {TARGET:.0%}"
            lines.append(
                f"{item['filler']:20}{item['read_ms']:9.1f}{item['decide_ms']:9.1f}"
                f"{item['extra_ms']:9.1f}{max(item['share'].values()):9.1%}"
                f"{item['extra_ms_shared']:9.1f}"
                f"{max(item['share_shared'].values()):9.1%}"
                f"{max(item['share_with_lm_head'].values()):9.1%}  {verdict}".rstrip()
            )
    return "\n".join(lines) + "\n"


def run(quick: bool, repeats: int, threads: list[int]) -> dict[str, Any]:
    sizes = TINY if quick else Sizes()
    load = load_average()
    before = torch.get_num_threads()
    logits = random_logits(sizes)
    # Plain ones do not come through this layer.
    fillers = [
        name
        for name, filler in FILLERS.items()
        if name not in ("static", "threshold") and filler.slot != "speculate"
    ]
    try:
        rows = [
            item
            for number in threads
            for item in measure(sizes, fillers, number, repeats, logits.clone())
        ]
    finally:
        torch.set_num_threads(before)
    environment = surroundings(load, sizes=sizes._asdict(), repeats=repeats)
    return {"rows": rows, "target": TARGET, "environment": environment}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, as a check")
    parser.add_argument("--repeats", type=int, help="default 7, or 2 with --quick")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    repeats = args.repeats or (2 if args.quick else 7)
    result = run(args.quick, repeats, args.threads)
    if args.json:
        text = json.dumps(result, indent=2) + "\n"
        args.json.write_text(text, encoding="utf-8")
    sys.stdout.write(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
