# SPDX-License-Identifier: Apache-2.0
"""What a request may ask of decoding: one field an option.

The metadata of the fields is the only list of options: the parsers check against it,
`doctor` prints it, and the README's table is made from it. Imports neither torch nor
vLLM.
"""

import json
from dataclasses import dataclass, field, fields
from typing import Any

from vllm_unmask.limits import Limits
from vllm_unmask.presets import FILLERS, compose, users


def option(default: Any, limits: Limits) -> Any:
    """A dataclass field that carries its limits."""
    return field(default=default, metadata={"limits": limits})


def _of_strategy(kind: Any, doc: str, **limits: Any) -> Any:
    """An option of all strategies; unset, the strategy decides."""
    return option(None, Limits(kind, doc, **limits))


def _of(option: str, kind: Any, doc: str, **limits: Any) -> Any:
    """An option of those fillers alone that have a default for it."""
    names = users(option)
    return _of_strategy(
        kind,
        doc,
        applies=lambda options: not options.fillers.isdisjoint(names),
        condition=", ".join(names),
        **limits,
    )


def _of_route(routes: tuple[str, ...], kind: Any, doc: str, **limits: Any) -> Any:
    """An option of the filler s2d2, for some of its routes."""
    return _of_strategy(
        kind,
        doc,
        applies=lambda options: options.value("route") in routes,
        condition="s2d2 and route=" + " or ".join(routes),
        **limits,
    )


_PROBABILITY: Any = {"low": 0.0, "high": 1.0}
_SCORES = ("score_threshold", "score_hysteresis")
_SCORE: Any = {"low": -256.0, "high": 256.0}


# Fillers that read all of a block in every step, or rows behind it.
OF_WHOLE_BLOCKS = (
    "klass",
    "credit",
    "learned",
    "prophet",
    "sched",
    "edit",
    "remdm",
    "lookahead",
    "freedave",
    "s2d2",
)


