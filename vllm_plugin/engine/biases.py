# SPDX-License-Identifier: Apache-2.0
"""What changes the logits before anything is scored."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_unmask.engine.bad_words import BadWords
from vllm_unmask.engine.grammar_step import GrammarStep
from vllm_unmask.engine.states import CanvasStates
from vllm_unmask.kernels.row_statistics import (
    NO_CONSTRAINTS,
    Constraints,
    has_kernel,
)

if TYPE_CHECKING:
    from vllm_unmask.engine.rows import DenoisingRows


def changes_logits(params: SamplingParams) -> bool:
    """Whether logits are changed, or reported, before they are scored."""
    return bool(
        params.logit_bias
        or params.bad_words
        or params.allowed_token_ids
        or params.min_tokens
        or params.logprobs is not None
    )


class Biases:
    """Logit biases, allowed tokens, min_tokens and bad words of the request slots.

    Args:
        base: vLLM's sampler, which keeps all but the last.
        states: canvases of the slots.
    """

    def __init__(self, base: Sampler, states: CanvasStates) -> None:
        self.geometry = states.geometry
        self.logit_bias: Any = next(
            processor
            for processor in base.logits_processors
            if isinstance(processor, LogitBiasState)
        )
        self.bad_words = BadWords(states, base.req_states)

    def add_request(self, slot: int, params: SamplingParams) -> None:
        """Take over a slot."""
        self.logit_bias.add_request(slot, params)
        self.bad_words.add_request(slot, params.bad_words_token_ids)

    def apply(
        self,
        logits: torch.Tensor,
        rows: "DenoisingRows",
        active: torch.Tensor,
        worded: bool,
        grammar: GrammarStep | None,
        fused: bool,
        wide: bool = True,
    ) -> tuple[torch.Tensor, Constraints]:
        """Logits after all biases and the grammar; a float32 copy if they change.

        A grammar alone changes none where they are only scored: what it bans is
        returned beside them, for the kernel that reads them.

        Args:
            logits: [requests * block, vocab].
            rows: the requests.
            active: int64 [requests, block], what their blocks hold.
            worded: whether any of them has bad words.
            grammar: of the step.
            fused: whether something else is going to change the logits.
            wide: whether they must be float32 in any case.
        """
        biased = self.logit_bias.use_logit_bias[rows.slots_np].any()
        if not biased and not worded and grammar is None and not fused:
            # What only scores them reads every type.
            return logits.float() if wide else logits, NO_CONSTRAINTS
        alone = not (biased or worded or fused or wide)
        if grammar is not None and alone and has_kernel(logits.device):
            return logits, grammar.constraints(logits, len(active), rows.read)
        # A copy: log-probabilities are reported from the model's own logits.
        logits = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
        if biased:
            length = self.geometry.block_length
            slots = rows.slots.repeat_interleave(length)
            context = LogitsContext(
                expanded_idx_mapping=slots,
                idx_mapping=rows.slots,
                idx_mapping_np=rows.slots_np,
                expanded_local_pos=torch.zeros_like(slots, dtype=torch.int32),
                input_ids=active.reshape(-1),
                # vLLM's row i scores token i + 1, ours scores token i.
                pos=rows.positions(length).view(-1) - 1,
                seq_lens_upper_bound_np=np.zeros(0, dtype=np.int32),
            )
            logits = self.logit_bias.apply(logits, context)
        if worded:
            self.bad_words.ban(logits, active, rows)
        if grammar is not None:
            grammar.constrain(logits)
        return logits, NO_CONSTRAINTS
