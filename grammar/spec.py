# SPDX-License-Identifier: Apache-2.0
"""What a request asks for, in one canonical form, and what is refused at once.

Nothing here compiles: the checks are linear in the text and run in the process
that serves HTTP. Whether a grammar compiles, in what time and to what size, is
found out elsewhere (`vllm_unmask.grammar.compilation`).
"""

import json
import re
import reprlib
from typing import Any, Literal, NamedTuple

from vllm_unmask.grammar.json_features import (
    find_unenforced,
    mend_patterns,
    nesting,
    parse,
)

Kind = Literal[
    "json_schema", "json_object", "regex", "choice", "ebnf", "structural_tag"
]
# Fields of vLLM's `StructuredOutputsParams`, each a kind of grammar.
FIELDS: dict[str, Kind] = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf",
    "structural_tag": "structural_tag",
}
_PARAMETERS = {kind: f"structured_outputs.{field}" for field, kind in FIELDS.items()}
# xgrammar cuts its texts off there.
_NUL = ("holds a NUL character", "text without it")
# A structural tag wraps its schemas in up to that many levels.
_TAG_NESTING = 16


class GrammarLimits(NamedTuple):
    """How much a grammar may take; beyond it the request is refused."""

    text_bytes: int = 256 * 1024
    """Schema, pattern, choices or grammar as UTF-8."""
    nesting: int = 64
    """Levels of objects and arrays in a JSON Schema, 16 more in a structural tag."""
    choices: int = 4096
    """Entries of a choice."""
    closing_tokens: int = 4096
    """Tokens of the shortest output that was found."""
    compile_seconds: float = 10.0
    """Wall time of one compilation, after which it is killed."""
    compile_memory: int = 2 * 1024**3
    """Bytes that one compilation may allocate."""
    compiled_bytes: int = 64 * 1024**2
    """Memory of the compiled grammar."""
    waiting: int = 64
    """Compilations that wait for a free process."""
    cache_bytes: int = 16 * 1024**2
    """Texts and closings of admitted grammars that are remembered."""
    refusal_seconds: float = 300.0
    """How long a grammar that was refused is refused without another try."""


class GrammarError(ValueError):
    """A grammar that is refused.

    Args:
        message: names the parameter, what is wrong with its value, what is expected.
        parameter: `structured_outputs.json` and so on.
        value: the value, or the part of it that is refused.

    """

    def __init__(self, message: str, parameter: str, value: object) -> None:
        super().__init__(message, parameter, value)
        self.parameter = parameter
        self.value = value

    def __str__(self) -> str:
        return str(self.args[0])


class GrammarSpec(NamedTuple):
    """A grammar in canonical form."""

    kind: Kind
    text: str
    """JSON for `json_schema`, `json_object` and `structural_tag`; EBNF for `choice`;
    EBNF or Lark for `ebnf`."""
    whitespace: int = 1
    """Longest run of white space between the tokens of JSON, at least 1, or 0 for
    the compact form. Never unbounded: blanks alone could use up any budget."""

    @property
    def parameter(self) -> str:
        """The request parameter that it came from."""
        return _PARAMETERS[self.kind]

    def refused(self, reason: str, expected: str) -> GrammarError:
        """The error that says the grammar is refused, why and what is expected."""
        return _refused(self.parameter, self.text, reason, expected)


def admit(
    field: str,
    value: object,
    limits: GrammarLimits = GrammarLimits(),  # noqa: B008
    *,
    whitespace: int = 1,
) -> GrammarSpec:
    """Check one field of `StructuredOutputsParams` and bring it into canonical form.

    Args:
        field: `json`, `json_object`, `regex`, `choice`, `grammar`, `structural_tag`.
        value: what the request holds there.
        limits: what is allowed.
        whitespace: see `GrammarSpec`.

    Raises:
        GrammarError: what the request holds cannot be honoured.

    """
    kind = FIELDS[field]
    parameter = _PARAMETERS[kind]
    if kind == "json_object":
        if value is not True:
            raise _refused(parameter, value, "is not allowed", "true")
        return GrammarSpec(kind, '{"type":"object"}', whitespace)
    if kind == "choice":
        text = _choice_text(parameter, value, limits)
    elif kind == "json_schema" and isinstance(value, (dict, bool)):
        text = _json_text(parameter, value)
    elif isinstance(value, str):
        text = value
    else:
        expected = "a string or an object" if kind == "json_schema" else "a string"
        raise _refused(parameter, value, f"is a {type(value).__name__}", expected)
    _check_text(parameter, text, limits)
    if kind in ("json_schema", "structural_tag"):
        text = _canonical_json(kind, parameter, text, limits, whitespace)
    elif "\0" in text:
        raise _refused(parameter, text, *_NUL)
    return GrammarSpec(kind, text, whitespace)


