# SPDX-License-Identifier: Apache-2.0
"""Fillers, presets and options agree with each other."""

import random
from dataclasses import fields
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.limits import check_value
from vllm_unmask.options import (
    DecodingOptions,
    OptionError,
    decoding_limits,
    parse_request_options,
)
from vllm_unmask.presets import (
    FILLERS,
    PRESETS,
    SEPARATOR,
    SLOTS,
    StrategyError,
    allowed,
    compose,
    users,
)

DEFAULTS = DecodingOptions()
BLOCK = 32
# Options that every strategy has.
GENERAL = {"strategy", "steps", "step_sizes", "order", "confidence_from", "doubt"}
GENERAL |= {"cache", "refresh", "window", "answer_block_length", "answer_after"}
GENERAL |= {"trace"}
NAMES = {field.name for field in fields(DecodingOptions)}
# Beside which options a filler's default has an effect, where it has not always.
BESIDE = {
    "remask_rate": {"remask": "cap"},
    "score_on": {"route": "score_hysteresis"},
    "score_off": {"route": "score_hysteresis"},
    "min_span": {"route": "span_length"},
    "exploration": {"route": "contextual_bandit"},
}


def parse(strategy: str, **options: object) -> DecodingOptions:
    extra = {"unmask_strategy": strategy}
    extra |= {f"unmask_{name}": value for name, value in options.items()}
    return parse_request_options(extra, DEFAULTS, BLOCK)


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name: str) -> None:
    preset = PRESETS[name]
    composition = compose(name)
    assert composition.fillers == compose(preset.strategy).fillers
    assert composition.values == preset.values
    assert set(preset.values) <= set(composition.defaults) | GENERAL
    # What it sets a request might as well have set.
    given, named = parse(preset.strategy, **preset.values), parse(name)
    for option in NAMES - {"strategy"}:
        assert given.value(option) == named.value(option)
    assert preset.doc


def test_names_are_used_once() -> None:
    assert not FILLERS.keys() & PRESETS.keys()
    assert not any(SEPARATOR in name for name in [*FILLERS, *PRESETS])
    recipes = [(p.strategy, *p.values.items()) for p in PRESETS.values()]
    assert len(set(recipes)) == len(recipes)


def test_every_slot_has_fillers() -> None:
    assert {filler.slot for filler in FILLERS.values()} == set(SLOTS)
    assert all(filler.doc for filler in FILLERS.values())


def test_options_belong_to_fillers() -> None:
    of_fillers = {name for filler in FILLERS.values() for name in filler.defaults}
    assert of_fillers | GENERAL == NAMES
    assert not of_fillers & GENERAL
    for name in of_fillers:
        assert set(users(name)) == {f for f in FILLERS if name in FILLERS[f].defaults}
        condition = decoding_limits()[name].condition
        assert all(user in condition for user in users(name))
    assert all(users(name) == () for name in GENERAL)


@pytest.mark.parametrize(
    ("filler", "option"),
    [(name, option) for name in FILLERS for option in FILLERS[name].defaults],
)
def test_default_of_a_filler(filler: str, option: str) -> None:
    default = FILLERS[filler].defaults[option]
    assert check_value(option, default, decoding_limits()[option]) == default
    assert parse(filler).value(option) == default
    given = {option: default} | BESIDE.get(option, {})
    assert parse(filler, **given).value(option) == default


@pytest.mark.parametrize("filler", FILLERS)
def test_options_of_others_are_refused(filler: str) -> None:
    others = NAMES - GENERAL - set(compose(filler).defaults)
    for option in others:
        owner = users(option)[0]
        default = FILLERS[owner].defaults[option]
        value = 1 if default is None else default
        with pytest.raises(OptionError, match="has no effect"):
            parse(filler, **{option: value})


def test_fillers_that_go_together_share_no_option() -> None:
    """Otherwise the order of their names would say whose default holds."""
    for one, other in combinations(FILLERS, 2):
        try:
            compose(SEPARATOR.join((one, other)))
        except StrategyError:
            continue
        assert not FILLERS[one].defaults.keys() & FILLERS[other].defaults.keys()


