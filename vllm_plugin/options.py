# SPDX-License-Identifier: Apache-2.0
"""Server options, and reading both kinds of options from what users write.

Imports neither torch nor vLLM.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from typing import Any

from vllm_unmask.limits import (
    Limits,
    check_value,
    refused,
    unknown_option,
)
from vllm_unmask.limits import OptionError as OptionError
from vllm_unmask.presets import StrategyError, allowed, compose
from vllm_unmask.request_options import DecodingOptions as DecodingOptions
from vllm_unmask.request_options import option

REQUEST_PREFIX = "unmask_"
SERVER_KEY = "unmask"
# Where `extra_args` carries an admitted grammar to the sampler. Not an option: the
# front end sets it after it has checked the request's own keys.
GRAMMAR_KEY = "unmask grammar"


# What a request that names a strategy keeps of the server's options.
_KEPT = ("trace", "cache", "refresh", "window")


@dataclass(frozen=True)
class ServerOptions:
    """What the server was started with."""

    decoding: DecodingOptions = DecodingOptions()
    block_length: int | None = option(
        None, Limits("int", "overrides the checkpoint's", low=1, optional=True)
    )
    mask_token_id: int | None = option(
        None, Limits("int", "overrides the checkpoint's", low=0, optional=True)
    )
    layout: str = option(
        "auto",
        Limits(
            "choice",
            "canvas layout: uniform schedules two blocks in every step, exact only "
            "in a step that commits; auto: exact, with asynchronous scheduling what "
            "is faster at the load",
            choices=("auto", "uniform", "exact"),
        ),
    )
    filter: str | None = option(
        None,
        Limits(
            "path",
            "safetensors file of the filter that the strategy learned asks; unset: "
            "unmask/filter.safetensors beside the checkpoint, if it is there",
            optional=True,
        ),
    )
    max_candidates: int | None = option(
        None,
        Limits(
            "int",
            "canvases of one request that a forward may check when it speculates, its "
            "own included; 1: no request speculates; unset: as many as have 128 rows, "
            "at least 3 and at most 16",
            optional=True,
            low=1,
            high=16,
        ),
    )
    adaptive_candidates: bool = option(
        True,
        Limits(
            "bool",
            "check as many candidates as have been paying, by tokens a second at the "
            "server's load; without it as many as requests ask for",
        ),
    )
    adaptive_verification: bool = option(
        False,
        Limits(
            "bool",
            "verify drafts (s2d2) only while that has been paying, by tokens a second "
            "at the server's load; outputs then depend on the load, but not with "
            "route=always, which always verifies; schedules synchronously",
        ),
    )
    causal_kv: bool = option(
        False,
        Limits(
            "bool",
            "keep the keys and values that complete blocks have token by token, as in "
            "autoregressive decoding, so that a verification (s2d2) is exactly that; "
            "not what block-diffusion models were trained with",
        ),
    )
    grammar_guard: bool = option(
        True,
        Limits(
            "bool",
            "complete a structured output before its tokens run out; without it "
            "max_tokens may cut an output off",
        ),
    )


@cache
def decoding_limits() -> dict[str, Limits]:
    """The options of a request, by name without prefix."""
    return {f.name: f.metadata["limits"] for f in fields(DecodingOptions)}


def server_limits() -> dict[str, Limits]:
    """The options of a server, by name: those of a request and its own."""
    own = {
        f.name: f.metadata["limits"]
        for f in fields(ServerOptions)
        if "limits" in f.metadata
    }
    return decoding_limits() | own


def overlaid(
    given: Mapping[str, Any],
    defaults: DecodingOptions,
    prefix: str,
    block_length: int | None,
    strategy_known: bool = True,
) -> DecodingOptions:
    """Check `given` (names without prefix) and lay it over `defaults`."""
    limits = decoding_limits()
    checked = {
        name: _checked(prefix + name, value, limits[name])
        for name, value in given.items()
    }
    base: Mapping[str, Any] = vars(defaults)
    if "strategy" in checked:
        # The server's options were made for the server's strategy.
        base = {name: base[name] for name in _KEPT}
    options = DecodingOptions(**{**base, **checked})
    inherited = "strategy" in checked and "cache" not in checked
    if inherited and options.cache == "sub_block" and not options.reads_parts:
        options = replace(options, cache=None)
    if strategy_known:
        for name, value in given.items():
            applies = limits[name].applies
            if applies is not None and not applies(options):
                raise refused(
                    prefix + name,
                    value,
                    f"it only beside {limits[name].condition}",
                    f"has no effect with strategy={options.strategy}, "
                    f"order={options.value('order')}, "
                    f"step_sizes={options.value('step_sizes')}, "
                    f"cache={options.value('cache')}",
                )
    if block_length is not None:
        require_steps_fit(options, block_length, prefix)
    return options


def _checked(parameter: str, value: Any, limits: Limits) -> Any:
    if limits.kind != "strategy":
        return check_value(parameter, value, limits)
    if not isinstance(value, str):
        raise refused(parameter, value, allowed())
    try:
        compose(value)
    except StrategyError as error:
        raise refused(parameter, value, allowed(), str(error)) from None
    return value


def require_steps_fit(
    options: DecodingOptions, block_length: int, prefix: str = ""
) -> None:
    """Check that a block has as many positions as it has steps, and parts fit in it.

    Raises:
        OptionError: `steps` or `sub_block_length` is larger than `block_length`, or
            `answer_block_length` does not divide it.

    """
    answer = options.answer_block_length
    if answer is not None and block_length % answer:
        raise refused(
            prefix + "answer_block_length",
            answer,
            f"a divisor of {block_length}, the block length",
        )
    for name in ("steps", "sub_block_length"):
        value = getattr(options, name)
        if value is not None and value > block_length:
            raise refused(
                prefix + name,
                value,
                f"an integer from 1 to {block_length}, the block length",
            )


def parse_request_options(
    extra_args: Mapping[str, Any] | None,
    defaults: DecodingOptions,
    block_length: int,
) -> DecodingOptions:
    """Read the `unmask_*` keys of a request's `extra_args` (HTTP: `vllm_xargs`).

    Keys that do not start with `unmask` are not ours and are left alone.

    Raises:
        OptionError: an unknown key, a wrong type, a value out of range, or an
            option that has no effect with the resulting strategy.

    """
    given = own_options(extra_args)
    if not given:
        require_steps_fit(defaults, block_length, REQUEST_PREFIX)
        return defaults
    try:
        return _parsed(defaults, block_length, *given, *given.values())
    except TypeError:
        # A value that is no scalar, and that no option takes.
        return overlaid(given, defaults, REQUEST_PREFIX, block_length)


# Typed, because 1, 1.0 and True are equal and not the same option.
@lru_cache(maxsize=128, typed=True)
def _parsed(
    defaults: DecodingOptions, block_length: int, *names_and_values: Any
) -> DecodingOptions:
    """Most requests of a server name the same options, and each is read three times."""
    half = len(names_and_values) // 2
    given = dict(zip(names_and_values[:half], names_and_values[half:], strict=True))
    return overlaid(given, defaults, REQUEST_PREFIX, block_length)


def admitted_options(
    extra_args: Mapping[str, Any] | None,
    defaults: DecodingOptions,
    block_length: int,
) -> DecodingOptions:
    """The options of a request that the front end has checked and added to."""
    given = dict(extra_args or {})
    given.pop(GRAMMAR_KEY, None)
    return parse_request_options(given, defaults, block_length)


def own_options(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our keys in `extra_args`, without their prefix."""
    if not extra_args:
        return {}
    known = _request_keys()
    given: dict[str, Any] = {}
    for key, value in extra_args.items():
        if name := known.get(key):
            given[name] = value
        # Wider than the prefix, so that `unmask-steps` is refused too.
        elif isinstance(key, str) and key.lower().startswith(SERVER_KEY):
            raise unknown_option(key, value, list(known), REQUEST_PREFIX)
    return given


