# SPDX-License-Identifier: Apache-2.0
"""Options of a request as arguments of a Python function."""

from typing import TYPE_CHECKING, Any, Literal

from vllm_unmask.limits import refused
from vllm_unmask.options import (
    REQUEST_PREFIX,
    decoding_limits,
    overlaid,
    own_options,
)
from vllm_unmask.request_options import DecodingOptions

if TYPE_CHECKING:
    from vllm import SamplingParams


def sampling_params(
    *,
    strategy: str | None = None,
    steps: int | None = None,
    step_sizes: Literal["linear", "cosine", "ascending"] | None = None,
    order: Literal["confidence", "margin", "entropy", "random"] | None = None,
    confidence_from: Literal["transformed", "raw"] | None = None,
    threshold: float | None = None,
    strict: bool | None = None,
    relaxed_threshold: float | None = None,
    radius: int | None = None,
    low_threshold: float | None = None,
    high_threshold: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
    distance_penalty: float | None = None,
    whole_entropy: bool | None = None,
    kl_threshold: float | None = None,
    kl_history: int | None = None,
    max_reveals: int | None = None,
    end_gate: float | None = None,
    expand: float | None = None,
    warm_up: int | None = None,
    credit_weight: float | None = None,
    credit_power: float | None = None,
    credit_decay: float | None = None,
    end_floor: float | None = None,
    sub_block_length: int | None = None,
    delimiter: Literal["newline", "comma", "period"] | None = None,
    delimiter_threshold: float | None = None,
    gap_high: float | None = None,
    gap_low: float | None = None,
    gap_shape: Literal["linear", "cosine", "exponential"] | None = None,
    gap_agreement: bool | None = None,
    edit_threshold: float | None = None,
    post_steps: int | None = None,
    remask: Literal["cap", "rescale", "conf"] | None = None,
    remask_rate: float | None = None,
    ahead_threshold: float | None = None,
    candidates: int | None = None,
    route: Literal[
        "always",
        "never",
        "span_length",
        "score_threshold",
        "score_hysteresis",
        "contextual_bandit",
    ]
    | None = None,
    acceptance_estimate: Literal[
        "margin_threshold",
        "entropy_threshold",
        "confidence_power",
        "margin_linear",
        "entropy_decay",
    ]
    | None = None,
    estimate_parameter: float | None = None,
    verify_cost: float | None = None,
    cost_per_token: bool | None = None,
    min_score: float | None = None,
    score_on: float | None = None,
    score_off: float | None = None,
    min_span: int | None = None,
    exploration: float | None = None,
    tempering: float | None = None,
    doubt: float | None = None,
    cache: Literal["none", "prefix", "dual", "sub_block"] | None = None,
    refresh: int | None = None,
    window: int | None = None,
    answer_block_length: int | None = None,
    answer_after: str | None = None,
    trace: bool | None = None,
    **kwargs: Any,
) -> "SamplingParams":
    """Build vLLM's `SamplingParams` with this plugin's request options.

    Args:
        strategy, steps, ..., trace: as in `DecodingOptions`; None leaves the server's
            default.
        **kwargs: everything else `SamplingParams` takes, `extra_args` included.

    Raises:
        OptionError: a value that no server would accept, or the same option here
            and in `extra_args`. What depends on the server (its default strategy,
            the block length) is checked when the request is sent.

    """
    arguments = locals()
    from vllm import SamplingParams

    given = {
        REQUEST_PREFIX + name: arguments[name]
        for name in decoding_limits()
        if arguments[name] is not None
    }
    extra_args = dict(kwargs.pop("extra_args", None) or {})
    for key in given.keys() & extra_args.keys():
        raise refused(
            key, extra_args[key], "an argument or extra_args", "is given twice"
        )
    extra_args |= given
    own = own_options(extra_args)
    known = "strategy" in own
    overlaid(own, DecodingOptions(), REQUEST_PREFIX, None, strategy_known=known)
    return SamplingParams(extra_args=extra_args or None, **kwargs)
