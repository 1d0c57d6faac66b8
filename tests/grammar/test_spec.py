# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, and what each refusal says."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.grammar.json_features import nesting
from vllm_unmask.grammar.loading import compile_spec
from vllm_unmask.grammar.spec import (
    GrammarError,
    GrammarLimits,
    GrammarSpec,
    admit,
    choice_grammar,
    is_lark,
)
from vllm_unmask.grammar.vocabulary import Vocabulary

# All bytes, then a mask token and special tokens whose names are text, then padding.
TOKENS = [bytes([i]) for i in range(256)]
TOKENS += [b"<|mask|>", b"<|end|>", b"<|user|>", b"ab", b"a", b"", b""]
MASK, END = 256, 257


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(xgrammar.TokenizerInfo(TOKENS), MASK, (END,), special_ids=[258])


def matches(vocabulary: Vocabulary, spec: GrammarSpec, text: str) -> bool:
    compiler = xgrammar.GrammarCompiler(vocabulary.info, max_threads=1)
    matcher = xgrammar.GrammarMatcher(compile_spec(compiler, spec))
    ids = vocabulary.byte_ids[list(text.encode())].tolist()
    return all(map(matcher.accept_token, ids)) and matcher.is_completed()


# Vocabulary


def test_tokens_that_are_no_text_are_legal_nowhere(vocabulary: Vocabulary) -> None:
    """Not in a JSON string, which takes any text, nor where a grammar names them."""
    spec = admit("regex", '"[^"]*"')
    compiler = xgrammar.GrammarCompiler(vocabulary.info, max_threads=1)
    matcher = xgrammar.GrammarMatcher(compile_spec(compiler, spec))
    assert matcher.accept_token(ord('"'))
    row = xgrammar.allocate_token_bitmask(1, vocabulary.vocab_size)
    matcher.fill_next_token_bitmask(row)
    bits = np.unpackbits(row.numpy().view(np.uint8), bitorder="little")
    legal = set(np.flatnonzero(bits[: vocabulary.vocab_size]).tolist())
    assert {ord("<"), TOKENS.index(b"ab")} <= legal
    assert legal.isdisjoint({MASK, END, 258, 261, 262})
    assert set(vocabulary.special_ids) == {MASK, 258, 261, 262}

    matcher = xgrammar.GrammarMatcher(
        compile_spec(compiler, admit("grammar", f"root ::= Token({MASK})"))
    )
    assert not matcher.accept_token(MASK)


def test_a_vocabulary_survives_the_way_to_another_process(
    vocabulary: Vocabulary,
) -> None:
    copy = Vocabulary.loads(vocabulary.dumps())
    assert copy.tokens == vocabulary.tokens and copy.digest == vocabulary.digest
    assert (copy.mask_id, copy.stop_ids) == (MASK, (END,))
    assert copy.info.dump_metadata() == vocabulary.info.dump_metadata()
    assert copy.digest != Vocabulary.from_tokens(TOKENS, MASK, (END,)).digest


