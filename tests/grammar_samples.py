# SPDX-License-Identifier: Apache-2.0
"""Grammars of every kind for tests, and random JSON schemas."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import hypothesis.strategies as some
import xgrammar

from vllm_unmask.grammar.vocabulary import Vocabulary

# Compiles one grammar.
Source = Callable[[xgrammar.GrammarCompiler], xgrammar.CompiledGrammar]


@cache
def compiler(vocabulary: Vocabulary) -> xgrammar.GrammarCompiler:
    return xgrammar.GrammarCompiler(vocabulary.info, max_threads=1)


def from_schema(schema: object, **options: Any) -> Source:
    options = {"any_whitespace": False, **options}
    text = json.dumps(schema)
    return lambda compiler: compiler.compile_json_schema(text, **options)


def from_regex(pattern: str) -> Source:
    return lambda compiler: compiler.compile_regex(pattern)


def from_ebnf(text: str) -> Source:
    return lambda compiler: compiler.compile_grammar(text)


def from_tag(element: dict[str, Any]) -> Source:
    tag = {"type": "structural_tag", "format": element}
    return lambda compiler: compiler.compile_structural_tag(tag)


def array_of(items: dict[str, Any], **options: Any) -> Source:
    return from_schema({"type": "array", "items": items, **options})


def object_of(properties: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, **options}


TREE = {
    "$defs": {
        "node": object_of(
            {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            required=["value", "children"],
        )
    },
    "$ref": "#/$defs/node",
}
UNION = {
    "anyOf": [
        object_of({"k": {"const": "a"}, "v": {"type": "string"}}, required=["k", "v"]),
        object_of(
            {"k": {"const": "ab"}, "w": {"enum": [1, "x", None, {"q": [True]}]}},
            required=["k", "w"],
        ),
    ]
}
CALL = {
    "begin": "<call>",
    "content": {"type": "json_schema", "json_schema": {"type": "object"}},
    "end": "</call>",
}

GRAMMARS: dict[str, Source] = {
    "regex": from_regex(r"a(b|cd)*[0-9]{2,4}é"),
    "regex class": from_regex(r'a{2,}(bc|[^d])+\n?"\\'),
    "regex unicode": from_regex(r"[α-ω]{2}\w\s\S."),
    "regex long": from_regex(r"([a-c]x){3,200}y"),
    "regex empty": from_regex("|a|b*"),
    "choice": from_ebnf('root ::= "yes" | "no" | "maybe é"'),
    "left recursion": from_ebnf(
        'root ::= e\ne ::= e "+" t | t\nt ::= [0-9a-é] | "(" e ")"'
    ),
    "hidden left": from_ebnf('root ::= s root "x" | "a"\ns ::= "" | "b"'),
    "ambiguous": from_ebnf('root ::= s\ns ::= s s | "a" | "b" s | ""'),
    "nullable": from_ebnf('root ::= a b a\na ::= "" | "x" a\nb ::= a | "y" b a'),
    "palindrome": from_ebnf('root ::= "a" root "a" | "b" root "b" | ""'),
    "negated": from_ebnf('root ::= [^a-zß]* "x"'),
    "repetition": from_ebnf('root ::= (("a" | "b"){2,300} "c"){1,200}'),
    "optional": from_ebnf('root ::= ("x"?){2,20} "c"'),
    "json": lambda compiler: compiler.compile_builtin_json_grammar(),
    "object": from_schema({"type": "object"}),
    "required": from_schema(
        object_of(
            {"a": {"type": "string"}, "b": {"type": "array"}, "c": {"type": "null"}},
            required=["a", "b"],
        )
    ),
    "whitespace": from_schema(
        object_of({"a": {"type": "number"}}), any_whitespace=True, max_whitespace_cnt=1
    ),
    "any order": from_schema(
        object_of({"a": {"type": "number"}, "b": {"type": "null"}}, required=["a"]),
        any_order=True,
    ),
    "pattern": array_of({"type": "string", "pattern": '^[a-z"é]{1,3}$'}),
    "long string": from_schema({"type": "string", "minLength": 9, "maxLength": 500}),
    "long array": array_of({"type": "integer"}, minItems=3, maxItems=300),
    "bounded": array_of({"type": "integer", "minimum": -17, "maximum": 1234}),
    "number": array_of({"type": "number", "exclusiveMinimum": 0, "maximum": 12.5}),
    "date": array_of({"type": "string", "format": "date-time"}),
    "email": array_of({"type": "string", "format": "email"}),
    "union": from_schema(UNION),
    "tree": from_schema(TREE),
    "additional": from_schema(
        {"type": "object", "additionalProperties": {"type": "integer"}}
    ),
    "tags": from_tag({"type": "triggered_tags", "triggers": ["<c"], "tags": [CALL]}),
    "one tag": from_tag(
        {
            "type": "triggered_tags",
            "triggers": ["<c"],
            "tags": [CALL],
            "stop_after_first": True,
        }
    ),
    "free text": from_tag(
        {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}
    ),
    "lark": lambda compiler: compiler.compile_lark(
        'start: "a" x "b"\nx: /[a-z]*/ | /x(y|z)+/ start\n'
    ),
}


LEAVES: list[dict[str, Any]] = [
    {"enum": ["ab", 1, None]},
    {"const": {"x": [1, "é"]}},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "pattern": "^[a-f]{2,4}[0-9]$"},
    {"type": "string", "format": "date"},
    {"type": "integer", "minimum": 17, "maximum": 1800},
    {"type": "number", "exclusiveMinimum": -2.5, "maximum": 7},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": {"enum": ["p", "q"]}}]},
]


def schemas() -> some.SearchStrategy[dict[str, Any]]:
    """Objects of leaves, arrays and objects, some of their keys required."""
    types = ["string", "integer", "number", "boolean", "null", "array", "object"]
    leaf = some.sampled_from(LEAVES + [{"type": name} for name in types])
    names = some.sampled_from(["a", "b", "c", "é"])

    def larger(inner: some.SearchStrategy[Any]) -> some.SearchStrategy[Any]:
        properties = some.dictionaries(names, inner, max_size=3)
        objects = properties.flatmap(
            lambda known: some.lists(
                some.sampled_from(sorted(known) or ["a"]), unique=True
            ).map(
                lambda required: object_of(
                    known,
                    required=[name for name in required if name in known],
                    additionalProperties=False,
                )
            )
        )
        sizes = some.integers(0, 2)
        arrays = some.builds(
            lambda items, least: {"type": "array", "items": items, "minItems": least},
            inner,
            sizes,
        )
        either = some.lists(inner, min_size=2, max_size=3).map(
            lambda options: {"anyOf": options}
        )
        return objects | arrays | either

    return some.recursive(leaf, larger, max_leaves=6)
