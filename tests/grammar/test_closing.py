# SPDX-License-Identifier: Apache-2.0
"""Witnesses and distances, against xgrammar's matcher and exhaustive search."""

import json
import random
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as some
import jsonschema
import numpy as np
import pytest
import xgrammar
from grammar_samples import GRAMMARS, compiler, from_schema, from_tag, schemas
from synthetic_denoiser import (
    byte_vocabulary,
    decoded,
    demo_vocabulary,
    encode,
    large_vocabulary,
)

from vllm_unmask.grammar import parsing
from vllm_unmask.grammar.closing import Closer
from vllm_unmask.grammar.network import UNREACHABLE, Network, Unsupported
from vllm_unmask.grammar.parsing import Parse, Parser
from vllm_unmask.grammar.vocabulary import Vocabulary


def legal_bytes(matcher: xgrammar.GrammarMatcher) -> set[int]:
    """Of the byte vocabulary, where byte `b` has id `b + 3`."""
    row = np.zeros((1, 9), dtype=np.int32)
    matcher.fill_next_token_bitmask(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[3:259]).tolist())


def completes(
    compiled: xgrammar.CompiledGrammar, tokens: list[int], witness: tuple[int, ...]
) -> bool:
    matcher = xgrammar.GrammarMatcher(compiled)
    accepted = [matcher.accept_token(token) for token in (*tokens, *witness)]
    return all(accepted) and matcher.is_completed()


@pytest.mark.parametrize("name", GRAMMARS)
def test_parses_are_the_matchers(name: str) -> None:
    """The same bytes may follow and the same outputs are complete, at every byte."""
    vocabulary = byte_vocabulary()
    compiled = GRAMMARS[name](compiler(vocabulary))
    closer = Closer(compiled, vocabulary)
    rng = random.Random(name)
    liked = set(b'"{}[],:0123456789abctx<>/ \\u')
    for _ in range(8):
        matcher = xgrammar.GrammarMatcher(compiled)
        parse: Parse | None = closer.start()
        for _ in range(60):
            assert parse is not None
            assert parse.complete == matcher.is_completed()
            legal = legal_bytes(matcher)
            assert legal == {
                byte for byte in range(256) if closer.advance(parse, bytes([byte]))
            }
            witness = closer.witness(parse)
            assert witness is not None and len(witness) == parse.distance
            assert all(map(matcher.accept_token, witness)) and matcher.is_completed()
            if witness:
                matcher.rollback(len(witness))
            if not legal:
                break
            choices = legal & liked if rng.random() < 0.6 else legal
            byte = rng.choice(sorted(choices or legal))
            assert matcher.accept_token(byte + 3)
            parse = closer.advance(parse, bytes([byte]))


def shortest_by_search(
    compiled: xgrammar.CompiledGrammar, prefix: bytes, alphabet: bytes
) -> int:
    """Fewest bytes that complete `prefix`, by trying all texts by length."""
    matcher = xgrammar.GrammarMatcher(compiled)
    assert not prefix or matcher.accept_string(prefix)
    texts = [b""]
    for length in range(12):
        longer = []
        for text in texts:
            if text:
                matcher.accept_string(text)
            done = matcher.is_completed()
            legal = legal_bytes(matcher) & set(alphabet)
            longer += [text + bytes([byte]) for byte in sorted(legal)]
            if text:
                matcher.rollback(1)
            if done:
                return length
        texts = longer
    raise AssertionError("nothing completes it")


def patterns() -> some.SearchStrategy[str]:
    """Regexes over a, b and c."""
    return some.recursive(
        some.sampled_from(["a", "b", "c", "[ab]", "[^a]"]),
        lambda inner: (
            some.lists(inner, min_size=1, max_size=3).map("".join)
            | some.lists(inner, min_size=2, max_size=3).map(
                lambda parts: f"({'|'.join(parts)})"
            )
            | some.tuples(
                inner, some.sampled_from(["*", "+", "?", "{2}", "{1,3}"])
            ).map(lambda pair: f"({pair[0]}){pair[1]}")
        ),
        max_leaves=5,
    )


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(pattern=patterns(), seed=some.integers(0, 3))
def test_no_text_closes_a_regex_earlier(pattern: str, seed: int) -> None:
    vocabulary = byte_vocabulary()
    compiled = compiler(vocabulary).compile_regex(pattern)
    closer = Closer(compiled, vocabulary)
    matcher = xgrammar.GrammarMatcher(compiled)
    rng = random.Random(seed)
    prefix = b""
    while legal := sorted(legal_bytes(matcher) & set(b"abc")):
        parse = closer.advance(closer.start(), prefix)
        assert parse is not None
        hypothesis.assume(parse.distance < 8)
        assert parse.distance == shortest_by_search(compiled, prefix, b"abc")
        if len(prefix) == 4:
            break
        prefix += bytes([rng.choice(legal)])
        assert matcher.accept_string(prefix[-1:])


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    choices=some.lists(some.text("abé", min_size=1, max_size=5), min_size=1, max_size=4)
)
def test_no_text_closes_a_choice_earlier(choices: list[str]) -> None:
    vocabulary = byte_vocabulary()
    rule = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    closer = Closer(
        compiler(vocabulary).compile_grammar(f"root ::= {rule}"), vocabulary
    )
    texts = [choice.encode() for choice in choices]
    for text in texts:
        for stop in range(len(text) + 1):
            prefix = text[:stop]
            parse = closer.advance(closer.start(), prefix)
            assert parse is not None
            ends = [len(t) - stop for t in texts if t.startswith(prefix)]
            assert parse.distance == min(ends)


