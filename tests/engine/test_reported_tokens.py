# SPDX-License-Identifier: Apache-2.0
"""Blocks that end no request are taken as a whole, with vLLM's result."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_unmask.engine.scheduler import BlockDiffusionScheduler

MASK, EOS = 9, 0


def request(params: SamplingParams, num_prompt: int, output: list[int]) -> Request:
    made = Request("r", [1] * num_prompt, params, None)
    made.append_output_token_ids(output)
    return made


def scheduler(max_model_len: int, asynchronous: bool) -> Any:
    return SimpleNamespace(
        max_model_len=max_model_len, mask_token_id=MASK, asynchronous=asynchronous
    )


TOKENS = st.lists(st.integers(0, 5), max_size=6)


@settings(max_examples=1000)
@given(
    tokens=TOKENS,
    before=TOKENS,
    num_prompt=st.integers(1, 4),
    max_tokens=st.integers(7, 14),
    max_model_len=st.integers(11, 18),
    eos=st.booleans(),
    stops=st.lists(st.integers(0, 5), max_size=2),
    min_tokens=st.integers(0, 3),
    repetition=st.booleans(),
)
def test_as_token_by_token(
    tokens: list[int],
    before: list[int],
    num_prompt: int,
    max_tokens: int,
    max_model_len: int,
    eos: bool,
    stops: list[int],
    min_tokens: int,
    repetition: bool,
) -> None:
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=stops, min_tokens=min_tokens
    )
    if eos:
        params.update_from_generation_config({}, EOS)
    if repetition:
        params.repetition_detection = RepetitionDetectionParams(
            max_pattern_size=2, min_count=2
        )
    expected, ours = (request(params, num_prompt, before) for _ in range(2))
    plan = scheduler(max_model_len, False)
    by_token = Scheduler._update_request_with_output(plan, expected, tokens[:])
    goes_on = BlockDiffusionScheduler._goes_on(plan, ours, tokens)
    assert not (goes_on and by_token[1])
    if goes_on:
        ours.append_output_token_ids(tokens)
        assert by_token == (tokens, False)
        assert list(ours.all_token_ids) == list(expected.all_token_ids)
        assert ours.status == expected.status
    elif not repetition:
        # It is asked for nothing where it could have known.
        assert by_token[1]
        assert RequestStatus.is_finished(expected.status)
