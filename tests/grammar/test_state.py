# SPDX-License-Identifier: Apache-2.0
"""A request's frontier under drafters of every kind; `decode` checks each step."""

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import hypothesis
import hypothesis.strategies as some
import jsonschema
import numpy as np
import pytest
import xgrammar
from grammar_samples import GRAMMARS, compiler, from_schema, object_of, schemas
from synthetic_denoiser import (
    Decoded,
    Denoiser,
    TargetDenoiser,
    byte_vocabulary,
    decode,
    decoded,
    demo_vocabulary,
    encode,
    random_denoiser,
)

from vllm_unmask.grammar.closing import Closer
from vllm_unmask.grammar.parsing import Parse
from vllm_unmask.grammar.state import GrammarState, Status, StepResult
from vllm_unmask.grammar.vocabulary import Vocabulary

MASK, STOP = 0, 1  # of the byte vocabulary
PERSON = object_of(
    {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["home", "work"]},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 2}},
    },
    required=["name", "age", "kind", "tags"],
    additionalProperties=False,
)
ADA = {"name": "Ada é 😀", "age": 36, "kind": "work", "tags": ["math", "poetry"]}


class Constraint:
    """A compiled grammar with its closer."""

    def __init__(self, vocabulary: Vocabulary, source: Callable[..., Any]) -> None:
        self.vocabulary = vocabulary
        self.compiled: xgrammar.CompiledGrammar = source(compiler(vocabulary))
        self.closer = Closer(self.compiled, vocabulary)
        shortest = self.closer.witness(self.closer.start())
        assert shortest is not None
        self.shortest = shortest

    def state(self, max_tokens: int, **options: Any) -> GrammarState:
        options = {"closer": self.closer, **options}
        return GrammarState(
            self.compiled, self.vocabulary, max_tokens=max_tokens, **options
        )

    def decode(
        self, denoiser: Denoiser, max_tokens: int, width: int = 8, **options: Any
    ) -> Decoded:
        state = options.pop("state", None) or self.state(max_tokens)
        return decode(
            state, self.compiled, self.vocabulary, denoiser, width=width, **options
        )

    def check(self, tokens: Sequence[int], max_tokens: int) -> bytes:
        """That an output is complete and within its budget; returns its text."""
        assert len(tokens) <= max_tokens
        matcher = xgrammar.GrammarMatcher(self.compiled)
        assert all(map(matcher.accept_token, tokens)) and matcher.is_completed()
        return decoded(self.vocabulary, tokens)


@cache
def named(name: str) -> Constraint:
    return Constraint(demo_vocabulary(), GRAMMARS[name])


@cache
def person(make: Callable[[], Vocabulary] = demo_vocabulary) -> Constraint:
    return Constraint(make(), from_schema(PERSON))


def ada(vocabulary: Vocabulary) -> list[int]:
    return encode(vocabulary, json.dumps(ADA, ensure_ascii=False).encode())


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("slack", [0, 1, 17])
def test_random_drafts_end_complete(name: str, slack: int) -> None:
    """In every budget that holds the shortest output, however the drafts are."""
    grammar = named(name)
    vocabulary = grammar.vocabulary
    budget = len(grammar.shortest) + slack
    floods = {"none": (), "stop": vocabulary.stop_ids, "mask": (vocabulary.mask_id,)}
    for seed, flood in enumerate(floods.values()):
        denoiser = random_denoiser(vocabulary, seed, flood)
        for width, sampled in ((1, False), (4, True), (8, False)):
            result = grammar.decode(
                denoiser, budget, width, threshold=0.8, sampled=sampled
            )
            grammar.check(result.tokens, budget)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("width", [4, 32])
def test_drafts_of_an_instance_validate(threshold: float, width: int) -> None:
    grammar = person()
    target = ada(grammar.vocabulary)
    for seed in range(3):
        for share in (0, 0.4, 1, 2):
            shortest = len(grammar.shortest)
            budget = shortest + int(share * max(len(target) - shortest, 5))
            denoiser = TargetDenoiser(grammar.vocabulary, target, seed)
            result = grammar.decode(denoiser, budget, width, threshold=threshold)
            text = grammar.check(result.tokens, budget)
            jsonschema.validate(json.loads(text), PERSON)


