# SPDX-License-Identifier: Apache-2.0
"""Server options and request options."""

import inspect
import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import option_tables
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask import sampling_params
from vllm_unmask.options import (
    DecodingOptions,
    OptionError,
    ServerOptions,
    decoding_limits,
    parse_request_options,
    parse_server_options,
    require_steps_fit,
    server_limits,
    server_options_from_dict,
    server_options_to_dict,
)
from vllm_unmask.presets import FILLERS
from vllm_unmask.requirements import (
    require_attention_fit,
    require_filter,
    require_parts_scheduled,
    require_seeds_fit,
    require_throttle_fit,
)

DEFAULTS = DecodingOptions()
STATIC = DecodingOptions(strategy="static")


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"other": 1, "diffusion_max_steps": 3}, {}),
        ({"unmask_strategy": "static"}, {"strategy": "static"}),
        ({"unmask_steps": 8}, {"steps": 8}),
        ({"unmask_steps": None}, {"steps": None}),
        ({"unmask_threshold": 0}, {"threshold": 0.0}),
        ({"unmask_threshold": 1.0}, {"threshold": 1.0}),
        ({"unmask_strict": 0}, {"strict": False}),
        ({"unmask_strict": True}, {"strict": True}),
        ({"unmask_order": "margin"}, {"order": "margin"}),
        ({"unmask_confidence_from": "raw"}, {"confidence_from": "raw"}),
    ],
)
def test_request_options(extra_args: Any, expected: dict[str, Any]) -> None:
    parsed = parse_request_options(extra_args, DEFAULTS, 8)
    assert asdict(parsed) == asdict(DEFAULTS) | expected
    assert [type(getattr(parsed, name)) for name in expected] == [
        type(value) for value in expected.values()
    ]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("unmask_step", 4, "unmask_steps (nearest match)"),
        ("unmask-steps", 4, "unmask_steps (nearest match)"),
        ("UNMASK_STEPS", 4, "unmask_steps (nearest match)"),
        ("unmask_zzz", 4, "expected one of unmask_strategy"),
        ("unmask_strategy", 1, "names joined by '+', of static, threshold"),
        ("unmask_step_sizes", "cosin", "did you mean 'cosine'?"),
        ("unmask_trace", 2, "true or false"),
        ("unmask_steps", 0, "at least 1"),
        ("unmask_steps", 9, "from 1 to 8"),
        ("unmask_steps", 4.0, "got float"),
        ("unmask_steps", "4", "got str"),
        ("unmask_steps", True, "got bool"),
        ("unmask_steps", 10**400, "from 1 to 8"),
        ("unmask_threshold", -0.1, "from 0.0 to 1.0"),
        ("unmask_threshold", 1.1, "from 0.0 to 1.0"),
        ("unmask_threshold", 10**400, "from 0.0 to 1.0"),
        ("unmask_threshold", math.nan, "from 0.0 to 1.0"),
        ("unmask_threshold", math.inf, "from 0.0 to 1.0"),
        ("unmask_threshold", True, "got bool"),
        ("unmask_threshold", "0.9", "got str"),
        ("unmask_threshold", None, "got NoneType"),
        ("unmask_strict", 2, "true or false"),
        ("unmask_strict", 1.0, "true or false"),
        ("unmask_strict", "true", "true or false"),
        ("unmask_order", "rand", "did you mean 'random'?"),
        ("unmask_confidence_from", ["raw"], "one of transformed, raw"),
        ("unmask_answer_block_length", 3, "a divisor of 8, the block length"),
        ("unmask_answer_block_length", 16, "a divisor of 8, the block length"),
        ("unmask_answer_block_length", "4", "got str"),
        ("unmask_answer_after", "", "a text of 1 to 32 bytes"),
        ("unmask_answer_after", "\u00e9" * 17, "a text of 1 to 32 bytes"),
        ("unmask_answer_after", "\ud800", "a text of 1 to 32 bytes"),
        ("unmask_answer_after", 7, "a text of 1 to 32 bytes"),
    ],
)
def test_bad_request_option(key: str, value: Any, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_request_options({key: value}, DEFAULTS, 8)
    assert caught.value.parameter == key
    assert caught.value.value is value
    message = str(caught.value)
    assert message.startswith(f"{key}={value!r} is ")
    assert expected in message


@pytest.mark.parametrize(
    ("defaults", "extra_args", "refused"),
    [
        (STATIC, {"unmask_threshold": 0.5}, "unmask_threshold"),
        (STATIC, {"unmask_radius": 2}, "unmask_radius"),
        (
            DEFAULTS,
            {"unmask_strategy": "static+remdm", "unmask_remask_rate": 0.5},
            "unmask_remask_rate",
        ),
        (
            DEFAULTS,
            {
                "unmask_strategy": "static",
                "unmask_step_sizes": "ascending",
                "unmask_steps": 2,
            },
            "unmask_steps",
        ),
        (STATIC, {"unmask_strict": 1}, "unmask_strict"),
        (STATIC, {"unmask_answer_after": "x"}, "unmask_answer_after"),
        (DEFAULTS, {"unmask_strategy": "static", "unmask_threshold": 0.9}, None),
        (
            DEFAULTS,
            {
                "unmask_strategy": "static",
                "unmask_order": "random",
                "unmask_confidence_from": "raw",
            },
            "unmask_confidence_from",
        ),
    ],
)
def test_option_without_effect_is_refused(
    defaults: DecodingOptions, extra_args: dict[str, Any], refused: str | None
) -> None:
    with pytest.raises(OptionError, match="has no effect with strategy=stati") as e:
        parse_request_options(extra_args, defaults, 8)
    assert e.value.parameter == (refused or "unmask_threshold")


def test_server_default_without_effect_is_no_error() -> None:
    """Only what the request itself asks for can be refused."""
    defaults = DecodingOptions(threshold=0.7)
    parsed = parse_request_options({"unmask_strategy": "static"}, defaults, 8)
    assert parsed.strategy == "static"
    again = parse_request_options(
        {"unmask_strategy": "threshold", "unmask_threshold": 0.5}, STATIC, 8
    )
    assert again == DecodingOptions(threshold=0.5)


def test_default_steps_must_fit_too() -> None:
    defaults = DecodingOptions(steps=16)
    with pytest.raises(OptionError, match="from 1 to 8"):
        parse_request_options({}, defaults, 8)
    require_steps_fit(defaults, 16)


@pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}, object()])
def test_server_without_options(additional_config: Any) -> None:
    assert parse_server_options(additional_config) == ServerOptions()


