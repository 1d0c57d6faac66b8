# SPDX-License-Identifier: Apache-2.0
"""Grammar state of the request slots that have one."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_unmask.engine.metrics import Counters
from vllm_unmask.engine.states import BlockGeometry
from vllm_unmask.grammar.loading import GrammarLoader, LoadedGrammar
from vllm_unmask.grammar.spec import GrammarSpec
from vllm_unmask.grammar.state import GrammarState
from vllm_unmask.grammar.vocabulary import Vocabulary

logger = init_logger("vllm.vllm_unmask.engine.grammar")

# Grammars that are compiled at a time, so that a slow one keeps back no other.
NUM_COMPILERS = 4


class GrammarRequest:
    """A request with a grammar, and where its open block stands in its output."""

    def __init__(
        self,
        req_id: str,
        loading: "Future[LoadedGrammar]",
        record: Mapping[str, Any],
        num_fixed: int,
        output_ids: list[int],
    ) -> None:
        self.req_id = req_id
        self.loading = loading
        self.record = record
        self.output_ids = output_ids
        self.state: GrammarState | None = None
        # Columns of the open block that are prompt or, after a preemption, output
        # that was reported before; output index of the column after them.
        self.num_fixed = num_fixed
        self.first = len(output_ids)
        # Whether the frontier was left to the next step, before a preemption.
        self.stalled = False
        self.failed = False
        self.num_forced = 0  # columns that the guard wrote in the last step
        self.closed = False  # by the guard, and counted
        self.nanoseconds = 0  # grammar work of this step so far

    @property
    def frontier(self) -> int:
        """Column of the open block that is verified next, 0 after the output's end."""
        assert self.state is not None
        return max(self.num_fixed + self.state.num_verified - self.first, 0)


class Grammars:
    """Grammar state of every request slot that has one.

    A grammar is compiled in a thread when its first request arrives; until it is
    there its requests sit out their denoising steps, and nobody else waits.

    Args:
        vllm_config: of the worker.
        geometry: the model's blocks.
    """

    def __init__(self, vllm_config: VllmConfig, geometry: BlockGeometry) -> None:
        self.geometry = geometry
        self.model_config = vllm_config.model_config
        served = self.model_config.hf_config.unmask_served
        self.vocab_size: int = served["vocab_size"]
        self.guard: bool = served["server"]["grammar_guard"]
        # Whether a block is reported as far as it has no mask, and moves on.
        self.streaming: bool = served["attention"] == "causal"
        # Ranks must agree on who takes part in a step.
        self.wait = vllm_config.parallel_config.world_size > 1
        self._loading = threading.Lock()
        parallel = vllm_config.parallel_config
        # All ranks of an engine take the same steps: the first one counts.
        row = parallel.data_parallel_rank if parallel.rank == 0 else None
        self.counters = Counters(served["counters"], row)
        self.requests: dict[int, GrammarRequest] = {}
        self.vocabulary: Vocabulary | None = None
        self._silent_ids: torch.Tensor | None = None
        self._silent_mask: np.ndarray[Any, Any] | None = None
        self._loader: GrammarLoader | None = None
        self._threads = ThreadPoolExecutor(NUM_COMPILERS, "unmask-grammar")

    def add_request(
        self,
        slot: int,
        req_id: str,
        record: Mapping[str, Any] | None,
        output_ids: list[int],
        num_fixed: int,
    ) -> None:
        """Take over a slot.

        Args:
            slot: the request slot.
            req_id: vLLM's name of the request.
            record: what the front end admitted, None without a grammar.
            output_ids: after a preemption the output so far.
            num_fixed: known tokens that the open block begins with.
        """
        self.requests.pop(slot, None)
        if record is None:
            return
        spec = GrammarSpec(*record["grammar"])
        loading = None if self._loader is None else self._loader.find(spec)
        if loading is None:
            loading = self._threads.submit(self._load, record)
        if self.wait:
            loading.exception()
        self.requests[slot] = GrammarRequest(
            req_id, loading, record, num_fixed, output_ids
        )

    def remove_request(self, req_id: str) -> None:
        """Forget a request, so that steps without grammars are what they were."""
        for slot, request in self.requests.items():
            if request.req_id == req_id:
                del self.requests[slot]
                return

    def _load(self, record: Mapping[str, Any]) -> LoadedGrammar:
        with self._loading:
            if self._loader is None:
                self.vocabulary = Vocabulary.from_huggingface(
                    cached_tokenizer_from_config(self.model_config),
                    self.vocab_size,
                    self.geometry.mask_token_id,
                    record["vocabulary_stop_ids"],
                )
                self._loader = GrammarLoader(self.vocabulary)
        return self._loader.load(GrammarSpec(*record["grammar"]))

    def members(self, slots: np.ndarray[Any, Any]) -> list[tuple[int, GrammarRequest]]:
        """Rows of those of ``slots`` that have a grammar, and their requests.

        Args:
            slots: int64 [requests] -> request slot, the denoising requests.
        """
        if not self.requests:
            return []
        members = [
            (row, self.requests[slot])
            for row, slot in enumerate(slots.tolist())
            if slot in self.requests
        ]
        for _, request in members:
            if request.state is None and not request.failed:
                self._start(request)
        return members

    def silent_ids(self, device: torch.device) -> torch.Tensor:
        """int64: tokens without text, legal at no place but a frontier."""
        if self._silent_ids is None:
            assert self.vocabulary is not None
            vocabulary = self.vocabulary
            silent = [vocabulary.mask_id, *vocabulary.special_ids, *vocabulary.stop_ids]
            self._silent_ids = torch.tensor(sorted(set(silent)), device=device)
        return self._silent_ids

    def silent_mask(self, words: int) -> np.ndarray[Any, Any]:
        """All tokens but the silent ones, int32 [words] as a grammar's bitmask."""
        if self._silent_mask is None or len(self._silent_mask) != words:
            bits = np.ones(32 * words, np.uint8)
            bits[self.silent_ids(torch.device("cpu")).numpy()] = 0
            self._silent_mask = np.packbits(bits, bitorder="little").view(np.int32)
        return self._silent_mask

    def silence(self, logits: torch.Tensor, slots: np.ndarray[Any, Any]) -> None:
        """Ban, in place, what is legal at a frontier alone.

        Args:
            logits: float32 [requests * block, vocab], blocks without a frontier.
            slots: int64 [requests] -> request slot.
        """
        rows = [row for row, slot in enumerate(slots.tolist()) if slot in self.requests]
        if rows and self.vocabulary is not None:
            blocks = logits.view(len(slots), -1, logits.shape[1])
            index = torch.tensor(rows, device=logits.device).unsqueeze(1)
            blocks[index, :, self.silent_ids(logits.device)] = -torch.inf

    def _start(self, request: GrammarRequest) -> None:
        if not request.loading.done():
            return
        try:
            grammar = request.loading.result()
            request.state = GrammarState(
                grammar.compiled,
                grammar.vocabulary,
                grammar.closer if self.guard else None,
                max_tokens=request.record["max_tokens"],
                stop_ids=request.record["stop_ids"],
                verified=request.output_ids,
            )
            request.state.stalled = request.stalled
        except Exception:
            self.fail(request)

    def fail(self, request: GrammarRequest) -> None:
        """Log the exception that ends a request; what it has reported was verified."""
        logger.exception("A grammar failed; its request ends.")
        request.failed, request.state = True, None
        self.counters.add("grammar_failures", 1)