def test_good_drafts_pass_as_they_are() -> None:
    """Errors aside the output is the draft, in far fewer steps than tokens."""
    grammar = person()
    target = ada(grammar.vocabulary)
    denoiser = TargetDenoiser(grammar.vocabulary, target, 0, error=0)
    result = grammar.decode(denoiser, 2 * len(target), 16)
    assert result.tokens == target and result.status == Status.STOPPED
    assert result.num_steps < len(target) / 2
    assert not any(r.remasked or r.num_forced for r in result.results)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    schema=schemas(),
    slack=some.integers(0, 20),
    width=some.sampled_from([1, 3, 8, 16]),
    seed=some.integers(0, 99),
)
def test_random_schemas(schema: object, slack: int, width: int, seed: int) -> None:
    grammar = Constraint(demo_vocabulary(), from_schema(schema))
    budget = len(grammar.shortest) + slack
    denoiser = random_denoiser(grammar.vocabulary, seed)
    result = grammar.decode(denoiser, budget, width, threshold=0.7)
    text = grammar.check(result.tokens, budget)
    if all(byte >= 32 for byte in text):
        # xgrammar lets control characters into strings of bounded length.
        jsonschema.validate(json.loads(text.decode()), schema)


def test_width_one_is_masked_left_to_right_decoding() -> None:
    grammar = person()
    vocabulary = grammar.vocabulary
    target = ada(vocabulary)
    row = np.zeros((1, (vocabulary.vocab_size + 31) // 32), dtype=np.int32)
    for seed in range(4):
        denoiser = TargetDenoiser(vocabulary, target, seed, error=4)
        budget = 3 * len(target)
        result = grammar.decode(denoiser, budget, 1)
        matcher = xgrammar.GrammarMatcher(grammar.compiled)
        tokens: list[int] = []
        while True:
            ranking = denoiser(tokens, [vocabulary.mask_id], 0).ranking
            matcher.fill_next_token_bitmask(row)
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")
            token = next(token for token in ranking if bits[token])
            if token in vocabulary.stop_ids:
                break
            assert matcher.accept_token(token)
            tokens.append(token)
            assert len(tokens) < budget - len(grammar.shortest), "not the guard's test"
        assert result.tokens == tokens and result.num_steps <= len(tokens) + 1


@pytest.mark.parametrize("slack", range(0, 25, 4))
def test_preempted_and_replayed(slack: int) -> None:
    """From every block border on, in mid-closure too, the output is the same."""
    grammar = person()
    budget = len(grammar.shortest) + slack
    denoiser = TargetDenoiser(grammar.vocabulary, ada(grammar.vocabulary), slack)
    width = 5
    whole = grammar.decode(denoiser, budget, width)
    for border in range(width, len(whole.tokens), width):
        before = whole.tokens[:border]
        state = grammar.state(budget, verified=before)
        assert state.num_verified == border
        again = grammar.decode(denoiser, budget, width, state=state, context=before)
        assert again.tokens == whole.tokens and again.status == whole.status


def test_replay_after_the_end() -> None:
    grammar = person()
    stop = grammar.vocabulary.stop_ids[0]
    tokens = [*grammar.shortest, stop, stop]
    state = grammar.state(len(tokens), verified=tokens)
    assert state.status == Status.STOPPED
    assert state.num_verified == len(grammar.shortest) + 1


def ids(text: str) -> list[int]:
    """Tokens of the byte vocabulary; `_` is a mask and `.` a stop token."""
    special = {"_": MASK, ".": STOP}
    return [special.get(char, ord(char) + 3) for char in text]


def step(
    state: GrammarState,
    block: str,
    drafts: str,
    accepted: Sequence[int] = (),
    candidates: str = "",
    first: int = 0,
    sampled: bool = False,
) -> tuple[str, StepResult]:
    """One step of the byte vocabulary; the block after it as text."""
    chosen = [column in accepted for column in range(len(block))]
    result = state.step(
        ids(block), first, ids(drafts), chosen, ids(candidates), sampled
    )
    shown = "_.." + "".join(map(chr, range(256)))
    return "".join(shown[token] for token in result.block), result


@cache
def regex(pattern: str) -> Constraint:
    return Constraint(byte_vocabulary(), lambda c: c.compile_regex(pattern))


WORDS = "(abcd|axyz|ab)*(e{4})?"


def test_first_violator_is_masked_and_those_after_it_stay() -> None:
    state = regex(WORDS).state(20)
    block, result = step(state, "______", "abqdxx", [0, 1, 2, 3], "a")
    assert block == "ab_d__"
    assert result.num_verified == 2 and result.remasked


def test_look_ahead_takes_the_candidate_of_the_longest_run() -> None:
    state = regex(WORDS).state(20)
    block, result = step(state, "_xyz_", "exyze", [4], "ea")
    assert block == "axyze" and result.looked_ahead and result.num_verified == 5


def test_look_ahead_prefers_the_better_candidate_of_equal_runs() -> None:
    state = regex("(ax|bx|cy)z*").state(9)
    block, result = step(state, "_x__", "axzz", [3], "cba")
    assert block == "bx_z" and result.looked_ahead


def test_sampled_frontier_keeps_its_token() -> None:
    """Look-ahead would change the law of what was sampled."""
    state = regex(WORDS).state(20)
    block, result = step(state, "_xyz_", "exyze", [4], "ea", sampled=True)
    assert block == "_xyze" and not result.looked_ahead
    block, result = step(state, block, "e____", [], "ae", sampled=True)
    assert block == "e_yze" and result.num_verified == 1


def test_patience_lasts_one_step() -> None:
    state = regex(WORDS).state(20)
    block, result = step(state, "______", "a____q", [5], "a")
    assert block == "_____q" and result.num_verified == 0
    block, result = step(state, block, "a___q_", [4], "a")
    assert block == "a___qq" and result.num_verified == 1
    block, result = step(state, block, "_b_q__", [3], "b")
    assert block == "a__qqq" and result.num_verified == 1


def test_nothing_tentative_moves_the_frontier() -> None:
    """A step that could only have unmasked stop tokens takes the frontier's best."""
    state = regex(WORDS).state(20)
    block, result = step(state, "______", "abcd..", [4, 5], "a")
    assert block == "a_____" and result.num_verified == 1


def test_stop_fills_the_block_and_ends_the_matching() -> None:
    state = regex(WORDS).state(20)
    block, _ = step(state, "____", "ab..", [0, 1, 2, 3], "a")
    assert block == "ab__"
    block, result = step(state, block, "ab..", [2], ".a")
    assert block == "ab.." and state.status == Status.STOPPED
    assert result.num_verified == 3
    block, result = step(state, "____", "abab", [0, 1, 2, 3], "a", first=4)
    assert block == "...." and result.num_verified == 3
    row = np.zeros(9, dtype=np.int32)
    state.frontier_mask(row)
    assert row.view(np.uint32).tolist() == [1 << STOP] + [0] * 8


def test_stop_where_the_output_is_incomplete_is_illegal() -> None:
    state = regex(WORDS).state(20)
    block, result = step(state, "____", "a.__", [0], "a")
    block, result = step(state, block, "a.__", [1], ".b")
    assert block == "ab__" and state.status == Status.RUNNING


def test_output_that_nothing_may_follow_ends_at_once() -> None:
    state = regex("ab").state(9)
    block, result = step(state, "____", "abxx", [0, 1], "a")
    assert block == "ab.." and state.status == Status.STOPPED
    assert result.num_verified == 3


def test_no_candidate_leaves_it_to_the_guard() -> None:
    """As when a logit bias bans all that is legal, the stop token included."""
    state = regex("x+(ab|acd)y*").state(20, verified=ids("xx"))
    block = "____"
    for expected in ("a___", "ab__", "ab.."):
        block, result = step(state, block, "xxxx", first=2)
        assert block == expected and result.num_forced == 1
    assert state.status == Status.CLOSED and result.num_verified == 5


def test_guard_writes_the_whole_witness_when_no_token_is_to_spare() -> None:
    state = regex("x*y{3}").state(8)
    block, result = step(state, "________", "xxxxxxxx", range(8), "x")
    assert block == "xxxxxyyy" and result.num_forced == 3
    assert result.num_verified == 8 and state.status == Status.CLOSED


def test_witness_goes_on_in_the_next_block() -> None:
    state = regex("x*y{5}").state(8)
    block, _ = step(state, "____", "xxxx", range(4), "x")
    assert block == "xxxy" and state.status == Status.RUNNING
    replayed = regex("x*y{5}").state(8, verified=ids("xxxy"))
    for each in (state, replayed):
        block, result = step(each, "____", "xxxx", [3], "y", first=4)
        assert block == "yyyy" and each.status == Status.CLOSED


def test_guard_lets_what_fits_pass() -> None:
    """Of the candidates only the one is refused that could not be closed in time."""
    state = regex("x*(yz|q{9}|pr)").state(3)
    block, result = step(state, "___", "xqr", [0, 1], "xqp")
    assert block == "xyz" and result.num_forced == 2
    state = regex("x*(yz|q{9}|prr)").state(4)
    block, result = step(state, "____", "qrrr", [0], "qpx")
    assert block == "p___" and result.num_forced == 0


def test_without_the_guard_an_output_may_be_cut_off() -> None:
    grammar = person()
    denoiser = TargetDenoiser(grammar.vocabulary, ada(grammar.vocabulary), 0)
    state = grammar.state(11, closer=None)
    result = grammar.decode(denoiser, 11, state=state)
    assert len(result.tokens) == 11 and result.status == Status.RUNNING
    matcher = xgrammar.GrammarMatcher(grammar.compiled)
    assert all(map(matcher.accept_token, result.tokens))
    assert not matcher.is_completed()


def test_budgets_from_the_shortest_output_upwards() -> None:
    grammar = person()
    target = ada(grammar.vocabulary)
    with pytest.raises(ValueError, match="no complete output"):
        grammar.state(len(grammar.shortest) - 1)
    ends = set()
    for budget in range(len(grammar.shortest), len(target) + 6):
        denoiser = TargetDenoiser(grammar.vocabulary, target, budget)
        result = grammar.decode(denoiser, budget, 6)
        grammar.check(result.tokens, budget)
        ends.add(result.status)
    assert {Status.STOPPED, Status.CLOSED} <= ends


def test_illegal_replay_is_refused() -> None:
    with pytest.raises(ValueError, match="not legal at position 1"):
        regex(WORDS).state(20, verified=ids("aq"))


def test_mask_spelled_as_text_is_illegal_inside_strings() -> None:
    """Even with a vocabulary that gives the mask token bytes."""
    single = [bytes([byte]) for byte in range(256)]
    info = xgrammar.TokenizerInfo([b"<|MASK|>", b"</s>", b"", *single])
    vocabulary = Vocabulary(info, 0, [1])
    grammar = Constraint(vocabulary, from_schema({"type": "string"}))
    state = grammar.state(30, verified=[ord('"') + 3])
    row = np.zeros(9, dtype=np.int32)
    state.frontier_mask(row)
    assert not row[0] & 0b111 and row.any()
    denoiser = random_denoiser(vocabulary, 0, [0], share=0.9)
    result = grammar.decode(denoiser, 30, 4)
    assert b"MASK" not in grammar.check(result.tokens, 30)


def test_stop_ids_of_a_request() -> None:
    """Legal where the output is complete, and nowhere else; text among them is text."""
    text = ord("a") + 3
    row = np.zeros(9, dtype=np.int32)
    for verified, complete in (("", True), ("a", False), ("ab", True), ("abc", False)):
        state = regex(WORDS).state(20, stop_ids=[2, text], verified=ids(verified))
        state.frontier_mask(row)
        assert bool(row[0] & 0b100) == complete
        assert not row[0] & 0b011
        legal = bool(row[text >> 5] >> (text & 31) & 1)
        assert legal == complete


def test_mask_of_the_frontier_is_xgrammars() -> None:
    grammar = person()
    vocabulary = grammar.vocabulary
    matcher = xgrammar.GrammarMatcher(grammar.compiled)
    expected = np.zeros((1, (vocabulary.vocab_size + 31) // 32), dtype=np.int32)
    row = np.full_like(expected[0], -1)
    for count in range(len(grammar.shortest)):
        state = grammar.state(99, verified=grammar.shortest[:count])
        state.frontier_mask(row)
        matcher.fill_next_token_bitmask(expected)
        assert (row == expected[0]).all()
        assert matcher.accept_token(grammar.shortest[count])


def test_vocabulary_without_all_bytes_is_guarded_too() -> None:
    """Legal tokens after which no tokens could spell the rest are refused."""
    texts = [b"{", b"}", b"a", b"b", b"bq", b"aa}", b"c", b'"']
    vocabulary = Vocabulary.from_tokens([b"", b"", *texts], 0, [1])
    text = 'root ::= "{" ("a" | "bq" | "cq" | "\\"" [^"]* "\\"")* "}"'
    grammar = Constraint(vocabulary, lambda c: c.compile_grammar(text))
    assert not grammar.closer.spells_bytes
    for budget in range(2, 14):
        for seed in range(6):
            denoiser = random_denoiser(vocabulary, seed)
            result = grammar.decode(denoiser, budget, 4, threshold=0.6)
            grammar.check(result.tokens, budget)


def test_output_of_a_lost_parse_ends_by_its_witness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A grammar that the network cannot follow costs the request's text, no more."""
    grammar = Constraint(demo_vocabulary(), from_schema(PERSON))
    followed = grammar.closer.advance

    def advance(parse: Parse, text: bytes) -> Parse | None:
        return None if b"w" in text or b"A" in text else followed(parse, text)

    monkeypatch.setattr(grammar.closer, "advance", advance)
    target = ada(grammar.vocabulary)
    for seed in range(4):
        denoiser = TargetDenoiser(grammar.vocabulary, target, seed)
        result = grammar.decode(denoiser, 80, 8)
        grammar.check(result.tokens, 80)


def test_results_are_counted() -> None:
    grammar = person()
    denoiser = random_denoiser(grammar.vocabulary, 5)
    budget = len(grammar.shortest) + 6
    result = grammar.decode(denoiser, budget, 8, threshold=0.5)
    stopped = result.status == Status.STOPPED
    assert result.results[-1].num_verified == len(result.tokens) + stopped
    assert sum(each.num_forced for each in result.results) > 0
    assert any(each.remasked for each in result.results)


@pytest.mark.parametrize("surrogate", ["\ud800", "\udfff"])
def test_half_of_a_surrogate_pair_is_never_taken(surrogate: str) -> None:
    """In one token, or with its bytes in several."""
    data = surrogate.encode(errors="surrogatepass")
    vocabulary = Vocabulary.from_tokens(
        [b"<m>", b"", *(bytes([i]) for i in range(256)), data, b'"' + data[:1]], 0, (1,)
    )
    constraint = Constraint(vocabulary, from_schema({"type": "string"}))
    quote, whole, split = 2 + ord('"'), 258, 259

    def step(start: list[int], token: int) -> int:
        state = constraint.state(20, verified=start)
        result = state.step(
            [*start, MASK],
            0,
            [*start, token],
            [False] * len(start) + [True],
            [token, 2 + 0x80, quote],
            False,
        )
        return result.block[-1]

    assert step([quote], whole) != whole
    assert step([split], 2 + data[1]) == 2 + 0x80
    assert step([quote], 2 + 0xED) == 2 + 0xED


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_what_stands_when_a_block_is_opened_is_verified(
    share: float, sampled: bool
) -> None:
    """Seeds, and tokens unmasked ahead: a block is not over before they are legal."""
    grammar = person()
    target = ada(grammar.vocabulary)
    rng = random.Random(0)
    mask, width = grammar.vocabulary.mask_id, 8
    wild = [i for i, text in enumerate(grammar.vocabulary.tokens) if text]
    for _ in range(60):
        state = grammar.state(len(target) + 20)
        output: list[int] = []
        for token in target[: rng.randrange(len(target) - width)]:
            assert state.step([mask], len(output), [token], [True], [token], False)
            output.append(token)
        first = state.num_verified
        right = target[first : first + width]
        block = [
            rng.choice([token, rng.choice(wild)]) if rng.random() < share else mask
            for token in right
        ]
        for _ in range(2 * width):
            accepted = [token == mask and rng.random() < 0.5 for token in block]
            frontier = state.num_verified - first
            choices = [right[frontier]] if frontier < width else []
            tokens = [rng.choice([token, rng.choice(wild)]) for token in right]
            result = state.step(block, first, tokens, accepted, [*choices, -1], sampled)
            block = result.block
            if mask not in block:
                break
        assert mask not in block
        over = state.status != Status.RUNNING
        assert over or state.num_verified == first + width