@given(
    st.sets(st.sampled_from([*FILLERS, *PRESETS]), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_order_of_names_does_not_matter(names: set[str], rng: random.Random) -> None:
    def outcome(order: list[str]) -> object:
        try:
            return compose(SEPARATOR.join(order))
        except StrategyError:
            return None

    ordered = sorted(names)
    shuffled = rng.sample(ordered, len(ordered))
    assert outcome(shuffled) == outcome(ordered)


@pytest.mark.parametrize(
    ("strategy", "accept"),
    [
        ("edit", "threshold"),
        ("credit+eos_rejection", "threshold"),
        ("rcr", "static"),
        ("factor+edit", "factor"),
        ("eoser+edit", "static"),
    ],
)
def test_rule_if_none_is_named(strategy: str, accept: str) -> None:
    rules = {f for f in compose(strategy).fillers if FILLERS[f].slot == "accept"}
    assert rules == {accept}


def test_preset_with_fillers() -> None:
    composition = compose("credit+fast_dllm+lookahead")
    assert composition.fillers == {"credit", "threshold", "lookahead"}
    assert composition.values == {"strict": False}
    assert parse("credit+fast_dllm", strict=True).value("strict") is True


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("llada+sdar", "names two presets, llada and sdar"),
        ("llada+llada", "names two presets, llada and llada"),
        ("treshold", "'treshold', which is no strategy, did you mean 'threshold'?"),
        ("fast_dlm", "did you mean 'fast_dllm'?"),
        ("zzz", "names 'zzz', which is no strategy"),
        ("", "names '', which is no strategy"),
        ("edit+", "names '', which is no strategy"),
        ("edit + remdm", "names 'edit '"),
        ("Threshold", "names 'Threshold'"),
        ("credit+credit", "names credit twice"),
        ("edit+static+edit", "names edit twice"),
        ("creditdecoding+credit", "names credit twice"),
        ("static+threshold", "names both static and threshold: one alone decides"),
        ("llada+threshold", "names both threshold and static: one alone decides"),
        ("sub_blocks+adablock", "which part of the block is open"),
        ("prophet+sched", "when the rest of the block is filled at once"),
        ("edit+remdm", "which revealed tokens are replaced or masked again"),
        ("rcr+edit", "which revealed tokens are replaced or masked again"),
        ("rcr+sub_blocks", "rcr fills the whole of it"),
        ("rcr+adablock", "rcr fills the whole of it"),
        ("rcr+prophet", "rcr fills the whole of it"),
        ("rcr+sched", "rcr fills the whole of it"),
        ("end_of_text+edit", "names end_of_text and edit"),
        ("end_of_text+remdm", "names end_of_text and remdm"),
        ("end_of_text+rcr", "names end_of_text and rcr"),
        ("learn2pd+edit", "names end_of_text and edit"),
        ("rcr+threshold", "names rcr and threshold"),
        ("rcr+ccd", "goes with static only"),
        ("mdpo_rcr+threshold", "names both threshold and static"),
    ],
)
def test_refusal(strategy: str, message: str) -> None:
    with pytest.raises(StrategyError) as caught:
        compose(strategy)
    assert message in str(caught.value)
    with pytest.raises(OptionError) as refused:
        parse(strategy)
    assert refused.value.parameter == "unmask_strategy"
    assert message in str(refused.value) and allowed() in str(refused.value)


def test_allowed_names_all() -> None:
    assert all(name in allowed() for name in [*FILLERS, *PRESETS])


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("s2d2_sdar_4", "sdar_4"),
        ("s2d2_sdar_16", "sdar_16"),
        ("s2d2_fast_dllm_v2", "fast_dllm_v2_4"),
        ("s2d2_fast_dllm_v2", "fast_dllm_v2_16"),
        ("s2d2_fast_dllm_v2_32", "fast_dllm_v2_32"),
        ("s2d2_llada2_conservative", "llada2_conservative"),
        ("s2d2_llada2_quality", "llada2_quality"),
    ],
)
def test_presets_of_s2d2_are_the_published_ones(preset: str, published: str) -> None:
    from vllm_unmask.decoding.routing import PUBLISHED

    options, config = parse(preset), PUBLISHED[published]
    read = {
        "span_length": {"min_span": config.min_span},
        "score_threshold": {"min_score": config.min_score},
        "score_hysteresis": {
            "score_on": config.on_above,
            "score_off": config.off_below,
        },
    }[config.policy]
    if config.policy != "span_length":
        read |= {
            "acceptance_estimate": config.estimate,
            "verify_cost": config.cost,
            "cost_per_token": config.dynamic,
        }
    read |= {"route": config.policy, "threshold": config.threshold, "tempering": 1.0}
    assert {name: options.value(name) for name in read} == read
