# SPDX-License-Identifier: Apache-2.0
"""vLLM's configuration for a diffusion model."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from vllm.config import VllmConfig
from vllm.config.diffusion import DiffusionConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import CpuArchEnum, current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_unmask.families import ON_SERVED, family_of
from vllm_unmask.families.cpu_config import set_executor
from vllm_unmask.families.full_config import prepare_full_attention
from vllm_unmask.families.streaming_config import prepare_streaming
from vllm_unmask.limits import refused
from vllm_unmask.options import (
    ServerOptions,
    parse_server_options,
    require_steps_fit,
    server_options_to_dict,
)
from vllm_unmask.requirements import (
    require_answer_fit,
    require_attention_fit,
    require_candidates_fit,
    require_filter,
    require_parts_scheduled,
    require_throttle_fit,
)

logger = init_logger("vllm.vllm_unmask.families.config_hook")

MAX_BLOCK_LENGTH = 256
# Rows of a request that a forward checks when it speculates, unless told otherwise.
CANDIDATE_ROWS = 128
SCHEDULER = "vllm_unmask.engine.schedulers.create_scheduler"


class BlockDiffusionConfigHook(VerifyAndUpdateConfig):
    """Registered in vLLM's ``MODELS_CONFIG_MAP`` for every family.

    Runs once per ``VllmConfig``, before the platform's own checks. Raises
    ``ValueError`` for what cannot be served, with the option to change.
    """

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        options = parse_server_options(vllm_config.additional_config)
        attention = family_of(vllm_config.model_config.architecture).attention
        require_attention_fit(options.decoding, attention)
        if attention == "full":
            options = prepare_full_attention(vllm_config, options)
        elif attention == "causal":
            options = prepare_streaming(vllm_config, options)
        synchronous = _is_synchronous(vllm_config, options)
        require_parts_scheduled(options.decoding, options.layout, synchronous)
        block_length = _block_length(vllm_config, options)
        max_candidates = _max_candidates(vllm_config, options, block_length)
        options = replace(options, max_candidates=max_candidates)
        mask_token_id = _mask_token_id(vllm_config, options)
        _refuse_unsupported(vllm_config)
        if options.causal_kv:
            _set_backend_for_both_masks(vllm_config)
        require_steps_fit(options.decoding, block_length)
        hf_config = vllm_config.model_config.hf_config
        shifted = getattr(hf_config, "shifted", False)
        # Windows in which a draft is verified: the block as drafted, and, where its
        # rows do not score what comes after them, masks.
        to_verify = 1 if shifted else 2
        require_candidates_fit(max_candidates, to_verify, options.decoding)
        if options.adaptive_verification:
            require_throttle_fit(max_candidates, to_verify, attention, synchronous)
        hf_config.canvas_length = block_length
        # The HF config object reaches the front-end validator, the scheduler and
        # the worker; plain JSON keeps it printable and hashable for vLLM.
        hf_config.unmask_served = {
            "server": server_options_to_dict(options),
            "attention": attention,
            "synchronous": synchronous,
            "block_length": block_length,
            "mask_token_id": mask_token_id,
            "vocab_size": vllm_config.model_config.get_vocab_size(),
            "tokenizer": not vllm_config.model_config.skip_tokenizer_init,
            "shifted": shifted,
            "first_alone": getattr(hf_config, "first_alone", False),
            "verify_windows": to_verify,
            "counters": _kept(vllm_config, "counters", _new_counters),
            "traces": _kept(vllm_config, "traces", _new_traces),
            "filter": _filter(vllm_config, options, block_length),
        }
        require_answer_fit(options.decoding, hf_config.unmask_served)
        # Draft tokens of a step: at most the block and the next one, and candidates.
        blocks = 1 + (options.max_candidates or 1)
        vllm_config.diffusion_config = DiffusionConfig(
            canvas_length=blocks * block_length
        )
        rows = 2 * block_length
        if attention == "full":
            rows = vllm_config.model_config.max_model_len
        elif attention == "block_causal":
            _set_page_size(vllm_config, block_length)
        _set_scheduler(vllm_config, rows)
        set_executor(vllm_config)
        vllm_config.attention_config.use_non_causal = attention != "causal"
        for prepare in ON_SERVED:
            prepare()


def _kept(
    vllm_config: VllmConfig, name: str, create: Callable[[VllmConfig], str]
) -> str:
    """A path of the front end's own, also in a config that is made from its config."""
    served = getattr(vllm_config.model_config.hf_config, "unmask_served", None)
    return create(vllm_config) if served is None else served[name]


