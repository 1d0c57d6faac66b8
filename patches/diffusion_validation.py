# SPDX-License-Identifier: Apache-2.0
"""Admit the sampling parameters that our models honour, refuse the others."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_unmask.limits import refused
from vllm_unmask.options import (
    REQUEST_PREFIX,
    SERVER_KEY,
    DecodingOptions,
    OptionError,
    parse_request_options,
    server_options_from_dict,
)
from vllm_unmask.patches import Guard, Patch, Replacement
from vllm_unmask.patches.served import served_record
from vllm_unmask.requirements import (
    require_answer_fit,
    require_attention_fit,
    require_candidates_fit,
    require_filter,
    require_parts_scheduled,
    require_seeds_fit,
)
from vllm_unmask.seeds import PINNED_KEY, SEED_KEY, Seeds, parse_seeds

# Parameters that change nothing at these values and are not honoured at others.
_NEUTRAL_ONLY: Mapping[str, tuple[Any, str]] = {
    "presence_penalty": (0.0, "0"),
    "frequency_penalty": (0.0, "0"),
    "repetition_penalty": (1.0, "1"),
    "prompt_logprobs": (None, "unset"),
    "prompt_logprob_token_ids": (None, "unset"),
    "logprob_token_ids": (None, "unset"),
    "thinking_token_budget": (None, "unset"),
    "trace_decode_token_ids": (None, "unset"),
}
_VLLM_PREFIX = "diffusion_"
# Filler, why not, and parameters that it does not go with.
_NOT_TOGETHER = (
    (
        "lookahead",
        "unmasks tokens whose place in the output is not open yet",
        ("bad_words", "logit_bias", "allowed_token_ids", "min_tokens"),
    ),
    ("edit", "replaces tokens that were checked when unmasked", ("bad_words",)),
)


def _build(original: Callable[..., None]) -> Callable[..., None]:
    def _validate_diffusion(self: Any, model_config: Any) -> None:
        record = served_record(model_config)
        if record is not None:
            _validate_ours(self, record)
            return
        if self.extra_args:
            _refuse_our_keys(self.extra_args)
        original(self, model_config)

    return _validate_diffusion


def _validate_ours(params: Any, record: Mapping[str, Any]) -> None:
    for name, (neutral, allowed) in _NEUTRAL_ONLY.items():
        value = getattr(params, name, neutral)
        # Identity first: one of the parameters holds an array.
        if value is not neutral and (neutral is None or value != neutral):
            _refuse(
                f"{name} is not supported for block-diffusion models: expected "
                f"{allowed}",
                name,
                value,
            )
    extra_args = params.extra_args or {}
    for key, value in extra_args.items():
        if key in (SEED_KEY, PINNED_KEY):
            continue
        if isinstance(key, str) and key.startswith(_VLLM_PREFIX):
            _refuse(
                f"{key} is not supported for this model: its request options start "
                f"with 'unmask_'",
                key,
                value,
            )
    server = server_options_from_dict(record["server"])
    try:
        options = parse_request_options(
            extra_args, server.decoding, record["block_length"]
        )
        require_filter(options, record["filter"], REQUEST_PREFIX)
        require_attention_fit(options, record["attention"], REQUEST_PREFIX)
        require_candidates_fit(
            server.max_candidates, record["verify_windows"], options, REQUEST_PREFIX
        )
        require_parts_scheduled(
            options, server.layout, record["synchronous"], REQUEST_PREFIX
        )
        require_answer_fit(options, record, REQUEST_PREFIX)
        seeds = parse_seeds(
            extra_args,
            record["vocab_size"],
            record["mask_token_id"],
            params.max_tokens,
        )
        require_seeds_fit(seeds and seeds.ids, record["attention"], SEED_KEY)
        _require_compatible(params, options, seeds)
    except OptionError as error:
        _refuse(str(error), error.parameter, error.value)
    _validate_mask_token(params, record["mask_token_id"])


def _require_compatible(
    params: Any, options: DecodingOptions, seeds: Seeds | None
) -> None:
    """Check what is allowed by itself and not together.

    Raises:
        OptionError: names both.
    """
    from vllm.sampling_params import RequestOutputKind

    strategy = f"{REQUEST_PREFIX}strategy"
    for filler, reason, names in _NOT_TOGETHER:
        for name in names:
            if filler in options.fillers and getattr(params, name):
                instead = f"another strategy, or no {name}"
                raise refused(strategy, options.strategy, instead, reason)
    if options.trace:
        if params.n > 1:
            raise refused(f"{REQUEST_PREFIX}trace", True, "n=1", f"with n={params.n}")
        if params.output_kind == RequestOutputKind.DELTA:
            raise refused(
                f"{REQUEST_PREFIX}trace", True, "stream=false", "with a streamed answer"
            )
    if seeds is None and options.doubt is not None:
        raise refused(
            f"{REQUEST_PREFIX}doubt",
            options.doubt,
            f"a {SEED_KEY} to doubt",
            "has no effect",
        )


def _validate_mask_token(params: Any, mask_token_id: int) -> None:
    """The mask is never a prediction, so nothing may ask for it."""
    if params.logit_bias and mask_token_id in params.logit_bias:
        _refuse(
            f"logit_bias on token {mask_token_id} has no effect: it is the mask "
            f"token, which is never generated",
            "logit_bias",
            params.logit_bias[mask_token_id],
        )
    allowed = params.allowed_token_ids
    if allowed and set(allowed) == {mask_token_id}:
        _refuse(
            f"allowed_token_ids leaves no token to generate: {mask_token_id} is the "
            f"mask token; expected at least one other token id",
            "allowed_token_ids",
            allowed,
        )


def _refuse_our_keys(extra_args: Mapping[str, Any]) -> None:
    for key, value in extra_args.items():
        if isinstance(key, str) and key.startswith(SERVER_KEY):
            _refuse(
                f"{key} has no effect here: the served model is not a "
                f"block-diffusion model of vllm-unmask",
                key,
                value,
            )


def _refuse(message: str, parameter: str, value: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    raise VLLMValidationError(message, parameter=parameter, value=value)


_TARGET = "vllm.sampling_params:SamplingParams._validate_diffusion"

PATCH = Patch(
    name="diffusion_validation",
    what="checks the sampling parameters of a request to one of our models; refuses "
    "`unmask_*` keys sent to any other model",
    why="vLLM refuses temperature other than 1, seed, min_p, min_tokens, logit_bias, "
    "bad_words and allowed_token_ids for every diffusion model, and knows no request "
    "options of plugins",
    removal="vLLM asks the model, or a plugin, which parameters it honours",
    replacements=(Replacement(_TARGET, _build),),
    guards=(
        Guard(
            _TARGET,
            {
                "0.32": "2fbdc056cf1423098bf6dbe34fe9132a"
                "c8d9f0f5f079e144da7afbbcaa17494d",
                "0.33": "2fbdc056cf1423098bf6dbe34fe9132a"
                "c8d9f0f5f079e144da7afbbcaa17494d",
            },
        ),
        # Calls the target for every request, before the engine sees it.
        Guard(
            "vllm.sampling_params:SamplingParams.verify",
            {
                "0.32": "ae287ee645ce2c222c94c42dd4461c22"
                "ee3e91069f8cc0ab281be939484e932a",
                "0.33": "ae287ee645ce2c222c94c42dd4461c22"
                "ee3e91069f8cc0ab281be939484e932a",
            },
        ),
    ),
)
