# SPDX-License-Identifier: Apache-2.0
"""Vocabularies, stand-ins for a diffusion language model, and the engine's loop.

`decode` does with a `GrammarState` what the engine does with it, on the host:
frontier mask, static mask, acceptance by threshold, step, next block. It checks the
promises of `GrammarState.step` on the way, against a matcher of its own.
"""

import base64
import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xgrammar

from vllm_unmask.grammar.state import GrammarState, Status, StepResult
from vllm_unmask.grammar.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[1]
NUM_CANDIDATES = 8


@cache
def byte_vocabulary() -> Vocabulary:
    """Ids 0 (mask), 1 (stop), 2 (special), then the 256 bytes."""
    tokens = [b"", b"", b"", *(bytes([byte]) for byte in range(256))]
    return Vocabulary.from_tokens(tokens, 0, [1])


@cache
def demo_vocabulary() -> Vocabulary:
    """The demo model's 512 entries, byte-level BPE."""
    path = ROOT / "examples" / "demo_model" / "sdar" / "tokenizer.json"
    source = json.loads(path.read_text())
    ids: dict[str, int] = source["model"]["vocab"]
    special = {token["content"] for token in source["added_tokens"]}
    tokens = [b""] * len(ids)
    for text, token in ids.items():
        if text not in special:
            tokens[token] = bytes(_BYTE_OF[char] for char in text)
    return Vocabulary.from_tokens(tokens, 4, [1, 0])


@cache
def large_vocabulary() -> Vocabulary:
    """The 150,000 entries of `tekken_240718.json` behind ten special tokens."""
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "data" / "tekken_240718.json"
    entries = json.loads(path.read_text())["vocab"]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in entries]
    return Vocabulary.from_tokens([b""] * 10 + tokens, 0, [1])


def _gpt2_bytes() -> dict[str, int]:
    """Character -> byte of byte-level BPE."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    pairs = {chr(byte): byte for byte in shown}
    return pairs | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _gpt2_bytes()


@lru_cache(maxsize=4)
def _ids_by_text(vocabulary: Vocabulary) -> dict[bytes, int]:
    pairs = enumerate(vocabulary.tokens)
    return {text: token for token, text in pairs if text}


def encode(vocabulary: Vocabulary, text: bytes) -> list[int]:
    """Longest tokens first."""
    ids = _ids_by_text(vocabulary)
    tokens, start = [], 0
    while start < len(text):
        stop = min(len(text), start + 16)
        while text[start:stop] not in ids:
            stop -= 1
        tokens.append(ids[text[start:stop]])
        start = stop
    return tokens


def decoded(vocabulary: Vocabulary, tokens: Sequence[int]) -> bytes:
    return b"".join(vocabulary.tokens[token] for token in tokens)


class Proposal(NamedTuple):
    """What a denoiser says about the output columns of a block."""

    tokens: np.ndarray  # int64 [W]
    confidence: np.ndarray  # float32 [W]
    ranking: Sequence[int]  # tokens of the frontier, best first


# (output left of the block, block with masks, column of the frontier) -> Proposal
Denoiser = Callable[[list[int], list[int], int], Proposal]


def random_denoiser(
    vocabulary: Vocabulary, seed: int, flood: Sequence[int] = (), share: float = 0.5
) -> Denoiser:
    """Uniform tokens of uniform confidence: the hardest drafter.

    With probability `share` a column takes a token of `flood` instead.
    """
    rng = np.random.default_rng(seed)

    def propose(context: list[int], block: list[int], frontier: int) -> Proposal:
        width, size = len(block), vocabulary.vocab_size
        tokens = rng.integers(0, size, width)
        if len(flood):
            flooded = rng.random(width) < share
            tokens = np.where(flooded, rng.choice(flood, width), tokens)
        ranking = rng.permutation(size)
        first = int(tokens[frontier]) if frontier < width else 0
        confidence = rng.random(width).astype(np.float32)
        return Proposal(tokens, confidence, [first, *ranking.tolist()])

    return propose


class TargetDenoiser:
    """Drafts a target, the surer the nearer to an unmasked column, with errors.

    A column's draft follows what stands left of it in the target, and changes only
    with its neighbours. Errors are shifted, structural or any tokens, and somewhat
    less sure. Structure is surer than content.
    """

    def __init__(
        self, vocabulary: Vocabulary, target: Sequence[int], seed: int, error: float = 1
    ) -> None:
        self.vocabulary = vocabulary
        self.target = [*target, *[vocabulary.stop_ids[0]] * 2]
        self.seed = seed
        self.error = error
        ids = vocabulary.byte_ids
        self.structure = [int(ids[byte]) for byte in b'"{}[],: ' if ids[byte] >= 0]
        self.spare = [token for token in ids.tolist() if token >= 0]

    def __call__(self, context: list[int], block: list[int], frontier: int) -> Proposal:
        output = context + block
        columns = range(len(context), len(output))
        drafts = [self._draft(output, column) for column in columns]
        tokens = np.array([token for token, _ in drafts], dtype=np.int64)
        confidence = np.array([sure for _, sure in drafts], dtype=np.float32)
        wanted = self._wanted(output, len(context) + frontier)
        stop = self.vocabulary.stop_ids[0]
        rest = [*self.structure, stop, *self.spare]
        return Proposal(tokens, confidence, [int(tokens[frontier]), wanted, *rest])

    def _wanted(self, output: list[int], column: int) -> int:
        """The target's token, aligned to the nearest unmasked column on the left."""
        mask = self.vocabulary.mask_id
        anchor = column - 1
        while anchor >= 0 and output[anchor] == mask:
            anchor -= 1
        shift = 0
        if anchor >= 0:
            near = [s for s in range(-4, 5) if 0 <= anchor + s < len(self.target)]
            same = [s for s in near if self.target[anchor + s] == output[anchor]]
            shift = min(same, key=abs, default=0)
        return self.target[min(max(column + shift, 0), len(self.target) - 1)]

    def _draft(self, output: list[int], column: int) -> tuple[int, float]:
        neighbours = output[max(column - 2, 0) : column + 3]
        rng = random.Random(repr((self.seed, column, neighbours)))
        mask = self.vocabulary.mask_id
        near = range(max(column - 16, 0), min(column + 5, len(output)))
        away = [abs(i - column) for i in near if output[i] != mask] or [16]
        token = self._wanted(output, column)
        content = self.vocabulary.tokens[token].isalnum()
        sure = 1 - 0.01 * min(away) - 0.4 * rng.random() ** (2 if content else 5)
        odds = self.error * (0.06 if content else 0.02) * (1 + min(away) / 4)
        if rng.random() < odds:
            after = self.target[min(column + 1, len(self.target) - 1)]
            wrong = [after, rng.choice(self.structure), rng.choice(self.spare)]
            token = rng.choice(wrong)
            sure -= 0.05
        return token, sure