def _new_counters(vllm_config: VllmConfig) -> str:
    from vllm_unmask.engine.metrics import create_counters

    return create_counters(vllm_config.parallel_config.data_parallel_size)


def _new_traces(vllm_config: VllmConfig) -> str:
    from vllm_unmask.engine.tracing import create_traces

    return create_traces()


def _filter(
    vllm_config: VllmConfig, options: ServerOptions, block_length: int
) -> str | None:
    from vllm_unmask.engine.strategy_data import find_filter

    path = find_filter(options.filter, vllm_config.model_config.model, block_length)
    require_filter(options.decoding, path)
    return path


def _is_synchronous(vllm_config: VllmConfig, options: ServerOptions) -> bool:
    """Whether no step is planned before the one before it is done.

    vLLM decides later, where the user has not, and on the CPU in any case.
    """
    scheduler = vllm_config.scheduler_config
    reason = None
    if options.decoding.cache == "sub_block":
        reason = "sub-blocks are forwarded alone"
    elif options.adaptive_verification:
        reason = "drafts are verified while that pays"
    if scheduler.async_scheduling is None and reason:
        logger.info("Scheduling is synchronous: %s.", reason)
        scheduler.async_scheduling = False
    return scheduler.async_scheduling is False or current_platform.is_cpu()