def test_byte_ids_are_the_smallest_and_none_where_there_is_no_token() -> None:
    vocabulary = Vocabulary.from_tokens([b"b", b"a", b"a", b"<m>", b"</s>"], 3, (4,))
    expected = np.full(256, -1)
    expected[[ord("a"), ord("b")]] = 1, 0
    np.testing.assert_array_equal(vocabulary.byte_ids, expected)
    assert vocabulary.byte_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("mask", "stops"), [(0, ()), (0, (0,)), (0, (9,)), (-1, (1,)), (9, (1,))]
)
def test_ids_outside_of_the_vocabulary(mask: int, stops: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ids"):
        Vocabulary.from_tokens([b"a", b"b"], mask, stops)


# Canonical form


@pytest.mark.parametrize(
    ("field", "value", "kind", "text"),
    [
        ("json", {"type": "object"}, "json_schema", '{"type":"object"}'),
        ("json", '{ "type": "object" }', "json_schema", '{"type":"object"}'),
        ("json", "true", "json_schema", "true"),
        ("json_object", True, "json_object", '{"type":"object"}'),
        ("regex", "a|b", "regex", "a|b"),
        ("choice", ["a", 'b"'], "choice", 'root ::= "a" | "b\\""'),
        ("grammar", 'root ::= "a"', "ebnf", 'root ::= "a"'),
    ],
)
def test_canonical_form(field: str, value: object, kind: str, text: str) -> None:
    assert admit(field, value) == (kind, text, 1)


@pytest.mark.parametrize(
    ("pattern", "mended"),
    [
        (r"^\d\d(-\d+)?x$", r"^\d\d(-\d+){0,1}x$"),
        (r"((a+)?b)?", r"((a+){0,1}b){0,1}"),
        (r"a?(b)*\)?[)?][\])?]", r"a?(b)*\)?[)?][\])?]"),
        (r"(a)??(?:b)?", r"(a)??(?:b){0,1}"),
    ],
)
def test_optional_groups_are_spelled_out(pattern: str, mended: str) -> None:
    schema = {
        "properties": {"pattern": {"type": "string", "pattern": pattern}},
        "const": {"pattern": pattern},
        "items": {"patternProperties": {pattern: {}}},
    }
    text = admit("json", json.dumps(schema)).text
    assert json.loads(text) == {
        "properties": {"pattern": {"type": "string", "pattern": mended}},
        "const": {"pattern": pattern},
        "items": {"patternProperties": {mended: {}}},
    }


def test_an_optional_group_ends_where_it_says(vocabulary: Vocabulary) -> None:
    """Once the first of these fails, xgrammar is mended and ours can go."""
    schema = json.dumps({"type": "string", "pattern": r"^\d\d(-\d+)?x$"})
    compiler = xgrammar.GrammarCompiler(vocabulary.info)

    def accepted(grammar: xgrammar.CompiledGrammar, text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(grammar)
        return matcher.accept_string(json.dumps(text)) and matcher.is_completed()

    assert accepted(compiler.compile_json_schema(schema), "1111x")
    ours = compile_spec(compiler, admit("json", schema))
    texts = {"1111x": False, "11-11x": True, "11x": True, "11-x": False}
    assert {text: accepted(ours, text) for text in texts} == texts


def test_order_of_properties_is_kept() -> None:
    schema = {"properties": {"b": {}, "a": {}}, "type": "object"}
    assert json.loads(admit("json", schema).text) == schema
    assert list(json.loads(admit("json", schema).text)["properties"]) == ["b", "a"]


def test_specs_are_equal_by_content() -> None:
    specs = [
        admit("regex", "a"),
        admit("regex", "b"),
        admit("grammar", "a"),
        admit("json", "{}"),
        admit("json", "{}", whitespace=0),
    ]
    assert len(set(specs)) == len(specs)
    assert admit("json", " {} ") == admit("json", {})


def test_an_old_structural_tag_becomes_a_new_one(vocabulary: Vocabulary) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    structure = {"begin": "<f>", "schema": schema, "end": "</f>"}
    old = {"structures": [structure], "triggers": ["<f"]}
    spec = admit("structural_tag", json.dumps(old))
    assert matches(vocabulary, spec, 'hello <f>{"a": 1}</f>')
    assert not matches(vocabulary, spec, 'hello <f>{"a": ""}</f>')


@pytest.mark.parametrize("field", ["json", "structural_tag"])
def test_white_space_is_bounded(vocabulary: Vocabulary, field: str) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
    }
    value = schema
    if field == "structural_tag":
        content = {"type": "json_schema", "json_schema": schema}
        value = {"type": "structural_tag", "format": content}
    spec = admit(field, json.dumps(value))
    assert matches(vocabulary, spec, '{"a":1}')
    assert matches(vocabulary, spec, '{ "a" : 1 }')
    assert not matches(vocabulary, spec, '{  "a":1}')


def test_compact_json(vocabulary: Vocabulary) -> None:
    spec = admit("json", {"type": "array", "items": {"const": 1}}, whitespace=0)
    assert matches(vocabulary, spec, "[1,1]")
    assert not matches(vocabulary, spec, "[1, 1]")


@given(st.lists(st.text(max_size=6).filter(lambda s: "\0" not in s), min_size=1))
def test_a_choice_is_exactly_its_entries(choices: list[str]) -> None:
    vocabulary = Vocabulary.from_tokens(TOKENS, MASK, (END,))
    spec = admit("choice", choices)
    assert all(matches(vocabulary, spec, choice) for choice in choices)
    others = {choice[:-1] for choice in choices} | {choice + "x" for choice in choices}
    assert not any(matches(vocabulary, spec, text) for text in others - {*choices})


@pytest.mark.parametrize(
    ("grammar", "lark"),
    [
        ('start: "a"', True),
        ('root ::= "a"', False),
        ('// ::=\nstart: "a"', True),
        ("# comment\nroot ::= x\nx ::= y", False),
    ],
)
def test_lark_is_told_from_ebnf(grammar: str, lark: bool) -> None:
    assert is_lark(grammar) == lark


def test_lark_compiles(vocabulary: Vocabulary) -> None:
    spec = admit("grammar", 'start: "a" WORD\nWORD: /[0-9]+/')
    assert matches(vocabulary, spec, "a12") and not matches(vocabulary, spec, "12")


# Refusals


def refusal(field: str, value: object, **limits: Any) -> GrammarError:
    with pytest.raises(GrammarError) as caught:
        admit(field, value, GrammarLimits(**limits))
    return caught.value


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("json", "", "is no JSON"),
        ("json", "{", "is no JSON"),
        ("json", "[1]", "is no schema"),
        ("json", '"object"', "is no schema"),
        ("json", "null", "is no schema"),
        ("json", '{"minimum": NaN}', "NaN is not JSON"),
        ("json", {"minimum": float("inf")}, "is no JSON"),
        ("json", {"a": {1, 2}}, "is no JSON"),
        ("json", '{"const": ' + "1" * 5000 + "}", "is no JSON"),
        ("json", ["a"], "is a list"),
        ("json", "[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ("json_object", False, "expected true"),
        ("regex", 5, "is a int"),
        ("regex", "a\0", "NUL"),
        ("regex", "\ud800", "surrogate"),
        ("choice", [], "has 0 entries"),
        ("choice", "abc", "a list of strings"),
        ("choice", ["a", 1], "a list of strings"),
        ("choice", ["a", "\0"], "NUL"),
        ("grammar", {"a": 1}, "is a dict"),
        ("structural_tag", "[]", "a JSON object"),
        ("structural_tag", '{"structures": 5, "triggers": []}', "is incomplete"),
        ("structural_tag", '{"structures": [{"begin": "a"}]}', "schema"),
    ],
)
def test_refusals_name_the_parameter(field: str, value: object, says: str) -> None:
    error = refusal(field, value)
    assert str(error).startswith(f"structured_outputs.{field}=")
    assert says in str(error) and "expected" in str(error) and len(str(error)) < 500
    assert error.parameter == f"structured_outputs.{field}"


