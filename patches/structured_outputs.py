# SPDX-License-Identifier: Apache-2.0
"""Admit structured outputs for our models, and compile them beside the event loop.

vLLM's own path masks tokens from left to right and refuses a canvas. Ours replaces
`structured_outputs` by a record in `extra_args` that our sampler reads, so that
neither vLLM's scheduler nor its runner sees a grammar. What cannot be honoured is
refused here: a bad or too costly grammar, and one whose shortest output does not fit
into the request's tokens.
"""

import asyncio
import copy
import functools
import json
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_unmask.options import (
    GRAMMAR_KEY,
    parse_request_options,
    server_options_from_dict,
)
from vllm_unmask.patches import Guard, Patch, Replacement
from vllm_unmask.patches.served import is_ours, served_record
from vllm_unmask.seeds import PINNED_KEY, moved_seeds, pinned_positions

if TYPE_CHECKING:
    from vllm_unmask.grammar.loading import CompiledSpec
    from vllm_unmask.grammar.spec import GrammarSpec
    from vllm_unmask.grammar.vocabulary import Vocabulary

# Options of `structured_outputs` that no grammar of ours looks at.
_NOT_HONOURED = {
    "disable_additional_properties": 'write "additionalProperties": false',
    "whitespace_pattern": "disable_any_whitespace allows none at all",
}


class _Admission:
    """Grammars of one engine's front end.

    Args:
        processor: vLLM's `InputProcessor`.
    """

    def __init__(self, processor: Any) -> None:
        from vllm_unmask.grammar.compilation import GrammarCompilers

        self.config = processor.structured_outputs_config
        self.max_model_len: int = processor.model_config.max_model_len
        self.vocabulary = _vocabulary(processor)
        self.compilers = GrammarCompilers(
            self.vocabulary, observe=_compile_seconds().observe
        )

    def spec(self, structured_outputs: Any) -> "GrammarSpec":
        """The grammar that a request asks for.

        Raises:
            GrammarError: it cannot be honoured.
        """
        from vllm_unmask.grammar.spec import FIELDS

        for name, instead in _NOT_HONOURED.items():
            if value := getattr(structured_outputs, name):
                _refuse(
                    f"structured_outputs.{name}={value!r} is not supported for "
                    f"block-diffusion models: {instead}",
                    f"structured_outputs.{name}",
                    value,
                )
        compact = (
            structured_outputs.disable_any_whitespace
            or self.config.disable_any_whitespace
        )
        field = next(f for f in FIELDS if getattr(structured_outputs, f) is not None)
        value = getattr(structured_outputs, field)
        if isinstance(value, dict):
            value = _as_text(value)
        return (_admit_once if isinstance(value, str) else _admit)(
            field, value, compact
        )

    def record(
        self, compiled: "CompiledSpec", params: Any, prompt_length: int
    ) -> dict[str, Any]:
        """What the sampler needs to know; checks that the shortest output fits.

        Args:
            compiled: the grammar.
            params: the request's own `SamplingParams`.
            prompt_length: tokens of its prompt.
        """
        budget = min(params.max_tokens, self.max_model_len - prompt_length)
        if (needed := len(compiled.closing)) > budget:
            parameter = compiled.spec.parameter
            _refuse(
                f"max_tokens={params.max_tokens} leaves {budget} tokens, but the "
                f"shortest output known for {parameter} has {needed}: expected room "
                f"for at least {needed}",
                "max_tokens",
                params.max_tokens,
            )
        known = list(self.vocabulary.stop_ids)
        return {
            "grammar": tuple(compiled.spec),
            "max_tokens": budget,
            "stop_ids": known + sorted(params.all_stop_token_ids - {*known}),
            "vocabulary_stop_ids": known,
        }


def _as_text(value: dict[str, Any]) -> Any:
    """As JSON, or as it is if it is none: `admit` then says why."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return value


def _admit(field: str, value: Any, compact: bool) -> "GrammarSpec":
    from vllm_unmask.grammar.spec import admit

    return admit(field, value, whitespace=0 if compact else 1)


# At most 256 KiB a grammar; most requests come with one that was there before.
_admit_once = functools.lru_cache(maxsize=128)(_admit)


@functools.cache
def _compile_seconds() -> Any:
    """The process's histogram; refused grammars count, cached ones do not."""
    from prometheus_client import Histogram

    return Histogram(
        "vllm:unmask_grammar_compile_seconds",
        "Time to compile one grammar.",
        buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
    )


# Front end -> its grammars. Made by the first request that has one.
_admissions: "weakref.WeakKeyDictionary[Any, _Admission]" = weakref.WeakKeyDictionary()


_making = threading.Lock()


def _admission(processor: Any) -> _Admission:
    with _making:
        return _admissions.get(processor) or _make_admission(processor)


def _make_admission(processor: Any) -> _Admission:
    if processor.tokenizer is None:
        _refuse(
            "structured_outputs needs the tokenizer, which skip_tokenizer_init leaves "
            "out",
            "structured_outputs",
            None,
        )
    admission = _admissions[processor] = _Admission(processor)
    weakref.finalize(processor, admission.compilers.close)
    return admission


