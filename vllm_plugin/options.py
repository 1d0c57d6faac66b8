# SPDX-License-Identifier: Apache-2.0
"""Server options and request options: what they are, their limits, their errors.

The metadata of the dataclass fields is the only list of options. The parsers
check against it, `doctor` prints it, and the README's table is made from it.
Imports neither torch nor vLLM.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from vllm_unmask.limits import (
    Limits,
    check_value,
    refused,
    unknown_option,
)
from vllm_unmask.limits import OptionError as OptionError

if TYPE_CHECKING:
    from vllm import SamplingParams

REQUEST_PREFIX = "unmask_"
SERVER_KEY = "unmask"
# Where `extra_args` carries an admitted grammar to the sampler. Not an option: the
# front end sets it after it has checked the request's own keys.
GRAMMAR_KEY = "unmask grammar"


def _option(default: Any, limits: Limits) -> Any:
    return field(default=default, metadata={"limits": limits})


@dataclass(frozen=True)
class DecodingOptions:
    """What a request, or the server's default, asks of decoding."""

    strategy: str = _option(
        "threshold",
        Limits(
            "choice",
            "static: the schedule alone; threshold: also every position that is "
            "sure enough",
            choices=("static", "threshold"),
        ),
    )
    steps: int | None = _option(
        None,
        Limits(
            "int",
            "denoising steps over which the schedule spreads a block, at most the "
            "block length; unset: the block length, one position a step",
            low=1,
            optional=True,
        ),
    )
    threshold: float = _option(
        0.9,
        Limits(
            "float",
            "confidence from which a position is revealed",
            low=0.0,
            high=1.0,
            applies=lambda options: options.strategy == "threshold",
            condition="strategy=threshold",
        ),
    )
    strict: bool = _option(
        True,
        Limits(
            "bool",
            "reveal when the confidence is above the threshold (true) or also when "
            "it equals it (false)",
            applies=lambda options: options.strategy == "threshold",
            condition="strategy=threshold",
        ),
    )
    order: str = _option(
        "confidence",
        Limits(
            "choice",
            "which masked position the schedule reveals first",
            choices=("confidence", "margin", "entropy", "random"),
        ),
    )
    confidence_from: str = _option(
        "transformed",
        Limits(
            "choice",
            "distribution that confidence is read from: after temperature, top-k, "
            "top-p and min-p, or the raw softmax",
            choices=("transformed", "raw"),
            applies=lambda options: (
                options.strategy == "threshold" or options.order != "random"
            ),
            condition="strategy=threshold or an order other than random",
        ),
    )


@dataclass(frozen=True)
class ServerOptions:
    """What the server was started with."""

    decoding: DecodingOptions = DecodingOptions()
    block_length: int | None = _option(
        None, Limits("int", "overrides the checkpoint's", low=1, optional=True)
    )
    mask_token_id: int | None = _option(
        None, Limits("int", "overrides the checkpoint's", low=0, optional=True)
    )
    layout: str = _option(
        "auto",
        Limits(
            "choice",
            "canvas layout: uniform schedules two blocks in every step, exact only "
            "in a step that commits",
            choices=("auto", "uniform", "exact"),
        ),
    )
    grammar_guard: bool = _option(
        True,
        Limits(
            "bool",
            "complete a structured output before its tokens run out; without it "
            "max_tokens may cut an output off",
        ),
    )


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


def _decoding(
    given: Mapping[str, Any],
    defaults: DecodingOptions,
    prefix: str,
    block_length: int | None,
    strategy_known: bool = True,
) -> DecodingOptions:
    """Check `given` (names without prefix) and lay it over `defaults`."""
    limits = decoding_limits()
    checked = {
        name: check_value(prefix + name, value, limits[name])
        for name, value in given.items()
    }
    options = DecodingOptions(**(asdict(defaults) | checked))
    if strategy_known:
        for name, value in given.items():
            applies = limits[name].applies
            if applies is not None and not applies(options):
                raise refused(
                    prefix + name,
                    value,
                    limits[name].condition,
                    f"has no effect with strategy={options.strategy}, "
                    f"order={options.order}",
                )
    if block_length is not None:
        require_steps_fit(options, block_length, prefix)
    return options


def require_steps_fit(
    options: DecodingOptions, block_length: int, prefix: str = ""
) -> None:
    """Check that a block has at least as many positions as denoising steps.

    Raises:
        OptionError: `options.steps` is larger than `block_length`.

    """
    if options.steps is not None and options.steps > block_length:
        raise refused(
            prefix + "steps",
            options.steps,
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
    return _decoding(_own(extra_args), defaults, REQUEST_PREFIX, block_length)


def _own(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Our keys in `extra_args`, without their prefix."""
    if not extra_args:
        return {}
    known = [REQUEST_PREFIX + name for name in decoding_limits()]
    given: dict[str, Any] = {}
    for key, value in extra_args.items():
        # Wider than the prefix, so that `unmask-steps` is refused too.
        if not isinstance(key, str) or not key.lower().startswith(SERVER_KEY):
            continue
        if key not in known:
            raise unknown_option(key, value, known, REQUEST_PREFIX)
        given[key.removeprefix(REQUEST_PREFIX)] = value
    return given


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
    decoding = _decoding(
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


def sampling_params(
    *,
    strategy: Literal["static", "threshold"] | None = None,
    steps: int | None = None,
    threshold: float | None = None,
    strict: bool | None = None,
    order: Literal["confidence", "margin", "entropy", "random"] | None = None,
    confidence_from: Literal["transformed", "raw"] | None = None,
    **kwargs: Any,
) -> "SamplingParams":
    """Build vLLM's `SamplingParams` with this plugin's request options.

    Args:
        strategy, steps, threshold, strict, order, confidence_from: as in
            `DecodingOptions`; None leaves the server's default.
        **kwargs: everything else `SamplingParams` takes, `extra_args` included.

    Raises:
        OptionError: a value that no server would accept, or the same option here
            and in `extra_args`. What depends on the server (its default strategy,
            the block length) is checked when the request is sent.

    """
    from vllm import SamplingParams

    named = (strategy, steps, threshold, strict, order, confidence_from)
    given = {
        REQUEST_PREFIX + name: value
        for name, value in zip(decoding_limits(), named, strict=True)
        if value is not None
    }
    extra_args = dict(kwargs.pop("extra_args", None) or {})
    for key in given.keys() & extra_args.keys():
        raise refused(
            key, extra_args[key], "an argument or extra_args", "is given twice"
        )
    extra_args |= given
    own = _own(extra_args)
    known = "strategy" in own
    _decoding(own, DecodingOptions(), REQUEST_PREFIX, None, strategy_known=known)
    return SamplingParams(extra_args=extra_args or None, **kwargs)
