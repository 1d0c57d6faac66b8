# SPDX-License-Identifier: Apache-2.0
"""Real JSON Schemas out of installed packages, and generated ones.

Nothing is downloaded or copied: the schemas are read where pip put them, so the
corpus follows the installed versions. A large document also counts as the schemas
that it defines, each with the definitions that it needs; a pydantic model counts as
its `model_json_schema()`. What is equal but for its titles counts once, and what
holds no other schema (a lone `{"type": "string"}`) does not count.

    python examples/benchmarks/schema_corpus.py    # how many come from where
"""

import hashlib
import importlib
import inspect
import json
import pkgutil
import random
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from itertools import chain, zip_longest
from typing import Any, NamedTuple

GENERATED = "generated"
# Distributions whose *.json files are read: the schemas of GitHub, GitLab, CircleCI,
# Azure and more workflows, compose, Renovate and so on; JSON Schema's own; Python
# project files.
DOCUMENTS = ("check-jsonschema", "jsonschema-specifications", "setuptools")
# Distribution -> modules whose pydantic models are read, with those below them: the
# protocols of tools and of chat completions, OpenAPI.
MODELS = {
    "mcp-types": ("mcp_types",),
    "openai": ("openai.types.chat", "openai.types.shared"),
    "anthropic": ("anthropic.types.messages",),
    "fastapi": ("fastapi.openapi.models",),
    "mistral_common": ("mistral_common.protocol",),
}
_DEFINITIONS = ("$defs", "definitions")
_TITLES = ("title", "description", "$comment", "$id", "id", "$schema")
_COMPOSITE = frozenset(
    "properties patternProperties additionalProperties items prefixItems anyOf oneOf "
    "allOf".split()
)


class Schema(NamedTuple):
    """A JSON Schema and where it is from."""

    name: str
    """`package/path#/pointer` or `package/module.Model`."""
    package: str
    """Distribution, or `GENERATED`."""
    source: str
    """Document or module, the schemas of which are alike."""
    content: dict[str, Any]

    @property
    def text(self) -> str:
        """As JSON, keys in their own order: it is the order of the output."""
        return json.dumps(self.content)


def corpus() -> list[Schema]:
    """All real schemas, in a fixed order that alternates between their sources.

    Any beginning of the list is a sample spread over the sources. Packages that are
    not installed are left out.
    """
    groups: dict[str, list[Schema]] = defaultdict(list)
    seen: set[str] = set()
    for schema in chain(_documents(), _models()):
        known = _digest({k: v for k, v in schema.content.items() if k not in _TITLES})
        if known not in seen and schema.content.keys() & {*_COMPOSITE, "$ref"}:
            seen.add(known)
            groups[schema.source].append(schema)
    for members in groups.values():
        # A document as a whole comes first, then its parts in no particular order.
        members.sort(key=lambda s: (s.name != s.source, _digest(s.name)))
    turns = zip_longest(*(groups[source] for source in sorted(groups)))
    return [schema for turn in turns for schema in turn if schema is not None]


def counts(schemas: Iterable[Schema]) -> dict[str, int]:
    """How many schemas come from which package."""
    return dict(sorted(Counter(schema.package for schema in schemas).items()))


def versions() -> dict[str, str]:
    """Installed packages that the corpus is read from, and their versions."""
    found = {}
    for package in (*DOCUMENTS, *MODELS):
        try:
            found[package] = distribution(package).version
        except PackageNotFoundError:
            continue
    return found


def generated(count: int, seed: int = 0) -> list[Schema]:
    """Schemas of function calls as agents send them, from a seeded generator."""
    rng = random.Random(seed)
    return [
        Schema(f"{GENERATED}/{seed}/{index}", GENERATED, GENERATED, _call(rng))
        for index in range(count)
    ]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _documents() -> Iterator[Schema]:
    for package in versions():
        if package not in DOCUMENTS:
            continue
        files = distribution(package).files or []
        for path in sorted(files, key=str):
            if path.suffix != ".json":
                continue
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(content, dict):
                source = f"{package}/{path}"
                yield Schema(source, package, source, content)
                for pointer, part in _parts(content):
                    yield Schema(source + pointer, package, source, part)


