# SPDX-License-Identifier: Apache-2.0
"""What a strategy may be made of: fillers of slots, and the papers' own choices.

A strategy is a list of names joined by "+": fillers, each of one slot, and at most one
preset, which stands for a list of fillers and values of their options. Imports neither
torch nor vLLM.
"""

import difflib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

SEPARATOR = "+"


class Filler(NamedTuple):
    """One choice for one slot."""

    slot: str
    doc: str
    defaults: Mapping[str, Any] = {}  # option -> its default with this filler


# Slots of which a strategy has at most one filler, and what the slot decides.
SLOTS = {
    "accept": "which masked positions are unmasked now",
    "fuse": "what changes the logits",
    "region": "which part of the block is open",
    "exit": "when the rest of the block is filled at once",
    "end": "what happens right of a stop token",
    "revise": "which revealed tokens are replaced or masked again",
    "ahead": "what is unmasked before its block is open",
    "speculate": "how one forward pass serves several denoising steps",
}

FILLERS: Mapping[str, Filler] = {
    "static": Filler("accept", "the schedule alone (LLaDA)"),
    "threshold": Filler(
        "accept",
        "every position that is sure enough (SDAR, Fast-dLLM)",
        {"threshold": 0.9, "strict": True},
    ),
    "factor": Filler(
        "accept",
        "the more positions, the surer each must be (Fast-dLLM)",
        {"factor": 1.0},
    ),
    "entropy_bounded": Filler(
        "accept",
        "as many as keep the sum of entropies bounded (EB-Sampler)",
        {"entropy_bound": 0.1, "whole_entropy": False},
    ),
    "entropy_threshold": Filler(
        "accept", "every position of low entropy (dParallel)", {"entropy_bound": 0.5}
    ),
    "entropy_distance": Filler(
        "accept",
        "every position of low entropy, the lower the farther from the first mask "
        "(WeDLM)",
        {"entropy_bound": 0.4, "distance_penalty": 0.02},
    ),
    "klass": Filler(
        "accept",
        "sure positions whose distribution has settled (KLASS)",
        {"threshold": 0.9, "kl_threshold": 0.01, "kl_history": 2},
    ),
    "local_leap": Filler(
        "accept",
        "a lower threshold near sure positions (LocalLeap)",
        {"threshold": 0.9, "strict": False, "relaxed_threshold": 0.75, "radius": 4},
    ),
    "hierarchy": Filler(
        "accept",
        "also the best position of each run of masks (dInfer)",
        {"threshold": 0.9, "low_threshold": 0.4},
    ),
    "bacd": Filler(
        "accept",
        "a threshold that follows the block's own confidences (TDAR)",
        {"low_threshold": 0.6, "high_threshold": 0.9},
    ),
    "cad": Filler(
        "accept",
        "a bounded number of sure positions, no early stop token (CD4LM)",
        {"threshold": 0.8, "max_reveals": 4, "end_gate": 0.5},
    ),
    "ccd": Filler(
        "accept",
        "positions that two forwards agree on (CCD)",
        {"expand": 4.0, "warm_up": 1},
    ),
    "dimple": Filler(
        "accept",
        "every sure position, the schedule only if there is none (Dimple)",
        {"threshold": 0.95},
    ),
    "learned": Filler(
        "accept", "what a trained filter accepts (Learn2PD)", {"threshold": 0.96}
    ),
    "credit": Filler(
        "fuse",
        "tokens that keep being proposed gain credit (CreditDecoding)",
        {"credit_weight": 0.7, "credit_power": 0.2, "credit_decay": 0.8},
    ),
    "eos_rejection": Filler(
        "fuse", "early stop tokens count as less sure (EOSER)", {"end_floor": 0.4}
    ),
    "sub_blocks": Filler(
        "region",
        "the block in equal parts, from left to right (Fast-dLLM v2)",
        {"sub_block_length": None},
    ),
    "adablock": Filler(
        "region",
        "the block in parts that end at a delimiter (AdaBlock)",
        {
            "sub_block_length": None,
            "delimiter": "newline",
            "delimiter_threshold": 0.3,
        },
    ),
    "prophet": Filler(
        "exit",
        "fill the block when the logit gap is wide, by phase (Prophet)",
        {"gap_high": 7.5, "gap_low": 2.5},
    ),
    "sched": Filler(
        "exit",
        "fill the block when the logit gap is wide, by a schedule (SchED)",
        {
            "gap_high": 7.5,
            "gap_low": 2.5,
            "gap_shape": "linear",
            "gap_agreement": False,
        },
    ),
    "end_of_text": Filler("end", "nothing is denoised right of a revealed stop token"),
    "edit": Filler(
        "revise",
        "replace a token when another one is sure (LLaDA2.1)",
        {"edit_threshold": 0.9, "post_steps": 16},
    ),
    "remdm": Filler(
        "revise",
        "mask revealed tokens again at random (ReMDM)",
        {"remask": "conf", "remask_rate": 0.02},
    ),
    "rcr": Filler(
        "revise", "fill all, mask the least sure again (running confidence, MDPO)"
    ),
    "lookahead": Filler(
        "ahead",
        "sure tokens of the next block, while this one is open",
        {"ahead_threshold": 0.95},
    ),
    "freedave": Filler(
        "speculate",
        "steps that were drafted right need no forward, same output (FreeDave)",
        {"candidates": None},
    ),
    "s2d2": Filler(
        "speculate",
        "diffusion drafts, the same weights verify one by one (S2D2)",
        {
            "route": "score_threshold",
            "acceptance_estimate": "entropy_decay",
            "estimate_parameter": None,
            "verify_cost": 0.0,
            "cost_per_token": False,
            "min_score": 0.0,
            "score_on": 0.0,
            "score_off": -1.0,
            "min_span": 1,
            "exploration": 1.0,
            "tempering": 1.0,
        },
    ),
}
# A strategy may have several of these.
_PLURAL = {"fuse"}


