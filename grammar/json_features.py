# SPDX-License-Identifier: Apache-2.0
"""JSON Schema keywords that xgrammar would ignore, found before it does.

The rules are those by which vLLM's own xgrammar backend refuses a schema, so a
schema that vLLM serves for other models is served here; added are references to
other documents and empty alternatives, which xgrammar takes for "any value" and
for the empty text.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

# Formats of strings that xgrammar enforces.
FORMATS = frozenset(
    "email date time date-time duration ipv4 ipv6 hostname uuid uri uri-reference "
    "uri-template json-pointer relative-json-pointer".split()
)
# Keywords whose value maps free names to schemas, and keywords whose value is data.
_MAPS = frozenset(
    "properties patternProperties dependentSchemas $defs definitions".split()
)
_DATA = frozenset("const enum default examples".split())

Schema = dict[str, Any]


class Unenforced(NamedTuple):
    """A keyword that cannot be honoured: where it is, its value and what could be."""

    keyword: str
    path: str  # JSON pointer of the schema that holds the keyword
    value: object
    expected: str


class _Rule(NamedTuple):
    keyword: str
    type: str  # type that the schema must declare for the rule, "" for any
    broken: Callable[[Schema], bool]
    expected: str


def _bounded(schema: object) -> bool:
    return (
        isinstance(schema, dict)
        and ("pattern" in schema or "format" in schema)
        and ("minLength" in schema or "maxLength" in schema)
    )


def _is_empty(key: str, schema: Schema) -> bool:
    return bool(schema[key] == [])


def _is_conjunction(schema: Schema) -> bool:
    return isinstance(schema["allOf"], list) and len(schema["allOf"]) > 1


def _is_remote(schema: Schema) -> bool:
    reference = schema["$ref"]
    return isinstance(reference, str) and not re.match(r"#(/|$)", reference)


_NONE = "a schema without it"
_RULES = (
    _Rule("multipleOf", "integer", lambda s: True, _NONE),
    _Rule("multipleOf", "number", lambda s: True, _NONE),
    _Rule("uniqueItems", "array", lambda s: True, _NONE),
    _Rule("contains", "array", lambda s: True, _NONE),
    _Rule("minContains", "array", lambda s: True, _NONE),
    _Rule("maxContains", "array", lambda s: True, _NONE),
    _Rule(
        "format",
        "string",
        lambda s: not isinstance(s["format"], str) or s["format"] not in FORMATS,
        "one of " + ", ".join(sorted(FORMATS)),
    ),
    _Rule("pattern", "string", _bounded, "no minLength or maxLength beside it"),
    _Rule("format", "string", _bounded, "no minLength or maxLength beside it"),
    _Rule(
        "propertyNames",
        "object",
        lambda s: (
            _bounded(s["propertyNames"])
            or "patternProperties" in s
            or "properties" in s
            or s.get("unevaluatedProperties", True) is not True
        ),
        "no properties, patternProperties or unevaluatedProperties beside it, and "
        "not both a pattern and a length",
    ),
    _Rule(
        "patternProperties",
        "object",
        lambda s: (
            isinstance(s["patternProperties"], dict)
            and ("properties" in s or len(s["patternProperties"]) > 1)
        ),
        "one pattern, and no properties beside it",
    ),
    _Rule("allOf", "", _is_conjunction, "one schema in it"),
    *(
        _Rule(key, "", partial(_is_empty, key), "at least one entry")
        for key in ("allOf", "anyOf", "oneOf", "enum", "type")
    ),
    _Rule("$ref", "", _is_remote, "a reference into the same document (#/...)"),
)


def find_unenforced(schema: object) -> Unenforced | None:
    """The first keyword of a JSON Schema that xgrammar cannot honour, if any."""
    for path, node in _schemas(schema):
        kinds = node.get("type", ())
        kinds = [kinds] if isinstance(kinds, str) else kinds
        for rule in _RULES:
            if rule.keyword not in node or (rule.type and rule.type not in kinds):
                continue
            if rule.broken(node):
                value = node[rule.keyword]
                return Unenforced(rule.keyword, path, value, rule.expected)
    return None


# Escapes and classes as one token, so that what looks like a quantifier in them is not.
_PATTERN = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\)\?(?![?+])|.", re.DOTALL)


def mend_patterns(schema: object) -> None:
    """Write ``(...)?`` as ``(...){0,1}`` in every pattern of a schema, in place.

    In a JSON string xgrammar 0.2.8 skips an optional group to its end with the loop
    that the group ends in still open: ``\\d\\d(-\\d+)?`` takes ``1111``. The other
    spelling means the same and is right.
    """
    for _, node in _schemas(schema):
        if isinstance(pattern := node.get("pattern"), str):
            node["pattern"] = _mended(pattern)
        if isinstance(named := node.get("patternProperties"), dict):
            node["patternProperties"] = {_mended(k): v for k, v in named.items()}


def _mended(pattern: str) -> str:
    return _PATTERN.sub(lambda m: "){0,1}" if m[0] == ")?" else m[0], pattern)


def nesting(value: object) -> int:
    """How deep objects and arrays are nested: 0 for a scalar."""
    deepest, stack = 0, [(value, 1)]
    while stack:
        node, depth = stack.pop()
        if isinstance(node, (dict, list)):
            deepest = max(deepest, depth)
            inner = node.values() if isinstance(node, dict) else node
            stack.extend((child, depth + 1) for child in inner)
    return deepest


def parse(text: str) -> Any:
    """Parse strict JSON.

    Raises:
        ValueError: no JSON, NaN or infinite, or deeper than Python's parser goes.

    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _schemas(schema: object) -> Iterator[tuple[str, Schema]]:
    """Every schema inside a schema with its path, outer ones first."""
    stack = [("#", schema)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, list):
            stack.extend((f"{path}/{i}", item) for i, item in enumerate(node))
        if not isinstance(node, dict):
            continue
        yield path, node
        for key, value in node.items():
            if key in _MAPS and isinstance(value, dict):
                stack.extend((f"{path}/{key}/{k}", v) for k, v in value.items())
            elif key not in _DATA:
                stack.append((f"{path}/{key}", value))