def _parts(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The definitions of a document that can stand alone, and their JSON pointers."""
    definitions = {
        f"#/{key}/{_escape(name)}": (key, name, content)
        for key in _DEFINITIONS
        if isinstance(document.get(key), dict)
        for name, content in document[key].items()
        if isinstance(content, dict)
    }
    for pointer, (_, _, content) in definitions.items():
        if not content.keys() & _COMPOSITE or content.keys() & {*_DEFINITIONS, "$id"}:
            continue
        needed: dict[str, None] = {}
        open_references = list(_references(content))
        while open_references:
            # A reference may go on into the definition.
            reference = "/".join(open_references.pop().split("/")[:3])
            if reference in needed:
                continue
            needed[reference] = None
            if reference not in definitions:
                break
            open_references += _references(definitions[reference][2])
        if needed.keys() - definitions.keys():
            continue
        part = {"$schema": document["$schema"]} if "$schema" in document else {}
        part |= content
        for reference in sorted(needed):
            key, name, inner = definitions[reference]
            part.setdefault(key, {})[name] = inner
        yield pointer, part


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _references(node: Any) -> Iterator[str]:
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def _models() -> Iterator[Schema]:
    from pydantic import BaseModel
    from pydantic.errors import PydanticUserError

    installed = versions()
    for package, roots in MODELS.items():
        if package not in installed:
            continue
        for root in roots:
            models = {
                f"{model.__module__}.{model.__qualname__}": model
                for module in _modules(root)
                for _, model in inspect.getmembers(module, inspect.isclass)
                if issubclass(model, BaseModel)
                and f"{model.__module__}.".startswith(f"{root}.")
            }
            for name, model in sorted(models.items()):
                with warnings.catch_warnings():
                    # Defaults that are no JSON.
                    warnings.simplefilter("ignore")
                    try:
                        content = model.model_json_schema()
                    except PydanticUserError:
                        # A field that has no JSON form.
                        continue
                yield Schema(f"{package}/{name}", package, f"{package}/{root}", content)


def _modules(root: str) -> Iterator[Any]:
    module = importlib.import_module(root)
    yield module
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{root}."):
        # Needs a package that is not installed.
        try:
            yield importlib.import_module(found.name)
        except ImportError:
            continue


_VERBS = ("get", "create", "update", "delete", "search", "send", "book", "list")
_NOUNS = ("weather", "order", "ticket", "user", "invoice", "event", "route", "file")
_KEYS = (
    "id name city unit date start_time email limit tags status price quantity note "
    "filter address url países 価格 is-active"
).split()
_FORMATS = "date time date-time email uuid uri ipv4 ipv6 hostname duration".split()
_PATTERNS = (
    r"^[A-Z]{2,3}-\d{4}$",
    r"^\+?[0-9]{7,15}$",
    r"^(low|medium|high)$",
    r"^#[0-9a-fA-F]{6}$",
    r"^[a-z][a-z0-9_]*$",
    r"^v\d+\.\d+(\.\d+)?$",
)


def _call(rng: random.Random) -> dict[str, Any]:
    """A call of one function, or of one out of several."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": f"{rng.choice(_VERBS)}_{rng.choice(_NOUNS)}"},
                "parameters": _parameters(rng, 2),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for _ in range(rng.choice((1, 1, 2, 3)))
    ]
    content = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if "#/$defs/place" in json.dumps(content):
        content["$defs"] = {"place": _PLACE}
    return content


_PLACE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "lat": {"type": "number", "minimum": -90, "maximum": 90},
        "lon": {"type": "number", "minimum": -180, "maximum": 180},
        "parent": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
    },
    "required": ["name", "lat", "lon"],
    "additionalProperties": False,
}


def _parameters(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_KEYS, rng.randint(0, 5))
    content: dict[str, Any] = {
        "type": "object",
        "properties": {name: _parameter(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
    }
    if rng.random() < 0.7:
        content["additionalProperties"] = rng.choice((False, {"type": "string"}))
    return content


def _parameter(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    choices: list[dict[str, Any]] = [
        {"type": "string"},
        {"type": "string", "minLength": rng.randint(0, 3), "maxLength": low % 9 + 3},
        {"type": "string", "format": rng.choice(_FORMATS)},
        {"type": "string", "pattern": rng.choice(_PATTERNS)},
        {"type": "string", "enum": rng.sample(_NOUNS, rng.randint(1, 5))},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)},
        {"type": "number", "exclusiveMinimum": low},
        {"type": "boolean"},
        {"enum": [1, "auto", None, True, 2.5]},
        {"type": ["string", "null"]},
        {"$ref": "#/$defs/place"},
    ]
    if depth:
        least = rng.randint(0, 3)
        bounds = {"minItems": least, "maxItems": least + rng.randint(0, 3)}
        choices += [
            _parameters(rng, depth - 1),
            {"type": "array", "items": _parameter(rng, depth - 1), **bounds},
            {"anyOf": [_parameter(rng, depth - 1), {"type": "null"}]},
        ]
    return rng.choice(choices)


def main() -> int:
    schemas = corpus()
    width = max(map(len, versions()))
    for package, count in counts(schemas).items():
        sys.stdout.write(f"{package:{width}} {versions()[package]:>12} {count:6}\n")
    sys.stdout.write(f"{'all':{width}} {'':>12} {len(schemas):6}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