def test_server_options() -> None:
    given = {
        "strategy": "static",
        "steps": 2,
        "block_length": 8,
        "mask_token_id": 3,
        "layout": "exact",
    }
    parsed = parse_server_options({"unmask": given, "other": {"steps": "x"}})
    assert parsed == ServerOptions(
        decoding=DecodingOptions(strategy="static", steps=2),
        block_length=8,
        mask_token_id=3,
        layout="exact",
    )


@pytest.mark.parametrize(
    ("given", "parameter", "expected"),
    [
        (5, "unmask", "an object of option names"),
        (None, "unmask", "an object of option names"),
        ({"tresholds": 1}, "tresholds", "threshold (nearest match)"),
        ({"unmask_steps": 1}, "unmask_steps", "is no known option"),
        ({"decoding": {}}, "decoding", "is no known option"),
        ({"block_length": 0}, "block_length", "at least 1"),
        ({"block_length": 4.0}, "block_length", "got float"),
        ({"mask_token_id": -1}, "mask_token_id", "at least 0"),
        ({"layout": "fast"}, "layout", "one of auto, uniform, exact"),
        ({"steps": 9, "block_length": 8}, "steps", "from 1 to 8"),
        ({"strategy": "static", "strict": True}, "strict", "has no effect"),
        ({1: 2}, "1", "is no known option"),
    ],
)
def test_bad_server_option(given: Any, parameter: str, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_server_options({"unmask": given})
    assert caught.value.parameter == parameter
    assert expected in str(caught.value)


@given(
    st.builds(
        ServerOptions,
        decoding=st.builds(
            DecodingOptions,
            strategy=st.sampled_from(["static", "threshold"]),
            steps=st.none() | st.integers(1, 64),
            threshold=st.none() | st.floats(0, 1),
            strict=st.none() | st.booleans(),
            trace=st.booleans(),
        ),
        block_length=st.none() | st.integers(1, 64),
        layout=st.sampled_from(["auto", "uniform", "exact"]),
    )
)
def test_round_trip_through_json(options: ServerOptions) -> None:
    text = json.dumps(server_options_to_dict(options))
    assert server_options_from_dict(json.loads(text)) == options


def test_a_request_that_names_a_strategy_starts_from_its_defaults() -> None:
    server = DecodingOptions(strategy="threshold", threshold=0.4, steps=2, trace=True)
    kept = parse_request_options({"unmask_strict": False}, server, 8)
    assert (kept.value("threshold"), kept.steps, kept.trace) == (0.4, 2, True)
    named = parse_request_options({"unmask_strategy": "threshold"}, server, 8)
    assert (named.value("threshold"), named.steps, named.trace) == (0.9, None, True)


@pytest.mark.parametrize(
    ("strategy", "name", "value"),
    [
        ("threshold", "threshold", 0.9),
        ("sdar", "threshold", 0.85),
        ("credit+sdar", "threshold", 0.85),
        ("credit+sdar", "credit_weight", 0.7),
        ("cad", "threshold", 0.8),
        ("static", "threshold", None),
        ("dream_entropy", "order", "entropy"),
        ("static", "order", "confidence"),
        ("static", "steps", None),
    ],
)
def test_value_is_what_follows(strategy: str, name: str, value: Any) -> None:
    assert DecodingOptions(strategy=strategy).value(name) == value
    if value is not None and name != "steps":
        given = {"threshold": 0.25, "credit_weight": 0.25, "order": "margin"}[name]
        options = DecodingOptions(strategy=strategy, **{name: given})
        assert options.value(name) == given


def test_learned_needs_its_filter() -> None:
    require_filter(DecodingOptions(strategy="learned"), "a path")
    require_filter(DecodingOptions(), None)
    with pytest.raises(OptionError, match="does not have: expected a filter"):
        require_filter(DecodingOptions(strategy="credit+learned"), None)


def test_one_table_of_options() -> None:
    """Every field has limits and every default of a strategy is within them."""
    assert list(decoding_limits()) == [f.name for f in fields(DecodingOptions)]
    assert set(server_limits()) == {
        *decoding_limits(),
        *(f.name for f in fields(ServerOptions) if f.name != "decoding"),
    }
    arguments = set(inspect.signature(sampling_params).parameters)
    assert arguments == {*decoding_limits(), "kwargs"}


@pytest.mark.parametrize(
    ("file", "table"),
    [
        ("README.md", option_tables.server_options),
        ("vllm_plugin/decoding/README.md", option_tables.request_options),
        ("vllm_plugin/decoding/README.md", option_tables.strategies),
        ("vllm_plugin/decoding/README.md", option_tables.presets),
    ],
)
def test_documentation_has_these_tables(file: str, table: Any) -> None:
    """`python tests/option_tables.py` prints them."""
    assert "".join(table()) in (Path(__file__).parent.parent / file).read_text()


def test_sampling_params() -> None:
    params = sampling_params(
        strategy="threshold",
        threshold=0.5,
        strict=False,
        temperature=0.0,
        max_tokens=7,
        extra_args={"other": 1},
    )
    assert params.extra_args == {
        "other": 1,
        "unmask_strategy": "threshold",
        "unmask_threshold": 0.5,
        "unmask_strict": False,
    }
    assert (params.temperature, params.max_tokens) == (0.0, 7)
    assert sampling_params().extra_args is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"strategy": "statik"},
        {"steps": 0},
        {"threshold": 2.0},
        {"strategy": "static", "threshold": 0.5},
        {"steps": 2, "extra_args": {"unmask_steps": 3}},
        {"extra_args": {"unmask_stepz": 3}},
    ],
)
def test_sampling_params_refuses_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        sampling_params(**arguments)