@dataclass
class Decoded:
    """An output and how it came about."""

    tokens: list[int]  # without what follows the end
    status: Status
    num_steps: int
    num_blocks: int
    results: list[StepResult]


def decode(
    state: GrammarState,
    compiled: xgrammar.CompiledGrammar,
    vocabulary: Vocabulary,
    denoiser: Denoiser,
    *,
    width: int,
    threshold: float = 0.9,
    sampled: bool = False,
    context: Sequence[int] = (),
    on_step: Callable[[Callable[[], StepResult]], StepResult] = lambda step: step(),
    max_blocks: int = 10_000,
) -> Decoded:
    """The engine's loop for one request; `context` is what was output before."""
    output = list(context)
    results: list[StepResult] = []
    num_blocks = 0
    row = np.zeros((vocabulary.vocab_size + 31) // 32, dtype=np.int32)
    silent = np.array([not text for text in vocabulary.tokens])
    while (
        len(output) < state.max_tokens
        and state.status == Status.RUNNING
        and num_blocks < max_blocks
    ):
        first = len(output)
        # Blocks lie on a grid of the sequence, so the first may be narrow.
        ids = [vocabulary.mask_id] * min(width, state.max_tokens - first)
        num_blocks += 1
        steps = 0
        while vocabulary.mask_id in ids:
            frontier = ids.index(vocabulary.mask_id)
            proposal = denoiser(output, ids, frontier)
            tokens, confidence = proposal.tokens.copy(), proposal.confidence.copy()
            masked = np.array(ids) == vocabulary.mask_id
            accepted = masked & (confidence > threshold) & ~silent[tokens]
            state.frontier_mask(row)
            words = row.view(np.uint32)
            legal = [
                token
                for token in proposal.ranking
                if words[token >> 5] >> np.uint32(token & 31) & np.uint32(1)
            ]
            candidates = list(dict.fromkeys(legal))[:NUM_CANDIDATES]
            if candidates:
                if tokens[frontier] != candidates[0]:
                    confidence[frontier] *= 0.7
                tokens[frontier] = candidates[0]
                accepted[frontier] = confidence[frontier] > threshold
            if not accepted.any():
                accepted[np.where(masked, confidence, -1).argmax()] = True

            step = partial(
                state.step,
                ids,
                first,
                tokens.tolist(),
                accepted.tolist(),
                [*candidates, -1],
                sampled,
            )
            before, verified = ids, state.num_verified
            result = on_step(step)
            results.append(result)
            ids = result.block
            steps += 1
            _check(state, compiled, vocabulary, output, before, ids, verified)
        assert steps <= 2 * len(ids)
        output += ids
    end = min(len(output), state.num_verified)
    text = [token for token in output[:end] if vocabulary.tokens[token]]
    return Decoded(text, state.status, len(results), num_blocks, results)


def _check(
    state: GrammarState,
    compiled: xgrammar.CompiledGrammar,
    vocabulary: Vocabulary,
    output: list[int],
    before: list[int],
    after: list[int],
    verified: int,
) -> None:
    """What every step promises."""
    mask = vocabulary.mask_id
    frontier = verified - len(output)
    assert after[:frontier] == before[:frontier], "a verified column changed"
    unmasked = sum(a != mask and b == mask for a, b in zip(after, before, strict=True))
    assert unmasked or state.num_verified > verified, "no progress"
    replay = xgrammar.GrammarMatcher(compiled)
    for token in (output + after)[: state.num_verified]:
        if vocabulary.tokens[token]:
            assert replay.accept_token(token), "a verified token is not legal"
        else:
            assert replay.is_completed(), "the end is not the end"
    column = state.num_verified - len(output)
    if state.status != Status.RUNNING:
        assert mask not in after, "masks after the end"
        assert replay.is_completed()
    elif column < len(after):
        assert after[column] == mask, "the frontier is not masked"
        assert not any(token in vocabulary.stop_ids for token in after)
    else:
        assert mask not in after