@cache
def _request_keys() -> dict[str, str]:
    """The options of a request: key in `extra_args` -> name."""
    return {REQUEST_PREFIX + name: name for name in decoding_limits()}


def parse_server_options(additional_config: Any) -> ServerOptions:
    """Read `additional_config["unmask"]`, a flat mapping of names to values.

    Args:
        additional_config: vLLM's `--additional-config`; a mapping, or None, or a
            platform's own object, which holds no options of ours.

    Raises:
        OptionError: the entry is not a mapping, or as for a request.

    """
    if not isinstance(additional_config, Mapping):
        return ServerOptions()
    given = additional_config.get(SERVER_KEY, {})
    if not isinstance(given, Mapping):
        raise refused(SERVER_KEY, given, "an object of option names and values")
    limits = server_limits()
    for key, value in given.items():
        if key not in limits:
            raise unknown_option(str(key), value, limits)
    of_request = decoding_limits()
    own = {
        key: check_value(key, value, limits[key])
        for key, value in given.items()
        if key not in of_request
    }
    decoding = overlaid(
        {key: value for key, value in given.items() if key in of_request},
        DecodingOptions(),
        "",
        own.get("block_length"),
    )
    return ServerOptions(decoding=decoding, **own)


def server_options_to_dict(options: ServerOptions) -> dict[str, Any]:
    """Return a JSON-safe copy that `server_options_from_dict` turns back."""
    return asdict(options)


def server_options_from_dict(data: Mapping[str, Any]) -> ServerOptions:
    """Turn back what `server_options_to_dict` made."""
    own = {key: value for key, value in data.items() if key != "decoding"}
    return ServerOptions(decoding=DecodingOptions(**data["decoding"]), **own)