def test_sampling_params_leaves_to_the_server_what_it_decides() -> None:
    """Whether a threshold applies depends on the server's default strategy."""
    assert sampling_params(threshold=0.5).extra_args == {"unmask_threshold": 0.5}
    assert sampling_params(steps=10**6).extra_args == {"unmask_steps": 10**6}


def test_cache_of_sub_blocks() -> None:
    """For block-causal models, and strategies that read an open sub-block alone."""
    options = DecodingOptions(strategy="fast_dllm_v2", cache="sub_block")
    require_attention_fit(options, "block_causal")
    for attention in ("full", "causal"):
        with pytest.raises(OptionError, match="unmask_cache='sub_block' has no effec"):
            require_attention_fit(options, attention, "unmask_")
    require_parts_scheduled(options, "auto", True)
    with pytest.raises(OptionError, match="cache='sub_block'.*layout auto or exact"):
        require_parts_scheduled(options, "uniform", True)
    with pytest.raises(OptionError, match="cache='sub_block'.*--no-async-scheduling"):
        require_parts_scheduled(options, "auto", False)
    require_parts_scheduled(DEFAULTS, "uniform", False)


def test_verification_while_it_pays() -> None:
    """Where requests can verify, and a step is over before the next is planned."""
    require_throttle_fit(3, 2, "block_causal", True)
    named = "adaptive_verification=True"
    with pytest.raises(OptionError, match=f"{named} .*false, or --no-async-schedulin"):
        require_throttle_fit(3, 2, "block_causal", False)
    with pytest.raises(OptionError, match=f"{named} .*max_candidates of at least 4"):
        require_throttle_fit(3, 3, "block_causal", True)
    for attention in ("full", "causal"):
        with pytest.raises(OptionError, match=f"{named} has no use.* expected false"):
            require_throttle_fit(3, 2, attention, True)


