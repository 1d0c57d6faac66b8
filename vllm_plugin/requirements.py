# SPDX-License-Identifier: Apache-2.0
"""What a strategy and its options ask of the model and of what lies beside it.

Imports neither torch nor vLLM.
"""

from collections.abc import Mapping
from typing import Any

from vllm_unmask.limits import refused
from vllm_unmask.request_options import OF_WHOLE_BLOCKS, DecodingOptions

# Options of models with full attention alone.
_OF_FULL_ATTENTION = ("refresh", "window")
# Values of `cache` by what a model's positions see.
_CACHES = {
    "full": ("none", "prefix", "dual"),
    "block_causal": ("none", "sub_block"),
    "causal": (),
}
# Fillers that need a cache which no later token changes.
_OF_FINAL_CACHE = ("lookahead", "s2d2")
# Fillers that fill, mask again or look at what a block's open part is followed by.
_BEYOND_A_PART = (
    "prophet",
    "sched",
    "edit",
    "remdm",
    "rcr",
    "freedave",
    *_OF_FINAL_CACHE,
)
# Fillers that remember a block, need its grid, or ask for more rows than a window has.
_OF_BLOCKS = (
    "klass",
    "bacd",
    "ccd",
    "dimple",
    "learned",
    "credit",
    "sub_blocks",
    "adablock",
    "prophet",
    "sched",
    "edit",
    "remdm",
    "rcr",
    "freedave",
    *_OF_FINAL_CACHE,
)


def require_filter(
    options: DecodingOptions, path: str | None, prefix: str = ""
) -> None:
    """Check that the strategy `learned` has its filter.

    Raises:
        OptionError: it has none.

    """
    if "learned" in options.fillers and path is None:
        raise refused(
            prefix + "strategy",
            options.strategy,
            "a filter: the server option `filter`, or unmask/filter.safetensors beside "
            "the checkpoint (see the README on training one)",
            "asks a trained filter, which this server does not have",
        )


def require_attention_fit(
    options: DecodingOptions, attention: str, prefix: str = ""
) -> None:
    """Check that options and strategy go with what a model's positions see.

    Args:
        options: a request's or a server's.
        attention: "block_causal", "full" or "causal", the family's.
        prefix: of the request's keys.

    Raises:
        OptionError: they do not.

    """
    _require_cache(options, attention, prefix)
    if attention == "full":
        for filler in _OF_FINAL_CACHE:
            if filler in options.fillers:
                raise refused(
                    prefix + "strategy",
                    options.strategy,
                    f"a strategy without {filler}",
                    "needs keys and values that later tokens leave as they are, and "
                    "in this model every position sees every other one",
                )
        return
    if attention == "causal":
        _require_streaming(options, prefix)
    for name in _OF_FULL_ATTENTION:
        if (value := getattr(options, name)) is not None:
            raise refused(
                prefix + name,
                value,
                "it for a model with full attention",
                "has no effect, as this model's cache is exact",
            )


def _require_cache(options: DecodingOptions, attention: str, prefix: str) -> None:
    """Check that there is such a cache policy for the model, and for the strategy."""
    value, allowed = options.cache, _CACHES[attention]
    if value is None:
        return
    if value not in allowed:
        raise refused(
            prefix + "cache",
            value,
            " or ".join(allowed) or "it for a model with full attention",
            f"has no effect, as this model's attention is {attention}",
        )
    if value != "sub_block" or options.reads_parts:
        return
    if "sub_blocks" not in options.fillers:
        raise refused(
            prefix + "cache",
            value,
            f"it beside a strategy with sub_blocks, not {options.strategy}",
            "needs sub-blocks",
        )
    filler, *_ = (f for f in OF_WHOLE_BLOCKS if f in options.fillers)
    raise refused(
        prefix + "cache",
        value,
        f"none, or a strategy without {filler}",
        f"leaves out rows that {filler} reads in every step",
    )


def require_parts_scheduled(
    options: DecodingOptions, layout: str, synchronous: bool, prefix: str = ""
) -> None:
    """Check that a server can schedule the sub-blocks that a request forwards alone.

    Args:
        options: a request's or a server's.
        layout: the server's option.
        synchronous: whether a step is planned when the one before it is done.
        prefix: of the request's keys.

    Raises:
        OptionError: it cannot.

    """
    if options.cache != "sub_block":
        return
    expected = reason = None
    if layout == "uniform":
        expected = "layout auto or exact"
        reason = "is not possible with layout=uniform, which schedules whole blocks"
    elif not synchronous:
        expected = "--no-async-scheduling"
        reason = "is not possible before it is known what the step before has unmasked"
    if expected and reason:
        raise refused(
            prefix + "cache", "sub_block", f"none, or a server with {expected}", reason
        )