def _max_candidates(
    vllm_config: VllmConfig, options: ServerOptions, block_length: int
) -> int:
    """How far a request may speculate: not at all where the cache cannot be read."""
    reason = None
    if vllm_config.cache_config.cache_dtype.startswith("fp8"):
        reason = "the KV cache is fp8"
    elif current_platform.is_cpu():
        x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
        narrow = vllm_config.model_config.dtype == torch.bfloat16
        if not x86 or (narrow and torch.cpu._is_amx_tile_supported()):
            reason = "vLLM keeps the KV cache in a layout of this CPU's own"
    elif (backend := vllm_config.attention_config.backend) not in (
        None,
        AttentionBackendEnum.FLASH_ATTN,
        AttentionBackendEnum.TRITON_ATTN,
    ):
        reason = f"the attention backend is {backend.name}"
    if reason is None:
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        # Beside a canvas of two blocks, of which one is a candidate itself. A request
        # that verifies is not scheduled with less room than it needs.
        room = budget // block_length - 1
        usual = min(max(CANDIDATE_ROWS // block_length, 3), 16, room)
        if (most := options.max_candidates or usual) > room:
            expected = f"at most {room}, which --max-num-batched-tokens {budget} holds"
            raise refused("max_candidates", most, expected)
        return most
    if (options.max_candidates or 1) > 1:
        raise refused("max_candidates", options.max_candidates, "1", f"and {reason}")
    logger.info("No request speculates, because %s.", reason)
    return 1


def _block_length(vllm_config: VllmConfig, options: ServerOptions) -> int:
    hf_config = vllm_config.model_config.hf_config
    length = options.block_length
    if length is None:
        length = hf_config.block_size
    user = vllm_config.diffusion_config
    if user is not None and user.canvas_length not in (None, length):
        raise ValueError(
            f"--diffusion-config canvas_length={user.canvas_length} differs from the "
            f"block length {length} of this model; set the block length with "
            '--additional-config \'{"unmask": {"block_length": ...}}\' instead'
        )
    if user is not None and user.max_denoising_steps is not None:
        raise ValueError(
            f"--diffusion-config max_denoising_steps={user.max_denoising_steps} is "
            "not used by this model; set steps with "
            '--additional-config \'{"unmask": {"steps": ...}}\' instead'
        )
    valid = isinstance(length, int) and not isinstance(length, bool)
    if not valid or not 1 <= length <= MAX_BLOCK_LENGTH:
        raise refused(
            "block_length", length, f"an integer from 1 to {MAX_BLOCK_LENGTH}"
        )
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    limit = min(budget // 2, vllm_config.model_config.max_model_len)
    if length > limit:
        raise refused(
            "block_length",
            length,
            f"at most {limit}: half of --max-num-batched-tokens and no more than "
            "--max-model-len",
        )
    return length


def _mask_token_id(vllm_config: VllmConfig, options: ServerOptions) -> int:
    vocab_size = vllm_config.model_config.get_vocab_size()
    mask_id = options.mask_token_id
    if mask_id is None:
        mask_id = getattr(vllm_config.model_config.hf_config, "mask_token_id", None)
    if mask_id is None or not 0 <= mask_id < vocab_size:
        raise refused(
            "mask_token_id",
            mask_id,
            f"an id from 0 to {vocab_size - 1}; this checkpoint does not name a "
            "usable one: set it with --additional-config "
            '\'{"unmask": {"mask_token_id": ...}}\'',
        )
    return mask_id


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    flags = {
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--enable-dbo": parallel.enable_dbo,
        "--enable-batch-sharded-sampling": parallel.enable_batch_sharded_sampling,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--logits-processors": bool(model.logits_processors),
        "--logprobs-mode": model.logprobs_mode.startswith("processed"),
        "--no-enable-chunked-prefill": (
            not vllm_config.scheduler_config.enable_chunked_prefill
        ),
    }
    backend = vllm_config.attention_config.backend
    if backend in (
        AttentionBackendEnum.FLASHINFER,
        AttentionBackendEnum.FLEX_ATTENTION,
    ):
        # Their metadata buffers hold --max-num-seqs rows; a block-causal batch has
        # a row for every block.
        flags[f"--attention-backend {backend.name}"] = True
    # Grammars are XGrammar's: another backend would read another dialect.
    grammar_backend = vllm_config.structured_outputs_config.backend
    if grammar_backend not in ("auto", "xgrammar"):
        flags[f"--structured-outputs-config.backend {grammar_backend}"] = True
    for flag, given in flags.items():
        if given:
            raise ValueError(
                f"{flag} is not supported for block-diffusion models "
                f"({model.architecture}); remove it"
            )


def _set_backend_for_both_masks(vllm_config: VllmConfig) -> None:
    """Choose a backend that takes causal and bidirectional rows in one batch."""
    attention = vllm_config.attention_config
    if current_platform.is_cpu():
        return
    if attention.backend not in (None, AttentionBackendEnum.TRITON_ATTN):
        raise ValueError(
            f"causal_kv needs --attention-backend TRITON_ATTN, not "
            f"{attention.backend.name}: rows of a batch differ in what they see"
        )
    attention.backend = AttentionBackendEnum.TRITON_ATTN


def _set_page_size(vllm_config: VllmConfig, block_length: int) -> None:
    """Make a KV page hold whole blocks.

    A page then never ends inside a block, so the prefix cache never holds KV
    that a later token could change.
    """
    cache = vllm_config.cache_config
    if cache.user_specified_block_size:
        if cache.block_size % block_length:
            raise ValueError(
                f"--block-size {cache.block_size} must be a multiple of the "
                f"diffusion block length {block_length}"
            )
        return
    default = 128 if current_platform.is_cpu() else 16
    if default % block_length:
        # Backends want multiples of 32 on CPU and of 16 elsewhere.
        step = 32 if current_platform.is_cpu() else 16
        cache.block_size = math.lcm(block_length, step)
        cache.user_specified_block_size = True


def _set_scheduler(vllm_config: VllmConfig, rows: int) -> None:
    """Choose our scheduler; `rows` are those of a request in a step, at most."""
    scheduler = vllm_config.scheduler_config
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        raise ValueError(
            f"--scheduler-cls {scheduler.scheduler_cls} cannot be combined with a "
            "block-diffusion model, which needs its own scheduler; remove it"
        )
    scheduler.scheduler_cls = SCHEDULER
    if scheduler.max_num_batched_tokens < scheduler.max_num_seqs * rows:
        logger.info(
            "%d running requests may need %d tokens a step, more than "
            "--max-num-batched-tokens %d: some will wait for a later step.",
            scheduler.max_num_seqs,
            scheduler.max_num_seqs * rows,
            scheduler.max_num_batched_tokens,
        )