@dataclass(frozen=True)
class DecodingOptions:
    """What a request, or the server's default, asks of decoding.

    Holds what was given; `value` has what follows from it.
    """

    strategy: str = option(
        "threshold",
        Limits("strategy", "how a block is unmasked: see the table of strategies"),
    )
    steps: int | None = _of_strategy(
        "int",
        "denoising steps over which the schedule spreads a block, at most the block "
        "length; unset: the block length, one position a step",
        low=1,
        optional=True,
        applies=lambda options: options.value("step_sizes") != "ascending",
        condition="step_sizes other than ascending",
    )
    step_sizes: str | None = _of_strategy(
        "choice",
        "positions that the schedule unmasks in each step: as equal as integers "
        "allow, few first (cosine), or 1, 2, 4 and so on (ascending)",
        choices=("linear", "cosine", "ascending"),
    )
    order: str | None = _of_strategy(
        "choice",
        "which masked position the schedule unmasks first",
        choices=("confidence", "margin", "entropy", "random"),
    )
    confidence_from: str | None = _of_strategy(
        "choice",
        "distribution that confidence, margin and entropy are read from: after "
        "temperature, top-k, top-p and min-p, or the raw softmax",
        choices=("transformed", "raw"),
        applies=lambda options: (
            "static" not in options.fillers or options.value("order") != "random"
        ),
        condition="a strategy other than static, or an order other than random",
    )
    threshold: float | None = _of(
        "threshold",
        "float",
        "confidence (learned: score) from which a position is unmasked",
        **_PROBABILITY,
    )
    strict: bool | None = _of(
        "strict",
        "bool",
        "unmask above the threshold only (true) or also at it (false)",
    )
    relaxed_threshold: float | None = _of(
        "relaxed_threshold", "float", "threshold near a sure position", **_PROBABILITY
    )
    radius: int | None = _of(
        "radius", "int", "positions on either side that count as near", low=0
    )
    low_threshold: float | None = _of(
        "low_threshold",
        "float",
        "lowest confidence that is accepted (bacd: lowest value of the threshold)",
        **_PROBABILITY,
    )
    high_threshold: float | None = _of(
        "high_threshold", "float", "highest value of the threshold", **_PROBABILITY
    )
    factor: float | None = _of(
        "factor",
        "float",
        "n positions are unmasked when the n-th is surer than 1 - factor/(n+1)",
        low=0.0,
    )
    entropy_bound: float | None = _of(
        "entropy_bound", "float", "entropy in nats that is accepted", low=0.0
    )
    distance_penalty: float | None = _of(
        "distance_penalty",
        "float",
        "entropy in nats that is added for each position behind the first mask",
        low=0.0,
    )
    whole_entropy: bool | None = _of(
        "whole_entropy",
        "bool",
        "bound the sum of all entropies (SDAR) instead of all but the largest",
    )
    kl_threshold: float | None = _of(
        "kl_threshold",
        "float",
        "divergence in nats between two steps below which a position is settled",
        low=0.0,
    )
    kl_history: int | None = _of(
        "kl_history", "int", "steps for which a position must be settled", low=0
    )
    max_reveals: int | None = _of(
        "max_reveals", "int", "positions unmasked in a step at most", low=1
    )
    end_gate: float | None = _of(
        "end_gate",
        "float",
        "share of max_tokens before which no stop token is unmasked by choice",
        **_PROBABILITY,
    )
    expand: float | None = _of(
        "expand", "float", "growth of the watched set, in schedule steps", low=0.0
    )
    warm_up: int | None = _of(
        "warm_up", "int", "steps of a block that follow the schedule", low=0
    )
    credit_weight: float | None = _of(
        "credit_weight", "float", "alpha: weight of credit in the logits", low=0.0
    )
    credit_power: float | None = _of(
        "credit_power",
        "float",
        "gamma: exponent of the probability that becomes credit",
        low=0.0,
    )
    credit_decay: float | None = _of(
        "credit_decay",
        "float",
        "beta: share of credit that a step leaves",
        **_PROBABILITY,
    )
    end_floor: float | None = _of(
        "end_floor",
        "float",
        "factor on the confidence of stop tokens in a block's first step",
        **_PROBABILITY,
    )
    sub_block_length: int | None = _of(
        "sub_block_length",
        "int",
        "positions of a part, at most the block length; unset: a quarter of it",
        low=1,
        optional=True,
    )
    delimiter: str | None = _of(
        "delimiter",
        "choice",
        "what the tokens end with at which a part may end",
        choices=("newline", "comma", "period"),
    )
    delimiter_threshold: float | None = _of(
        "delimiter_threshold", "float", "confidence a delimiter needs", **_PROBABILITY
    )
    gap_high: float | None = _of(
        "gap_high", "float", "mean logit gap that fills a block at its start", low=0.0
    )
    gap_low: float | None = _of(
        "gap_low", "float", "mean logit gap that fills a block at its end", low=0.0
    )
    gap_shape: str | None = _of(
        "gap_shape",
        "choice",
        "how the gap falls from high to low",
        choices=("linear", "cosine", "exponential"),
    )
    gap_agreement: bool | None = _of(
        "gap_agreement",
        "bool",
        "fill only when the last two steps propose the same tokens",
    )
    edit_threshold: float | None = _of(
        "edit_threshold",
        "float",
        "confidence above which another token replaces a revealed one",
        **_PROBABILITY,
    )
    post_steps: int | None = _of(
        "post_steps",
        "int",
        "steps without a mask that a block may spend on edits",
        low=0,
        high=64,
    )
    remask: str | None = _of(
        "remask",
        "choice",
        "probability of masking again: the rate as a cap, as a share, or shared out "
        "by how unsure a token was",
        choices=("cap", "rescale", "conf"),
    )
    remask_rate: float | None = _of_strategy(
        "float",
        "rate of masking again",
        applies=lambda options: options.value("remask") in ("cap", "rescale"),
        condition="remdm and remask=cap or rescale",
        **_PROBABILITY,
    )
    ahead_threshold: float | None = _of(
        "ahead_threshold",
        "float",
        "confidence above which a token of the next block is unmasked",
        **_PROBABILITY,
    )
    candidates: int | None = _of(
        "candidates",
        "int",
        "canvases of the request that a forward checks, its own included, at most the "
        "server's max_candidates; unset: that; 1: no speculation",
        low=1,
        optional=True,
    )
    route: str | None = _of(
        "route",
        "choice",
        "when the first run of masks is verified: by its length, by a score of what "
        "that is expected to gain, or as a bandit has learnt",
        choices=(
            "always",
            "never",
            "span_length",
            "score_threshold",
            "score_hysteresis",
            "contextual_bandit",
        ),
    )
    acceptance_estimate: str | None = _of_route(
        _SCORES,
        "choice",
        "how likely a draft is to be accepted, from margin, entropy or confidence",
        choices=(
            "margin_threshold",
            "entropy_threshold",
            "confidence_power",
            "margin_linear",
            "entropy_decay",
        ),
    )
    estimate_parameter: float | None = _of_route(
        _SCORES,
        "float",
        "parameter of that estimate; unset: the paper's",
        low=0.0,
        optional=True,
    )
    verify_cost: float | None = _of_route(
        _SCORES, "float", "accepted drafts that a verification has to pay for", low=0.0
    )
    cost_per_token: bool | None = _of_route(
        _SCORES, "bool", "that cost for each position that is sure, not once"
    )
    min_score: float | None = _of_route(
        ("score_threshold",), "float", "score from which to verify", **_SCORE
    )
    score_on: float | None = _of_route(
        ("score_hysteresis",), "float", "score above which to begin", **_SCORE
    )
    score_off: float | None = _of_route(
        ("score_hysteresis",), "float", "score below which to stop", **_SCORE
    )
    min_span: int | None = _of_route(
        ("span_length",), "int", "masks in a row from which to verify", low=1
    )
    exploration: float | None = _of_route(
        ("contextual_bandit",), "float", "weight of what is not known yet", low=0.0
    )
    tempering: float | None = _of(
        "tempering",
        "float",
        "exponent of the ratio that a draft passes with: below 1 more pass; 1 keeps "
        "the law of decoding one by one",
        low=0.0,
    )
    doubt: float | None = _of_strategy(
        "float",
        "with diffusion_seed_canvas: a seeded token less probable than this is masked",
        **_PROBABILITY,
    )
    cache: str | None = _of_strategy(
        "choice",
        "keys and values that a step takes from the block's first one: none (exact), "
        "those before the block (prefix), all but the block's (dual); from the "
        "sub-block's first one: those of the other sub-blocks (sub_block)",
        choices=("none", "prefix", "dual", "sub_block"),
        condition="a model with full attention; none and sub_block: a block-causal "
        "one, sub_block beside sub_blocks",
    )
    refresh: int | None = _of_strategy(
        "int",
        "steps of a block from one that forwards the whole canvas to the next such; "
        "unset: only the first one does",
        low=1,
        optional=True,
        applies=lambda options: options.value("cache") != "none",
        condition="a model with full attention, and cache other than none",
    )
    window: int | None = _of_strategy(
        "int",
        "positions from the open block on that a step sees, in whole blocks; 0: all of "
        "max_tokens",
        low=0,
        condition="a model with full attention",
    )
    answer_block_length: int | None = _of_strategy(
        "int",
        "length of the blocks behind `answer_after`, a divisor of the block length; 1: "
        "one token after the other; unset: the block length",
        low=1,
        optional=True,
    )
    answer_after: str | None = _of_strategy(
        "text",
        "text that ends the long blocks once the output contains it: the short ones "
        "begin behind the block that completes it",
        low=1,
        high=32,
        applies=lambda options: options.answer_block_length is not None,
        condition="answer_block_length",
    )
    trace: bool = option(
        False,
        Limits(
            "bool", "return at which step each token was unmasked, edited and so on"
        ),
    )

    @property
    def fillers(self) -> frozenset[str]:
        """The fillers of the strategy's slots."""
        return compose(self.strategy).fillers

    @property
    def reads_parts(self) -> bool:
        """Whether most steps read nothing of a block but its open sub-block."""
        fillers = self.fillers
        return "sub_blocks" in fillers and fillers.isdisjoint(OF_WHOLE_BLOCKS)

    def value(self, name: str) -> Any:
        """An option as given, or what the strategy sets, or its default.

        None where the strategy has no such option, and where "unset" means something.
        """
        given = getattr(self, name)
        if given is not None:
            return given
        composition = compose(self.strategy)
        for source in (composition.values, composition.defaults, _DEFAULTS):
            if name in source:
                return source[name]
        return None

    def number(self, name: str, unset: float = 0.0) -> float:
        """An option's value as a number: a choice by its place, `unset` for None."""
        value = self.value(name)
        if value is None:
            return unset
        limits = next(f for f in fields(self) if f.name == name).metadata["limits"]
        return limits.choices.index(value) if limits.choices else float(value)


# Of every strategy that does not say otherwise.
_DEFAULTS = {
    "step_sizes": "linear",
    "order": "confidence",
    "confidence_from": "transformed",
    "doubt": 0.0,
    "cache": "none",
    "window": 512,
    "answer_after": "</think>",
}


def default_text(name: str) -> str:
    """An option's default in words: it may depend on the strategy."""
    own = next(f.default for f in fields(DecodingOptions) if f.name == name)
    if own is not None or name in _DEFAULTS:
        return json.dumps(_DEFAULTS.get(name, own))
    values: dict[str, list[str]] = {}
    for filler in users(name):
        text = json.dumps(FILLERS[filler].defaults[name])
        values.setdefault(text, []).append(filler)
    if len(values) <= 1:
        return next(iter(values), "null")
    return ", ".join(f"{value} ({', '.join(of)})" for value, of in values.items())