def is_lark(grammar: str) -> bool:
    """Whether a grammar is Lark's syntax: no line of it defines a rule by `::=`."""
    lines = (re.sub(r"(#|//).*$", "", line) for line in grammar.split("\n"))
    return bool(grammar) and not any("::=" in line for line in lines)


def choice_grammar(choices: list[str]) -> str:
    """EBNF of exactly these texts."""
    return "root ::= " + " | ".join(
        f'"{choice.translate(_EBNF)}"' for choice in choices
    )


_EBNF = {code: f"\\u{code:04x}" for code in (*range(0x20), 0x7F)}
_EBNF |= {ord("\n"): r"\n", ord("\r"): r"\r", ord("\t"): r"\t"}
_EBNF |= {ord("\\"): r"\\", ord('"'): r"\""}


def _refused(parameter: str, value: object, reason: str, expected: str) -> GrammarError:
    message = f"{parameter}={reprlib.repr(value)} {reason}: expected {expected}"
    return GrammarError(message, parameter, value)


def _choice_text(parameter: str, value: object, limits: GrammarLimits) -> str:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise _refused(parameter, value, "is not allowed", "a list of strings")
    if not 1 <= len(value) <= limits.choices:
        raise _refused(
            parameter, value, f"has {len(value)} entries", f"1 to {limits.choices}"
        )
    if any("\0" in choice for choice in value):
        raise _refused(parameter, value, *_NUL)
    return choice_grammar(value)


def _json_text(parameter: str, value: object) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"is no JSON ({error})"
    raise _refused(parameter, value, reason, "a JSON Schema")


def _check_text(parameter: str, text: str, limits: GrammarLimits) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        reason = "holds half of a surrogate pair"
        raise _refused(parameter, text, reason, "valid Unicode") from None
    if size > limits.text_bytes:
        expected = f"at most {limits.text_bytes}"
        raise _refused(parameter, text, f"has {size} bytes", expected)


def _canonical_json(
    kind: Kind, parameter: str, text: str, limits: GrammarLimits, whitespace: int
) -> str:
    try:
        value = parse(text)
    except ValueError as error:
        raise _refused(parameter, text, f"is no JSON ({error})", "JSON") from None
    allowed = limits.nesting + (_TAG_NESTING if kind == "structural_tag" else 0)
    if (levels := nesting(value)) > allowed:
        reason = f"nests objects and arrays {levels} levels deep"
        raise _refused(parameter, text, reason, f"at most {allowed}")
    if kind == "structural_tag":
        value = _tag(parameter, value)
        _bound_whitespace(value, max(whitespace, 1))
    elif not isinstance(value, (dict, bool)):
        raise _refused(parameter, text, "is no schema", "a JSON object, true or false")
    elif found := find_unenforced(value):
        name = f"{parameter}: {found.keyword}"
        reason = f"at {found.path} cannot be enforced"
        raise _refused(name, found.value, reason, found.expected)
    mend_patterns(value)
    # The order of keys is kept: it is the order in which the output has them.
    return json.dumps(value, separators=(",", ":"))


def _tag(parameter: str, value: Any) -> Any:
    """A structural tag in today's form; the older one has `structures`, `triggers`."""
    if not isinstance(value, dict):
        raise _refused(parameter, value, "is not allowed", "a JSON object")
    if "structures" not in value:
        return value
    try:
        tags = [
            {
                "type": "tag",
                "begin": item["begin"],
                "content": {"type": "json_schema", "json_schema": item["schema"]},
                "end": item["end"],
            }
            for item in value["structures"]
        ]
        triggers = value["triggers"]
    except (TypeError, KeyError) as error:
        expected = "triggers, and begin, schema and end of each of structures"
        reason = f"is incomplete ({error})"
        raise _refused(parameter, value, reason, expected) from None
    form = {"type": "triggered_tags", "triggers": triggers, "tags": tags}
    return {"type": "structural_tag", "format": form}


def _bound_whitespace(tag: Any, whitespace: int) -> None:
    """Bound the white space of every schema in a structural tag, in place."""
    stack = [tag]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            if node.get("type") == "json_schema" and "json_schema" in node:
                if node.get("max_whitespace_cnt") is None:
                    node["max_whitespace_cnt"] = whitespace
            else:
                stack.extend(node.values())