class Preset(NamedTuple):
    """A published configuration."""

    strategy: str
    values: Mapping[str, Any]
    doc: str


PRESETS: Mapping[str, Preset] = {
    "llada": Preset("static", {"confidence_from": "raw"}, "LLaDA, low_confidence"),
    "llada_cosine": Preset(
        "static",
        {"confidence_from": "raw", "step_sizes": "cosine"},
        "MaskGIT's schedule on LLaDA's order",
    ),
    "dream_entropy": Preset("static", {"order": "entropy"}, "Dream, alg=entropy"),
    "dream_margin": Preset("static", {"order": "margin"}, "Dream, alg=topk_margin"),
    "sdar": Preset("threshold", {"threshold": 0.85}, "SDAR, low_confidence_dynamic"),
    "sdar_entropy": Preset(
        "entropy_bounded",
        {"entropy_bound": 0.35, "whole_entropy": True, "order": "entropy"},
        "SDAR, entropy_bounded",
    ),
    "fast_dllm": Preset("threshold", {"strict": False}, "Fast-dLLM, threshold"),
    "fast_dllm_factor": Preset("factor", {}, "Fast-dLLM, factor"),
    "fast_dllm_v2": Preset("sub_blocks+threshold", {}, "Fast-dLLM v2"),
    "llada2": Preset("threshold", {"threshold": 0.95}, "LLaDA2.0"),
    "llada21_quality": Preset(
        "threshold+edit",
        {"threshold": 0.7, "edit_threshold": 0.5},
        "LLaDA2.1, quality mode",
    ),
    "llada21_speed": Preset(
        "threshold+edit",
        {"threshold": 0.5, "edit_threshold": 0.0},
        "LLaDA2.1, speed mode",
    ),
    "eb_sampler": Preset("entropy_bounded", {"order": "entropy"}, "EB-Sampler"),
    "dparallel": Preset("entropy_threshold", {"order": "entropy"}, "dParallel"),
    "wedlm": Preset("entropy_distance", {}, "WeDLM"),
    "klass_llada": Preset(
        "klass", {"threshold": 0.6, "kl_threshold": 0.015}, "KLASS on LLaDA, GSM8K"
    ),
    "klass_dream": Preset(
        "klass", {"threshold": 0.9, "kl_threshold": 0.001}, "KLASS on Dream, GSM8K"
    ),
    "creditdecoding": Preset(
        "credit+threshold", {"strict": False}, "CreditDecoding (dInfer's constants)"
    ),
    "learn2pd": Preset("learned+end_of_text", {}, "Learn2PD with a safe EoTP"),
    "eoser": Preset("eos_rejection+static", {}, "EOSER"),
    "eoser_ass": Preset(
        "eos_rejection+static",
        {"step_sizes": "ascending", "end_floor": 0.01},
        "EOSER with ascending step sizes",
    ),
    "adablock_dllm": Preset("adablock+threshold", {"strict": False}, "AdaBlock-dLLM"),
    "tdar": Preset("bacd", {}, "TDAR, BACD"),
    "remdm_cap": Preset(
        "static+remdm", {"remask": "cap", "remask_rate": 0.008}, "ReMDM-cap"
    ),
    "remdm_rescale": Preset(
        "static+remdm", {"remask": "rescale", "remask_rate": 0.015}, "ReMDM-rescale"
    ),
    "s2d2_sdar_4": Preset(
        "threshold+s2d2",
        {"threshold": 0.85, "verify_cost": 1.0},
        "S2D2 on SDAR, blocks of 4",
    ),
    "s2d2_sdar_16": Preset(
        "threshold+s2d2", {"threshold": 0.85}, "S2D2 on SDAR, blocks of 16"
    ),
    "s2d2_fast_dllm_v2": Preset(
        "threshold+s2d2",
        {
            "route": "score_hysteresis",
            "verify_cost": 1.0,
            "cost_per_token": True,
            "score_on": 1.0,
            "score_off": -5.0,
        },
        "S2D2 on Fast-dLLM v2, blocks of 4 and 16",
    ),
    "s2d2_fast_dllm_v2_32": Preset(
        "threshold+s2d2",
        {"route": "span_length", "min_span": 8},
        "S2D2 on Fast-dLLM v2, blocks of 32",
    ),
    "s2d2_llada2_conservative": Preset(
        "threshold+edit+s2d2",
        {
            "threshold": 0.95,
            "edit_threshold": 0.9,
            "verify_cost": 4.0,
            "min_score": -5.0,
        },
        "S2D2 on LLaDA2.1, conservative",
    ),
    "s2d2_llada2_quality": Preset(
        "threshold+edit+s2d2",
        {"threshold": 0.7, "edit_threshold": 0.5, "verify_cost": 4.0},
        "S2D2 on LLaDA2.1, quality",
    ),
    "mdpo_rcr": Preset("static+rcr", {}, "MDPO's running confidence remasking"),
}


