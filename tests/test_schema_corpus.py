# SPDX-License-Identifier: Apache-2.0
"""The corpus of schemas: real ones from packages, and generated ones."""

import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
from jsonschema.validators import validator_for
from structured_sweep import EXAMPLES, load_corpus


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    return load_corpus()


@pytest.fixture(scope="module")
def schemas(corpus: ModuleType) -> list[Any]:
    pytest.importorskip("check_jsonschema")
    return corpus.corpus()


def test_there_are_hundreds_of_schemas_from_several_packages(corpus, schemas):
    counts = corpus.counts(schemas)
    assert sum(counts.values()) == len(schemas) >= 600
    assert counts.keys() <= corpus.versions().keys()
    assert counts["check-jsonschema"] >= 300
    assert counts["mcp-types"] >= 200


@pytest.mark.parametrize(
    "name", ["github-workflows", "gitlab-ci", "compose-spec", "azure-pipelines"]
)
def test_workflows_compose_and_ci_are_there_whole(schemas, name):
    assert any(schema.name.endswith(f"/{name}.json") for schema in schemas)


def test_names_and_contents_are_unique(schemas):
    assert len({schema.name for schema in schemas}) == len(schemas)
    assert len({schema.text for schema in schemas}) == len(schemas)


def test_any_beginning_is_spread_over_the_sources(schemas):
    sources = {schema.source for schema in schemas}
    assert {schema.source for schema in schemas[: len(sources)]} == sources


def test_every_part_has_the_definitions_that_it_needs(corpus, schemas):
    parts = [schema for schema in schemas if "#/" in schema.name]
    assert len(parts) >= 300
    for part in parts:
        for reference in corpus._references(part.content):
            _, key, name, *_ = reference.split("/")
            name = name.replace("~1", "/").replace("~0", "~")
            assert name in part.content[key], (part.name, reference)


def test_parts_of_a_document(corpus):
    leaf = {"type": "string"}
    tree = {"type": "array", "items": {"$ref": "#/definitions/tree"}}
    deep = {"properties": {"x": {"$ref": "#/definitions/a~1b/properties/y"}}}
    slash = {"properties": {"y": {"$ref": "#/definitions/leaf"}}}
    document = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "properties": {"z": {}},
        "definitions": {
            "leaf": leaf,
            "tree": tree,
            "deep": deep,
            "a/b": slash,
            "outside": {"properties": {"x": {"$ref": "#/properties/z"}}},
            "remote": {"items": {"$ref": "https://example.org/schema.json"}},
            "alias": {"$ref": "#/definitions/tree"},
            "flag": True,
        },
    }
    parts = dict(corpus._parts(document))
    assert parts.keys() == {
        "#/definitions/tree",
        "#/definitions/deep",
        "#/definitions/a~1b",
    }
    dialect = {"$schema": document["$schema"]}
    assert parts["#/definitions/tree"] == dialect | tree | {
        "definitions": {"tree": tree}
    }
    needed = {"a/b": slash, "leaf": leaf}
    assert parts["#/definitions/deep"] == dialect | deep | {"definitions": needed}


def test_generated_schemas_are_seeded_and_sound(corpus):
    made = corpus.generated(200, seed=5)
    assert made == corpus.generated(200, seed=5)
    assert made[:50] == corpus.generated(50, seed=5)
    assert made != corpus.generated(200, seed=6)
    for schema in made:
        validator_for(schema.content).check_schema(schema.content)
    text = "".join(schema.text for schema in made)
    for keyword in ("enum", "pattern", "format", "minItems", "$ref", "anyOf", "const"):
        assert f'"{keyword}"' in text


def test_the_order_does_not_depend_on_hashes():
    code = (
        "import schema_corpus as c; c.MODELS.clear()\n"
        "print([s.name for s in c.corpus() + c.generated(9)], c.generated(9)[8].text)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=EXAMPLES / "benchmarks",
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    (names,) = outputs
    assert len(json.loads(names.partition("]")[0].replace("'", '"') + "]")) > 300