def _vocabulary(processor: Any) -> "Vocabulary":
    from vllm_unmask.grammar.vocabulary import Vocabulary

    record = served_record(processor.model_config)
    assert record is not None
    also = processor.generation_config_fields.get("eos_token_id")
    also = [] if also is None else [also] if isinstance(also, int) else also
    # The tokenizer's own first: it is what fills a block after an output's end.
    stop_ids = dict.fromkeys([processor.renderer.get_eos_token_id(), *also])
    return Vocabulary.from_huggingface(
        processor.tokenizer,
        record["vocab_size"],
        record["mask_token_id"],
        [token for token in stop_ids if token is not None],
    )


def _asks_for_grammar(model_config: Any, params: Any) -> bool:
    return getattr(params, "structured_outputs", None) is not None and is_ours(
        model_config
    )


def _build_validate(original: Callable[..., None]) -> Callable[..., None]:
    def _validate_structured_outputs(
        self: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        # Ours are admitted where they are compiled, in `process_inputs`.
        if not is_ours(model_config):
            original(self, model_config, *args, **kwargs)

    return _validate_structured_outputs


def _build_process(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        extra_args = moved_seeds(getattr(params, "extra_args", None))
        if extra_args and is_ours(self.model_config):
            params = copy.copy(params)
            params.extra_args = extra_args
        if not _asks_for_grammar(self.model_config, params):
            return original(self, request_id, prompt, params, *args, **kwargs)
        if (pinned := pinned_positions(params.extra_args)) is not None:
            _refuse(
                f"{PINNED_KEY}={pinned!r} with a structured output, whose grammar "
                "decides every token: expected seeds that are not pinned",
                PINNED_KEY,
                pinned,
            )
        admission = _admission(self)
        with _refusals():
            # Behind AsyncLLM this finds what `add_request` has waited for.
            spec = admission.spec(params.structured_outputs)
            compiled = admission.compilers.submit(spec).result()
        ignores_stops = params.ignore_eos
        # Shallow: vLLM makes a deep copy of its own.
        params = copy.copy(params)
        params.structured_outputs = None
        # With ignore_eos an output goes on as long as its grammar allows. The stop
        # token that then ends it is one to vLLM.
        params.ignore_eos = False
        request = original(self, request_id, prompt, params, *args, **kwargs)
        own = request.sampling_params
        _require_rows(self.model_config, own)
        record = admission.record(compiled, own, len(request.prompt_token_ids or ()))
        if ignores_stops:
            record["stop_ids"] = []
        own.extra_args = {**(own.extra_args or {}), GRAMMAR_KEY: record}
        return request

    return process_inputs


def _require_rows(model_config: Any, params: Any) -> None:
    """Refuse log-probabilities of tokens that a grammar writes without their rows."""
    record = served_record(model_config)
    if record is None or params.logprobs is None:
        return
    defaults = server_options_from_dict(record["server"]).decoding
    length = record["block_length"]
    if parse_request_options(params.extra_args, defaults, length).cache == "sub_block":
        _refuse(
            f"logprobs={params.logprobs} is not possible with a structured output and "
            "cache=sub_block, where a grammar may complete a block without its "
            "logits: expected no logprobs, or unmask_cache=none",
            "logprobs",
            params.logprobs,
        )


def _build_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if _asks_for_grammar(self.model_config, params):
            processor = self.input_processor
            admission = _admissions.get(processor)
            if admission is None:
                admission = await asyncio.to_thread(_admission, processor)
            with _refusals():
                spec = admission.spec(params.structured_outputs)
                await asyncio.wrap_future(admission.compilers.submit(spec))
        return await original(self, request_id, prompt, params, *args, **kwargs)

    return add_request


class _refusals:
    """Turns a `GrammarError` into vLLM's 400."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        from vllm_unmask.grammar.spec import GrammarError

        if isinstance(error, GrammarError):
            _refuse(str(error), error.parameter, error.value)


def _refuse(message: str, parameter: str, value: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    raise VLLMValidationError(message, parameter=parameter, value=value)


_VALIDATE = "vllm.sampling_params:SamplingParams._validate_structured_outputs"
_PROCESS = "vllm.v1.engine.input_processor:InputProcessor.process_inputs"
_ADD_REQUEST = "vllm.v1.engine.async_llm:AsyncLLM.add_request"

PATCH = Patch(
    name="structured_outputs",
    when="served",
    what="admits response_format, structured_outputs and tool choices for our models, "
    "compiles their grammars, and hands them to our sampler; takes seeds of any length "
    "past vLLM's check",
    why="vLLM refuses every structured output of a diffusion model, and its own path "
    "constrains tokens from left to right; it allows a seed of exactly one canvas",
    removal="vLLM has a hook for constraints that a model enforces by itself",
    replacements=(
        Replacement(_VALIDATE, _build_validate),
        Replacement(_PROCESS, _build_process),
        Replacement(_ADD_REQUEST, _build_add_request),
    ),
    guards=(
        Guard(
            _VALIDATE,
            dict.fromkeys(
                ("0.32", "0.33"),
                "ebca6891dea0cd50675ffa3ca809c213ed2893dcf960591fe80ab0b20e52ff29",
            ),
        ),
        Guard(
            _PROCESS,
            dict.fromkeys(
                ("0.32", "0.33"),
                "e22b5f772979054c158de62fa720f7a03db03382a91902852c9148d0144cd27b",
            ),
        ),
        Guard(
            _ADD_REQUEST,
            dict.fromkeys(
                ("0.32", "0.33"),
                "ec36c4501b3260fec1a34cd7c0ec05713024ff87dd85c19c89eb4027b4bf21bf",
            ),
        ),
    ),
)