@pytest.mark.parametrize("filler", FILLERS)
def test_what_reads_whole_blocks_is_not_for_the_cache_of_sub_blocks(
    filler: str,
) -> None:
    kept = {"static", "threshold", "factor", "local_leap", "hierarchy", "cad", "bacd"}
    kept |= {"entropy_bounded", "entropy_threshold", "entropy_distance", "ccd"}
    kept |= {"dimple", "eos_rejection", "end_of_text"}
    if filler in ("adablock", "sub_blocks", "rcr"):  # no other beside them
        options = DecodingOptions(strategy=filler, cache="sub_block")
        expected = None if filler == "sub_blocks" else "beside a strategy with sub_b"
    else:
        strategy = f"sub_blocks+{filler}"
        options = DecodingOptions(strategy=strategy, cache="sub_block")
        expected = None if filler in kept else f"none, or a strategy without {filler}"
    if expected is None:
        require_attention_fit(options, "block_causal")
        return
    with pytest.raises(OptionError, match=expected):
        require_attention_fit(options, "block_causal")


def test_cache_of_sub_blocks_is_kept_beside_what_goes_with_it() -> None:
    server = DecodingOptions(strategy="fast_dllm_v2", cache="sub_block")
    for strategy, cache in (
        ("sub_blocks+factor", "sub_block"),
        ("threshold", None),
        ("fast_dllm_v2+lookahead", None),
    ):
        named = parse_request_options({"unmask_strategy": strategy}, server, 8)
        assert named.cache == cache
        require_attention_fit(named, "block_causal")
    asked = {"unmask_strategy": "threshold", "unmask_cache": "sub_block"}
    named = parse_request_options(asked, server, 8)
    with pytest.raises(OptionError, match="cache='sub_block' needs sub-blocks"):
        require_attention_fit(named, "block_causal")


