# SPDX-License-Identifier: Apache-2.0
"""Scheduling where every position of a model sees every other one.

Blocks lie on a grid from the end of the prompt. A request's *canvas* ends where its
tokens may end, or `window` positions behind the start of the open block if that is
less. A *full* step forwards all of it, ``[prompt and output | open block | masks]``
from position 0 on. The first step of a block is one. The cache policy says what the
steps after it forward, while they read the rest from the cache (Fast-dLLM):

* ``none``: everything again, which is exact;
* ``prefix``: from the open block to the end of the canvas;
* ``dual``: the open block.

``refresh`` makes every so manyth step of a block a full one. A step is scheduled whole
or not at all, and with nothing in flight.
"""

from typing import Any, NamedTuple, cast

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_unmask.engine.scheduler import BlockDiffusionScheduler
from vllm_unmask.engine.throttle import Asked
from vllm_unmask.options import DecodingOptions

# More steps than a block has.
NEVER = 1 << 30


def refresh_period(options: DecodingOptions) -> int:
    """Steps of a block from one full step to the next."""
    if options.value("cache") == "none":
        return 1
    return options.value("refresh") or NEVER


class CanvasPlan(NamedTuple):
    """What the steps of one request forward."""

    period: int  # see `refresh_period`
    dual: bool
    window: int  # positions from the open block on, 0 for all of them
    block_length: int
    end: int  # position behind the last that the request may fill

    @property
    def reach(self) -> int:
        """The window in whole blocks."""
        return -(-self.window // self.block_length) * self.block_length

    @property
    def settled(self) -> int:
        """Start of an open block from which on all canvases end at `end`."""
        return self.end - self.reach if self.reach else 0

    def repeats(self, num_steps: int) -> bool:
        """Whether the next step of a block forwards the positions that this one does.

        Args:
            num_steps: that the block has had.
        """
        kinds = [(num_steps + ahead) % self.period == 0 for ahead in (0, 1)]
        return self.period == 1 or not any(kinds)

    def query(self, start: int, num_steps: int) -> tuple[int, int]:
        """First position of a step's query, and the one behind its last.

        Args:
            start: of the open block.
            num_steps: that the block has had.
        """
        length, reach = self.block_length, self.reach
        end = min(start + reach, self.end) if reach else self.end
        if num_steps % self.period == 0:
            return 0, end
        return start, min(start + length, end) if self.dual else end


def plan_canvas(
    options: DecodingOptions,
    num_prompt: int,
    max_tokens: int,
    block_length: int,
    max_model_len: int,
) -> CanvasPlan:
    """The plan of a request.

    Args:
        options: its.
        num_prompt: tokens of its prompt.
        max_tokens: that it may have behind them.
        block_length: positions of a block.
        max_model_len: of the model.
    """
    blocks = -(-max_tokens // block_length)
    return CanvasPlan(
        refresh_period(options),
        options.value("cache") == "dual",
        options.value("window"),
        block_length,
        min(num_prompt + blocks * block_length, max_model_len),
    )


class FullAttentionScheduler(BlockDiffusionScheduler):
    """Synchronous scheduling of whole canvases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, CanvasPlan] = {}
        # Request id -> steps that its open block has had.
        self.num_steps: dict[str, int] = {}
        self.room = 0  # rows that this step can still take
        # Request id -> candidates that the worker has for its next step.
        self.candidates: dict[str, int] = {}
        # Requests of a step whose candidates are asked for.
        self.asking: set[str] = set()

    def _admit(self, request: Request, options: DecodingOptions) -> None:
        super()._admit(request, options)
        self.plans[request.request_id] = plan_canvas(
            options,
            request.num_prompt_tokens,
            request.max_tokens,
            self.block_length,
            self.max_model_len,
        )
        self.num_steps[request.request_id] = 0

    def _query(self, request: Request) -> tuple[int, int]:
        # Reported tokens are whole blocks, so the known ones end where a block starts.
        req_id = request.request_id
        return self.plans[req_id].query(request.num_tokens, self.num_steps[req_id])

    def _drafts(self, request: Request) -> list[int]:
        """The open block alone: vLLM keeps room for a block's drafts, not a canvas'."""
        _, end = self._query(request)
        return [-1] * min(self.block_length, end - request.num_tokens)

    def _plan_canvas(self, request: Request) -> None:
        request.num_computed_tokens, _ = self._query(request)
        request.spec_token_ids = self._drafts(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.room = self.max_num_scheduled_tokens
        return super().schedule(throttle_prefills)

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        """Rows of the whole query; 0 leaves the request for a later step.

        Mostly more than vLLM asks for: it knows nothing of the masks behind the block.
        """
        start, end = self._query(request)
        if end - start > self.room:
            return 0
        self.room -= end - start
        return end - start

    def _open_first_blocks(self, scheduler_output: SchedulerOutput) -> None:
        """Every request has its canvas from its first step on."""
        drafts = scheduler_output.scheduled_spec_decode_tokens
        for req_id in scheduler_output.num_scheduled_tokens.keys() - drafts.keys():
            drafts[req_id] = self._drafts(self.requests[req_id])
        self._add_windows(scheduler_output)

    def _add_windows(self, scheduler_output: SchedulerOutput) -> None:
        """Append candidates to the queries of requests that speculate.

        In rows that are left when everybody has theirs, and as far as the context goes,
        which is what vLLM has room for in its tables. Each is as long as the query. A
        draft token more for each tells the worker how many there are.
        """
        num_scheduled = scheduler_output.num_scheduled_tokens
        self.asking = {r for r in num_scheduled if self.windows.optional(r)}
        # By this the worker knows that it has to make and report candidates.
        if self.asking:
            flag = scheduler_output.has_structured_output_requests | Asked.REPORT
            scheduler_output.has_structured_output_requests = cast(bool, flag)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        room = (
            self.max_num_scheduled_tokens - scheduler_output.total_num_scheduled_tokens
        )
        wanted = {}
        for req_id in self.candidates.keys() & self.asking:
            rows = num_scheduled[req_id]
            start = self.requests[req_id].num_computed_tokens
            whole = len(drafts[req_id]) == self.block_length
            if whole and self.plans[req_id].repeats(self.num_steps[req_id]):
                most = (self.max_model_len - start) // rows - 1
                asked = min(self.windows.optional(req_id), self.candidates[req_id])
                wanted[req_id] = (rows, min(most, asked))
        # In turns, so that nobody takes all of the room.
        for turn in range(max((most for _, most in wanted.values()), default=0)):
            for req_id, (rows, most) in sorted(wanted.items()):
                if turn < most and rows <= room:
                    room -= rows
                    num_scheduled[req_id] += rows
                    scheduler_output.total_num_scheduled_tokens += rows
                    drafts[req_id].append(-1)

    def _is_usual(self, output: SchedulerOutput) -> bool:
        """Whether a step is what most are: none that its cache policy makes longer."""
        return all(
            self.plans[r].period == 1 or self.num_steps[r] % self.plans[r].period
            for r in output.num_scheduled_tokens
        )

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take over how many steps a forward has carried out, and what was guessed."""
        reports = zip(
            draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True
        )
        for req_id, (num_steps, num_candidates, *_) in reports:
            if req_id in self.asking and req_id in self.num_steps:
                self.num_steps[req_id] = num_steps
                self.candidates[req_id] = num_candidates

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> Any:
        sampled = model_runner_output.sampled_token_ids
        for req_id in scheduler_output.num_scheduled_tokens.keys() & self.num_steps:
            row = model_runner_output.req_id_to_index[req_id]
            reported = bool(sampled and sampled[row])
            self.num_steps[req_id] = 0 if reported else self.num_steps[req_id] + 1
            # Guesses are about the block as it was.
            self.candidates.pop(req_id, None)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        # vLLM also counts by position, as many as it thinks a request can have.
        rows = self.num_forwarded[request_id]
        self.num_forwarded[request_id] = counted = min(rows, self.num_spec_tokens)
        stats = super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )
        if stats is not None:
            stats.num_draft_tokens += rows - counted
        return stats

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.num_steps[request.request_id] = 0
        self.candidates.pop(request.request_id, None)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.plans.pop(request.request_id, None)
        self.num_steps.pop(request.request_id, None)
        self.candidates.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)