@pytest.mark.parametrize(
    ("field", "value", "limits", "says"),
    [
        ("regex", "é" * 6, {"text_bytes": 11}, "has 12 bytes: expected at most 11"),
        ("choice", ["a"] * 3, {"choices": 2}, "has 3 entries: expected 1 to 2"),
        ("json", {"a": [{}]}, {"nesting": 2}, "3 levels deep: expected at most 2"),
    ],
)
def test_refusals_name_the_limit(
    field: str, value: object, limits: dict[str, int], says: str
) -> None:
    assert says in str(refusal(field, value, **limits))
    admit(field, value, GrammarLimits(**{k: v + 1 for k, v in limits.items()}))


def test_a_structural_tag_may_nest_deeper() -> None:
    schema: Any = {}
    for _ in range(79):
        schema = {"a": schema}
    text = json.dumps(schema)
    admit("structural_tag", text)
    assert "expected at most 80" in str(refusal("structural_tag", f'{{"a":{text}}}'))
    assert "expected at most 64" in str(refusal("json", text))


STRING = {"type": "string"}
KEYWORDS = [
    ("multipleOf", {"type": "number", "multipleOf": 2}),
    ("multipleOf", {"type": ["null", "integer"], "multipleOf": 2}),
    ("uniqueItems", {"type": "array", "uniqueItems": True}),
    ("contains", {"type": "array", "contains": {}}),
    ("minContains", {"type": "array", "minContains": 1}),
    ("maxContains", {"type": "array", "maxContains": 1}),
    ("format", {"type": "string", "format": "iban"}),
    ("format", {"type": "string", "format": ["date"]}),
    ("format", {"type": "string", "format": "date", "maxLength": 5}),
    ("pattern", {"type": "string", "pattern": "a*", "minLength": 5}),
    ("propertyNames", {"type": "object", "propertyNames": {}, "properties": {}}),
    (
        "propertyNames",
        {"type": "object", "propertyNames": {"pattern": "a", "maxLength": 3}},
    ),
    (
        "propertyNames",
        {"type": "object", "propertyNames": {}, "unevaluatedProperties": False},
    ),
    (
        "patternProperties",
        {"type": "object", "patternProperties": {"a": {}}, "properties": {}},
    ),
    ("patternProperties", {"type": "object", "patternProperties": {"a": {}, "b": {}}}),
    ("allOf", {"allOf": [STRING, {"enum": ["a"]}]}),
    ("anyOf", {"anyOf": []}),
    ("enum", {"enum": []}),
    ("$ref", {"$ref": "https://example.com/schema.json"}),
    ("$ref", {"$ref": "other.json#/$defs/a"}),
    ("$ref", {"$ref": "#anchor"}),
]
PLACES = {
    "#": lambda s: s,
    "#/properties/multipleOf": lambda s: {"properties": {"multipleOf": s}},
    "#/$defs/const": lambda s: {"$defs": {"const": s}},
    "#/anyOf/1/items": lambda s: {"anyOf": [{}, {"items": s}]},
    "#/components/schemas/a": lambda s: {"components": {"schemas": {"a": s}}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("keyword", "schema"), KEYWORDS)
def test_keywords_that_would_be_ignored(
    keyword: str, schema: dict[str, Any], place: str
) -> None:
    error = refusal("json", PLACES[place](schema))
    name = f"structured_outputs.json: {keyword}"
    assert error.parameter == name and error.value == schema[keyword]
    assert str(error).startswith(f"{name}=")
    assert f"at {place} cannot be enforced: expected " in str(error)


@pytest.mark.parametrize(
    "schema",
    [
        {"const": {"type": "array", "uniqueItems": True}},
        {"enum": [{"$ref": "http://a.b"}]},
        {"properties": {"$ref": {"type": "string"}, "anyOf": {"type": "null"}}},
        {"type": "object", "properties": {"uniqueItems": {"type": "array"}}},
        {"type": "string", "format": "date"},
        {"type": "string", "pattern": "a"},
        {"type": "string", "uniqueItems": True},
        {"allOf": [{"type": "string"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}},
    ],
)
def test_schemas_that_only_look_as_if(schema: dict[str, Any]) -> None:
    assert json.loads(admit("json", schema).text) == schema


def test_checks_are_linear_in_the_text() -> None:
    """References that go in circles, and ten thousand of everything."""
    loop = {f"a{i}": {"$ref": f"#/$defs/a{i - 1}"} for i in range(2000)}
    admit("json", {"$defs": loop, "$ref": "#/$defs/a0", "enum": [*range(10_000)]})
    itself: dict[str, Any] = {}
    itself["a"] = itself
    assert "Circular" in str(refusal("json", itself))


@given(st.recursive(st.none(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)))
def test_nesting_is_what_the_brackets_say(value: object) -> None:
    steps = {"[": 1, "{": 1, "]": -1, "}": -1}
    text = json.dumps(value, ensure_ascii=True)
    if not any(c in json.dumps(k) for k in _keys(value) for c in steps):
        depths = itertools.accumulate(steps.get(c, 0) for c in text)
        assert nesting(value) == max(depths)


def _keys(value: object) -> list[str]:
    if isinstance(value, list):
        return [key for item in value for key in _keys(item)]
    if isinstance(value, dict):
        return [*value, *(key for item in value.values() for key in _keys(item))]
    return []


def test_choice_grammar_escapes() -> None:
    assert choice_grammar(['"\\\n\x01']) == r'root ::= "\"\\\n\u0001"'