def test_options_of_full_attention() -> None:
    """They are kept beside another strategy, and refused where there is no use."""
    server = DecodingOptions(strategy="static", cache="dual", window=64)
    named = parse_request_options({"unmask_strategy": "threshold"}, server, 8)
    assert (named.cache, named.window) == ("dual", 64)
    assert (DEFAULTS.value("cache"), DEFAULTS.value("window")) == ("none", 512)
    require_attention_fit(named, "full")
    require_attention_fit(DEFAULTS, "block_causal")
    with pytest.raises(OptionError, match="unmask_cache='dual' has no effect"):
        require_attention_fit(named, "block_causal", "unmask_")
    with pytest.raises(OptionError, match="unmask_refresh=4 has no effect .*cache=non"):
        parse_request_options({"unmask_refresh": 4}, DEFAULTS, 8)


@pytest.mark.parametrize("filler", FILLERS)
def test_what_needs_blocks_is_not_for_a_streaming_window(filler: str) -> None:
    """All that remembers, revises, looks ahead, speculates, or has a grid."""
    options = DecodingOptions(strategy=filler)
    kept = {"static", "threshold", "factor", "local_leap", "hierarchy", "cad"}
    kept |= {"entropy_bounded", "entropy_threshold", "entropy_distance"}
    kept |= {"eos_rejection", "end_of_text"}
    if filler in kept:
        require_attention_fit(options, "causal")
        return
    with pytest.raises(OptionError, match=f"expected a strategy without {filler}"):
        require_attention_fit(options, "causal")


def test_schedules_and_seeds_of_a_streaming_window() -> None:
    options = DecodingOptions(strategy="static", step_sizes="ascending")
    require_attention_fit(options, "block_causal")
    with pytest.raises(OptionError, match="unmask_step_sizes='ascending'.*linear"):
        require_attention_fit(options, "causal", "unmask_")
    require_seeds_fit(None, "causal", "seeds")
    require_seeds_fit((1, 2), "full", "seeds")
    with pytest.raises(OptionError, match=r"seeds=\(1, 2\) is not possible"):
        require_seeds_fit((1, 2), "causal", "seeds")


@pytest.mark.parametrize("strategy", ["lookahead", "threshold+s2d2"])
def test_what_needs_a_final_cache_is_not_for_full_attention(strategy: str) -> None:
    options = DecodingOptions(strategy=strategy)
    require_attention_fit(options, "block_causal")
    with pytest.raises(OptionError, match="strategy=.*every position sees every other"):
        require_attention_fit(options, "full")
    require_attention_fit(DecodingOptions(strategy="freedave"), "full")


def test_what_was_read_before_decides_only_about_its_like() -> None:
    defaults = DecodingOptions()
    for _ in range(2):
        read = parse_request_options({"unmask_steps": 1}, defaults, 8)
        assert read.steps == 1 and type(read.steps) is int
        for other in (1.0, True, "1", [1], {"steps": 1}):
            with pytest.raises(OptionError, match="unmask_steps"):
                parse_request_options({"unmask_steps": other}, defaults, 8)
    # The same keys on another server.
    other = DecodingOptions(strategy="static")
    assert parse_request_options({"unmask_steps": 1}, other, 8).strategy == "static"
    with pytest.raises(OptionError, match="block length"):
        parse_request_options({"unmask_steps": 9}, defaults, 8)
    assert parse_request_options({"unmask_steps": 9}, defaults, 16).steps == 9