class Composition(NamedTuple):
    """What a strategy's text stands for."""

    fillers: frozenset[str]
    defaults: Mapping[str, Any]  # option -> default, for every option of the fillers
    values: Mapping[str, Any]  # what the preset sets besides, options of any strategy


class StrategyError(ValueError):
    """A strategy that does not exist; says what is allowed, without its own name."""


@lru_cache(maxsize=256)
def compose(strategy: str) -> Composition:
    """Read a strategy.

    Args:
        strategy: names joined by "+", in any order. Without a filler for the slot
            ``accept`` it is ``static`` with ``freedave`` and ``rcr``, else
            ``threshold``.

    Raises:
        StrategyError: an unknown or repeated name, or fillers that exclude each other.
    """
    names = strategy.split(SEPARATOR)
    presets = [name for name in names if name in PRESETS]
    if len(presets) > 1:
        raise StrategyError(f"names two presets, {presets[0]} and {presets[1]}")
    values: Mapping[str, Any] = {}
    if presets:
        preset = PRESETS[presets[0]]
        values = preset.values
        names.remove(presets[0])
        names += preset.strategy.split(SEPARATOR)
    for name in names:
        if name not in FILLERS:
            known = [*FILLERS, *PRESETS]
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {nearest[0]!r}?" if nearest else ""
            raise StrategyError(f"names {name!r}, which is no strategy{hint}")
    chosen: dict[str, str] = {}
    for name in names:
        slot = FILLERS[name].slot
        if names.count(name) > 1:
            raise StrategyError(f"names {name} twice")
        if slot in chosen and slot not in _PLURAL:
            raise StrategyError(
                f"names both {chosen[slot]} and {name}: one alone decides {SLOTS[slot]}"
            )
        chosen[slot] = name
    if "accept" not in chosen:
        careful = not {"rcr", "freedave"}.isdisjoint(names)
        chosen["accept"] = "static" if careful else "threshold"
        names.append(chosen["accept"])
    if "rcr" in names and ("region" in chosen or "exit" in chosen):
        raise StrategyError(
            "names rcr and another filler that opens or fills a part of the block: rcr "
            "fills the whole of it in every step"
        )
    if "end" in chosen and "revise" in chosen:
        raise StrategyError(
            f"names end_of_text and {chosen['revise']}: what was filled right of a "
            "stop token would stay when that token changes"
        )
    if "rcr" in names and chosen["accept"] != "static":
        raise StrategyError(
            f"names rcr and {chosen['accept']}: rcr masks again by the schedule, so it "
            "goes with static only"
        )
    if "speculate" in chosen and "ahead" in chosen:
        raise StrategyError(
            f"names {chosen['speculate']} and {chosen['ahead']}: both use the rows "
            "behind the open block"
        )
    remasked = {"rcr", "remdm"}.intersection(names)
    if "s2d2" in names and remasked:
        raise StrategyError(
            f"names s2d2 and {remasked.pop()}: what was verified would be masked again"
        )
    defaults: dict[str, Any] = {}
    for name in names:
        defaults |= FILLERS[name].defaults
    return Composition(frozenset(names), defaults, values)


def allowed() -> str:
    """What a strategy may be, in words."""
    return "names joined by '+', of " + ", ".join([*FILLERS, *PRESETS])


def users(option: str) -> tuple[str, ...]:
    """The fillers that an option belongs to; none if it belongs to all strategies."""
    return tuple(name for name, filler in FILLERS.items() if option in filler.defaults)