def require_candidates_fit(
    most: int | None, to_verify: int, options: DecodingOptions, prefix: str = ""
) -> None:
    """Check that a request speculates no further than its server.

    Args:
        most: the server's `max_candidates`.
        to_verify: canvases besides its own in which a request verifies.
        options: a request's or a server's.
        prefix: of the request's keys.

    Raises:
        OptionError: `candidates` is larger than `most`, or that leaves no room for a
            verification.

    """
    if "s2d2" in options.fillers and most is not None and most <= to_verify:
        raise refused(
            prefix + "strategy",
            options.strategy,
            "another strategy, or a server with max_candidates of at least "
            f"{to_verify + 1}, not {most}",
            "verifies in rows that this server does not have",
        )
    wanted = options.candidates
    if wanted is not None and most is not None and wanted > most:
        raise refused(
            prefix + "candidates",
            wanted,
            f"an integer from 1 to {most}, the server's max_candidates",
        )


def require_throttle_fit(
    max_candidates: int, to_verify: int, attention: str, synchronous: bool
) -> None:
    """Check that a server with `adaptive_verification` can verify, and measure it.

    Args:
        max_candidates: canvases of a request that a forward may check.
        to_verify: canvases besides its own in which a request verifies.
        attention: the family's.
        synchronous: whether a step is planned when the one before it is done.

    Raises:
        OptionError: nothing is verified, or too late to measure it.

    """
    allowed = reason = None
    if attention != "block_causal":
        allowed, reason = "false", "has no use, as no request of this model verifies"
    elif max_candidates <= to_verify:
        allowed = f"false, or max_candidates of at least {to_verify + 1}"
        reason = "has no use, as there is no room to verify a draft"
    elif not synchronous:
        allowed = "false, or --no-async-scheduling"
        reason = "is not possible before it is known what the step before has unmasked"
    if allowed and reason:
        raise refused("adaptive_verification", True, allowed, reason)


def _require_streaming(options: DecodingOptions, prefix: str) -> None:
    """Check that options and strategy do without blocks that begin and end."""
    because = "as this model has a window that moves on with every reported token"
    for filler in _OF_BLOCKS:
        if filler in options.fillers:
            raise refused(
                prefix + "strategy",
                options.strategy,
                f"a strategy without {filler}",
                f"needs blocks, {because}",
            )
    sizes = options.value("step_sizes")
    if sizes != "linear":
        raise refused(
            prefix + "step_sizes", sizes, "linear", f"needs blocks, {because}"
        )


def require_answer_fit(
    options: DecodingOptions, served: Mapping[str, Any], prefix: str = ""
) -> None:
    """Check that shorter blocks for the answer go with model, server and strategy.

    Args:
        options: a request's or a server's.
        served: what is known of the model, as `config_hook` puts it together.
        prefix: of the request's keys.

    Raises:
        OptionError: they do not.

    """
    length, name = options.answer_block_length, prefix + "answer_block_length"
    if length is None:
        return
    if (attention := served["attention"]) != "block_causal":
        sees = {
            "full": "in which every position sees every other one",
            "causal": "which has a window that moves on with every reported token",
        }[attention]
        raise refused(
            name, length, "it unset", f"is not possible with this model, {sees}"
        )
    if length == served["block_length"]:
        return
    for filler in _BEYOND_A_PART:
        if filler in options.fillers:
            raise refused(
                name,
                length,
                f"it unset, or a strategy without {filler}",
                f"is not possible with {filler}, which changes more than the part of "
                "a block that is open",
            )
    if options.value("cache") == "sub_block":
        raise refused(
            name,
            length,
            f"it unset, or {prefix}cache=none",
            "is not possible with cache=sub_block, whose sub-blocks see what is right "
            "of them",
        )
    if served["server"]["causal_kv"]:
        raise refused(
            name,
            length,
            "it unset, or a server without causal_kv",
            "is not possible where keys and values are kept token by token",
        )
    if not served["tokenizer"]:
        raise refused(
            name,
            length,
            "it unset, or a server without skip_tokenizer_init",
            "needs the tokenizer, to find answer_after",
        )


def require_seeds_fit(seeds: object | None, attention: str, name: str) -> None:
    """Check that a request that writes on its canvas goes with the model.

    Args:
        seeds: the request's, None without.
        attention: the family's.
        name: of the parameter.

    Raises:
        OptionError: they do not.

    """
    if seeds is not None and attention == "causal":
        raise refused(
            name,
            seeds,
            "no seeds",
            "is not possible, as this model has a window that moves on with every "
            "reported token",
        )