@pytest.mark.parametrize("make", [demo_vocabulary, large_vocabulary])
@pytest.mark.parametrize("name", ["required", "union", "date", "tree", "tags", "regex"])
def test_witness_in_long_tokens(name: str, make: Callable[[], Vocabulary]) -> None:
    """It completes every beginning, and is shorter in tokens than in bytes."""
    vocabulary = make()
    compiled = GRAMMARS[name](compiler(vocabulary))
    closer = Closer(compiled, vocabulary)
    rng = random.Random(name)
    saved = 0
    for _ in range(3):
        matcher = xgrammar.GrammarMatcher(compiled)
        parse: Parse | None = closer.start()
        tokens: list[int] = []
        row = np.zeros((1, (vocabulary.vocab_size + 31) // 32), dtype=np.int32)
        for _ in range(12):
            assert parse is not None
            witness = closer.witness(parse)
            assert witness is not None and len(witness) <= parse.distance
            assert completes(compiled, tokens, witness)
            assert len(decoded(vocabulary, witness)) == parse.distance
            saved += parse.distance - len(witness)
            matcher.fill_next_token_bitmask(row)
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")
            legal = set(np.flatnonzero(bits).tolist()) - set(vocabulary.stop_ids)
            if not legal:
                break
            tokens.append(rng.choice(sorted(legal)))
            assert matcher.accept_token(tokens[-1])
            parse = closer.advance(parse, vocabulary.tokens[tokens[-1]])
    assert saved > 0 or name in ("date", "tags", "regex")


def test_witness_takes_the_longest_tokens() -> None:
    tokens = [
        b"",
        b"",
        *(bytes([byte]) for byte in range(256)),
        b"ab",
        b"abcdX",
        b"cde",
    ]
    vocabulary = Vocabulary.from_tokens(tokens, 0, [1])
    compiled = compiler(vocabulary).compile_regex("abcdef")
    closer = Closer(compiled, vocabulary)
    assert closer.witness(closer.start()) == (258, 260, 2 + ord("f"))


def test_vocabulary_that_lacks_bytes() -> None:
    """A witness needs tokens that spell it; a grammar without is known for it."""
    vocabulary = Vocabulary.from_tokens([b"", b"", b"a", b"bc"], 0, [1])
    found = Closer(compiler(vocabulary).compile_regex("abc"), vocabulary)
    assert not found.spells_bytes
    assert found.witness(found.start()) == (2, 3)
    missing = Closer(compiler(vocabulary).compile_regex("ab"), vocabulary)
    assert missing.witness(missing.start()) is None


def test_partial_characters_and_escapes_are_finished() -> None:
    vocabulary = byte_vocabulary()
    closer = Closer(GRAMMARS["required"](compiler(vocabulary)), vocabulary)
    tail = len('", "b": []}')
    for text, missing in [
        ('{"a": "é'.encode()[:-1], 1),
        ('{"a": "😀'.encode()[:-3], 3),
        ('{"a": "😀'.encode()[:-1], 1),
        (b'{"a": "\\', 1),
        (b'{"a": "\\u', 4),
        (b'{"a": "\\u00e', 1),
        (b'{"a": "\\"', 0),
        (b'{"a": "}]', 0),
    ]:
        parse = closer.advance(closer.start(), text)
        assert parse is not None and parse.distance == missing + tail, text
        whole = text + decoded(vocabulary, closer.witness(parse) or ())
        assert set(json.loads(whole)) == {"a", "b"}


def test_nesting_of_64_levels_and_the_empty_object() -> None:
    vocabulary = demo_vocabulary()
    compiled = GRAMMARS["tree"](compiler(vocabulary))
    closer = Closer(compiled, vocabulary)
    text = b'{"value": 1, "children": [' * 64
    parse = closer.advance(closer.start(), text)
    assert parse is not None and parse.distance == 2 * 64
    witness = closer.witness(parse)
    assert witness is not None
    assert decoded(vocabulary, witness) == b"]}" * 64
    assert completes(compiled, encode(vocabulary, text), witness)
    empty = Closer(GRAMMARS["object"](compiler(vocabulary)), vocabulary)
    witness = empty.witness(empty.start())
    assert witness is not None and decoded(vocabulary, witness) == b"{}"


def test_free_text_goes_on_after_a_tag() -> None:
    vocabulary = byte_vocabulary()
    closer = Closer(GRAMMARS["tags"](compiler(vocabulary)), vocabulary)
    distances = []
    for text in (
        b"as <",
        b"<c",
        b"<call>",
        b'<call>{"a": [',
        b"<call>{}</call> <call>",
    ):
        parse = closer.advance(closer.start(), text)
        assert parse is not None
        distances.append(parse.distance)
    begin, content, end = len("all>"), len("{}"), len("</call>")
    inside = len("]}") + end
    assert distances == [0, begin + content + end, content + end, inside, content + end]
    once = Closer(GRAMMARS["one tag"](compiler(vocabulary)), vocabulary)
    over = once.advance(once.start(), b"as <call>{}</call>")
    assert over is not None and over.complete
    assert once.advance(over, b" ") is None


def test_long_repetitions_keep_few_readings() -> None:
    """Both ways in which xgrammar writes them, next to each other in one grammar."""
    vocabulary = byte_vocabulary()
    schema = {"type": "string", "minLength": 2, "maxLength": 500}
    compiled = from_schema(schema)(compiler(vocabulary))
    assert len(Network(compiled.grammar).edges) < 2000, "classes are not shared"
    closer = Closer(compiled, vocabulary)
    for count in (1, 100, 200, 499, 500):
        parse = closer.advance(closer.start(), b'"' + b"x" * count)
        assert parse is not None and len(parse.configurations) <= 8
        assert parse.distance == 1 + max(2 - count, 0)
        assert (closer.advance(parse, b"x") is None) == (count == 500)


def test_strings_are_followed_without_new_parses() -> None:
    vocabulary = byte_vocabulary()
    closer = Closer(GRAMMARS["required"](compiler(vocabulary)), vocabulary)
    inside = closer.advance(closer.start(), b'{"a": "')
    assert inside is not None
    assert closer.advance(inside, b"any text") is inside


def test_grammars_that_cannot_end() -> None:
    vocabulary = byte_vocabulary()
    compiled = compiler(vocabulary).compile_grammar('root ::= "a" root')
    closer = Closer(compiled, vocabulary)
    assert closer.witness(closer.start()) is None
    text = 'root ::= "a" dead | "bc"\ndead ::= "x" dead'
    closer = Closer(compiler(vocabulary).compile_grammar(text), vocabulary)
    assert closer.start().distance == 2
    after = closer.advance(closer.start(), b"a")
    assert after is None or after.distance >= UNREACHABLE


def test_costly_readings_are_given_up() -> None:
    """Optional parts in long repetition: an output is lost, the engine is not."""
    vocabulary = byte_vocabulary()
    text = 'root ::= ("x"?){2,900} "c"'
    parser = Parser(compiler(vocabulary).compile_grammar(text).grammar)
    assert parser.start().distance == 1
    after = parser.advance(parser.start(), b"x")
    assert after is not None and after.distance >= UNREACHABLE
    assert parser.advance(after, b"x") is None
    assert len(parser._closures) < 300


def test_unsupported_grammars() -> None:
    vocabulary = byte_vocabulary()
    tokens = from_tag({"type": "token", "token": 5})(compiler(vocabulary))
    with pytest.raises(Unsupported, match="kind"):
        Network(tokens.grammar)
    text = 'root ::= ("a" | "bc"){150000,150000} ("b" | "cd"){150000,150000}'
    large = compiler(vocabulary).compile_grammar(text)
    with pytest.raises(Unsupported, match="nodes"):
        Network(large.grammar)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(schema=schemas())
def test_witness_of_a_schema_is_an_instance(schema: object) -> None:
    vocabulary = demo_vocabulary()
    closer = Closer(from_schema(schema)(compiler(vocabulary)), vocabulary)
    witness = closer.witness(closer.start())
    assert witness is not None
    jsonschema.validate(json.loads(decoded(vocabulary, witness)), schema)


@pytest.mark.parametrize("text", ["éa", "€1", "ÿf", "a\\xe9b", "😀0", "\x1fa", '"\\'])
def test_escapes_before_hexadecimal_digits(text: str) -> None:
    """xgrammar prints them in a form that it reads back as another character."""
    vocabulary = byte_vocabulary()
    rule = json.dumps(text, ensure_ascii=False)
    closer = Closer(
        compiler(vocabulary).compile_grammar(f"root ::= {rule}"), vocabulary
    )
    witness = closer.witness(closer.start())
    assert witness is not None and decoded(vocabulary, witness).decode() == text


def test_outputs_share_what_they_have_in_common() -> None:
    """The memo is bounded: when it is full, new outputs begin another one."""
    compiled = from_schema({"type": "integer"})(compiler(demo_vocabulary()))
    parser = Parser(compiled.grammar)
    parse = parser.advance(parser.start(), b"12")
    assert parse is parser.advance(parser.start(), b"12")
    known = parser._memo_size
    parser.advance(parser.start(), b"12")
    assert parser._memo_size == known
    parser.advance(parser.start(), b"12,")
    assert parser._memo_size == known + 1, "a text counts, too"
    parser._memo_size = parsing._MAX_MEMO + 1
    other = parser.advance(parser.start(), b"12")
    assert other is not None and other is not parse
    assert other.complete and other.distance == 0
    assert parser.start() is parser.start()
