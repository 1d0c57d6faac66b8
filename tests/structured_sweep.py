# SPDX-License-Identifier: Apache-2.0
"""Structured outputs of many schemas through a real engine, and what checks them.

The checks share nothing with the engine but xgrammar: the grammar is compiled again
from the request's own schema, and a new matcher reads the output.
"""

import importlib.util
import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import unquote

import xgrammar
from checkpoints import sdar_config, wedlm_config, write_checkpoint
from engine_process import EngineProcess
from jsonschema.exceptions import ValidationError
from jsonschema.validators import validator_for

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DEMO = EXAMPLES / "demo_model"
VOCAB = 512
STOP_IDS = (1, 0)
CONTEXT = 1024
MODELS = ("demo", "random", "window")
THRESHOLDS = (0.5, 0.7, 0.9, 0.95)


class Outcome(NamedTuple):
    """What became of a request."""

    tokens: list[int] = []
    text: str = ""
    finish_reason: str | None = None
    refusal: str | None = None
    parameter: str | None = None


class Run(NamedTuple):
    """One request of the sweep."""

    schema: int
    threshold: float
    tight: bool
    temperature: float
    max_tokens: int


def load_corpus() -> ModuleType:
    """`examples/benchmarks/schema_corpus.py`, which is in no package."""
    path = EXAMPLES / "benchmarks" / "schema_corpus.py"
    spec = importlib.util.spec_from_file_location("schema_corpus", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its NamedTuple looks itself up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def engine(model: str, folder: Path) -> EngineProcess:
    """The demo model, or random weights behind the demo model's tokenizer.

    The latter with blocks of 8, or with a streaming window of 16.
    """
    path = DEMO / "sdar"
    if model != "demo":
        path = folder
        ids = {"vocab_size": VOCAB, "mask_token_id": 4, "eos_token_id": 1}
        config = wedlm_config(**ids)
        if model == "random":
            config = sdar_config(8, bos_token_id=None, **ids)
        write_checkpoint(path, config, seed=3)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO / "sdar" / file, path)
        shutil.copy(DEMO / "sdar" / "generation_config.json", path)
    return EngineProcess(
        model=str(path),
        skip_tokenizer_init=False,
        max_model_len=CONTEXT,
        max_num_seqs=16,
    )


def serve(
    llm: Any, requests: Sequence[tuple[str, dict[str, Any]]], seed: int
) -> list[Outcome]:
    """Beside the engine: outcomes of (JSON Schema, sampling parameters), in order."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    rng = random.Random(seed)
    lines = (DEMO / "held_out.jsonl").read_text().splitlines()
    messages = [json.loads(line)["prompt"] for line in lines]
    tokenizer = llm.get_tokenizer()
    outcomes: dict[str, Outcome] = {}

    def drain(unfinished: int) -> None:
        while llm.llm_engine.get_num_unfinished_requests() > unfinished:
            for output in llm.llm_engine.step():
                if output.finished:
                    answer = output.outputs[0]
                    outcomes[output.request_id] = Outcome(
                        list(answer.token_ids), answer.text, answer.finish_reason
                    )

    for index, (schema, params) in enumerate(requests):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": rng.choice(messages)}],
            add_generation_prompt=True,
            return_dict=False,
        )
        sampling = SamplingParams(
            structured_outputs=StructuredOutputsParams(json=schema), **params
        )
        try:
            llm.llm_engine.add_request(
                str(index), {"prompt_token_ids": prompt}, sampling
            )
        except VLLMValidationError as error:
            outcomes[str(index)] = Outcome(
                refusal=str(error), parameter=error.parameter
            )
        # As many as run at a time, so that the batch is never short of requests.
        drain(24)
    drain(0)
    return [outcomes[str(index)] for index in range(len(requests))]


class Sweep:
    """All runs of one engine over some schemas, and what came of them.

    Args:
        engine: see the function of that name.
        schemas: (name, JSON Schema) of each.
        seed: of budgets, prompts and sampling.
    """

    def __init__(
        self, engine: EngineProcess, schemas: Sequence[tuple[str, str]], seed: int
    ) -> None:
        self.schemas = schemas
        self.rng = random.Random(seed)
        self.engine = engine
        # Schema -> why it is not served; schema -> tokens of its shortest output.
        self.refused: dict[int, str] = {}
        self.closing: dict[int, int] = {}
        self.clear()
        self._admit()

    def clear(self) -> None:
        """Forget the outputs so far."""
        # Outputs that break a keyword which xgrammar relaxes, by keyword and reason.
        self.relaxed: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.failures: list[str] = []

    def _admit(self) -> None:
        """Ask for an output of one token: the refusal names how many it takes."""
        requests = [(text, {"max_tokens": 1}) for _, text in self.schemas]
        outcomes = self.engine.run(serve, requests, 0)
        for index, outcome in enumerate(outcomes):
            if outcome.refusal is None:
                self.closing[index] = 1
            elif outcome.parameter != "max_tokens":
                self.refused[index] = reason(outcome)
            else:
                needed = re.search(r"room for at least (\d+)", outcome.refusal)
                assert needed is not None, outcome.refusal
                if int(needed[1]) > CONTEXT // 2:
                    self.refused[index] = f"takes more than {CONTEXT // 2} tokens"
                else:
                    self.closing[index] = int(needed[1])

    def runs(
        self, thresholds: Sequence[float], temperatures: Sequence[float] = (0.0, 1.0)
    ) -> Iterator[Run]:
        """Every combination of what is served.

        A tight budget is the length of the shortest output, up to 30 % more.
        """
        for index, closing in self.closing.items():
            for threshold in thresholds:
                for tight in (False, True):
                    for temperature in temperatures:
                        high = closing * 13 // 10
                        budget = self.rng.randint(closing, high)
                        if not tight:
                            budget = 2 * closing + 64
                        yield Run(index, threshold, tight, temperature, budget)

    def run(self, runs: Sequence[Run]) -> None:
        """Serve and check."""
        requests = [
            (
                self.schemas[run.schema][1],
                {
                    "max_tokens": run.max_tokens,
                    "temperature": run.temperature,
                    "seed": self.rng.randrange(1 << 30),
                    "extra_args": {"unmask_threshold": run.threshold},
                },
            )
            for run in runs
        ]
        outcomes = self.engine.run(serve, requests, self.rng.randrange(1 << 30))
        checker, schema = None, None
        for run, outcome in zip(runs, outcomes, strict=True):
            if checker is None or schema != run.schema:
                schema = run.schema
                checker = Checker(self.schemas[schema][1])
            self.finished[f"{outcome.finish_reason}"] += 1
            name = self.schemas[run.schema][0]
            self.failures += [
                f"{name} {run}: {problem} {outcome}"
                for problem in checker.problems(outcome, run.max_tokens)
            ]
            self.relaxed.update(checker.relaxed)

    def summary(self) -> str:
        """Counts, as text."""
        refused = Counter(self.refused.values()).most_common()
        lines = [
            f"{len(self.closing)} schemas served, {len(self.refused)} refused",
            *(f"  refused: {n:5} {why}" for why, n in refused),
            f"{self.finished.total()} outputs: {dict(self.finished)}",
            *(f"  relaxed: {n:5} {why}" for why, n in self.relaxed.most_common()),
            f"{len(self.failures)} failures",
        ]
        return "\n".join(lines)


def reason(outcome: Outcome) -> str:
    """The kind of a refusal: its keyword, or its limit without the numbers."""
    _, _, keyword = str(outcome.parameter).partition(": ")
    if keyword:
        return keyword
    found = re.search(_REASONS, str(outcome.refusal))
    assert found is not None, outcome
    return re.sub(r"\d+", "N", found[0]).strip()


_REASONS = (
    r"has \d+ bytes|nests objects|cannot be compiled: [^:]*|takes more than|"
    r"crashes its compiler|cannot be closed[^:]*|compiles to"
)


class Checker:
    """What an output of a schema must be.

    Args:
        text: the schema, JSON.
    """

    def __init__(self, text: str) -> None:
        self.schema = json.loads(text)
        self.validator = validator_for(self.schema)(self.schema)
        self.compiled = _compiler().compile_json_schema(
            text, any_whitespace=True, max_whitespace_cnt=1
        )
        # Keywords that the last output broke and may break, and why it may.
        self.relaxed: set[str] = set()

    def problems(self, outcome: Outcome, max_tokens: int) -> list[str]:
        """What is wrong with an output."""
        self.relaxed = set()
        return list(self._problems(outcome, max_tokens))

    def _problems(self, outcome: Outcome, max_tokens: int) -> Iterator[str]:
        if outcome.refusal is not None:
            yield f"refused: {outcome.refusal}"
            return
        if outcome.finish_reason not in ("stop", "length"):
            yield f"finish reason {outcome.finish_reason}"
        if not 0 < len(outcome.tokens) <= max_tokens:
            yield "empty, or more than max_tokens"
        matcher = xgrammar.GrammarMatcher(self.compiled)
        if not all(matcher.accept_token(token) for token in outcome.tokens):
            yield "a token is not legal"
        elif not matcher.is_completed() and not matcher.is_terminated():
            yield "incomplete"
        elif (outcome.finish_reason == "stop") != matcher.is_terminated():
            yield "the finish reason is not how it ended"
        matcher = xgrammar.GrammarMatcher(self.compiled)
        if not matcher.accept_string(outcome.text) or not matcher.is_completed():
            yield "the text is not what the tokens were"
        try:
            value = json.loads(outcome.text)
        except ValueError as error:
            yield f"no JSON: {error}"
            return
        for error in self.validator.iter_errors(value):
            for leaf, why in self._broken(error):
                if why is None:
                    where = "/".join(map(str, leaf.absolute_schema_path))
                    yield f"schema at {where}: {leaf.message[:200]}"
                else:
                    self.relaxed.add(f"{leaf.validator}: {why}")

    def _broken(
        self, error: ValidationError
    ) -> list[tuple[ValidationError, str | None]]:
        """Keywords that an instance breaks, each with the reason why it may.

        Of alternatives, those of the one that it is nearest to.
        """
        why = relaxation(error, list(self._path(error)))
        if why is None and error.context:
            branches: dict[Any, list[tuple[ValidationError, str | None]]] = {}
            for inner in error.context:
                broken = self._broken(inner)
                branches.setdefault(inner.schema_path[0], []).extend(broken)
            return min(
                branches.values(),
                key=lambda found: (sum(why is None for _, why in found), len(found)),
            )
        return [(error, why)]

    def _path(self, error: ValidationError) -> Iterator[tuple[Any, str]]:
        """Every schema from the root to the error's, and the keyword taken there."""
        node = self.schema
        legacy = "/draft-0" in self.schema.get("$schema", "")
        is_schema = True
        for step in error.absolute_schema_path:
            # jsonschema leaves references out of its paths.
            while (
                is_schema
                and isinstance(node, dict)
                and "$ref" in node
                and (legacy or step not in node)
            ):
                yield node, "$ref"
                node = self._resolve(node["$ref"])
            if is_schema and isinstance(node, dict):
                yield node, str(step)
            node = node[step]
            # Below these come names or positions, then schemas again.
            is_schema = not is_schema or step not in _CONTAINERS

    def _resolve(self, reference: str) -> Any:
        node = self.schema
        for name in filter(None, unquote(reference).lstrip("#").split("/")):
            name = name.replace("~1", "/").replace("~0", "~")
            node = node[int(name)] if isinstance(node, list) else node[name]
        return node


_CONTAINERS = (
    "properties patternProperties dependentSchemas dependencies $defs definitions "
    "anyOf oneOf allOf prefixItems"
).split()
# Of a schema with several of these xgrammar reads the first, and nothing else.
_EXCLUSIVE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
_UNREAD = frozenset(
    "not if then else dependencies dependentRequired dependentSchemas".split()
)
# A schema with none of these is any value to xgrammar.
_TYPED = frozenset((*_EXCLUSIVE, "type", "properties", "additionalProperties", "items"))


def relaxation(error: ValidationError, path: list[tuple[Any, str]]) -> str | None:
    """Why xgrammar 0.2.8 lets an output break a keyword, None if it must not.

    Each of these is what vLLM's own xgrammar backend does too.

    Args:
        error: what `jsonschema` found.
        path: schemas from the root to the one that holds the keyword, and the
            keyword taken in each.
    """
    for schema, keyword in path:
        if keyword in _UNREAD:
            return f"{keyword} is not read"
        first = next((key for key in _EXCLUSIVE if key in schema), keyword)
        if keyword != first:
            return f"what stands beside {first} is not read"
        if not schema.keys() & _TYPED:
            return "without a type it is not read"
    schema, keyword = path[-1]
    if keyword == "oneOf" and not error.context:
        return "alternatives that are not seen to exclude each other are anyOf"
    if keyword == "pattern" and "format" in schema:
        return "beside format it is not read"
    if keyword == "required":
        missing = next(n for n in schema[keyword] if error.message.startswith(repr(n)))
        if missing not in schema.get("properties", {}):
            return "names of no property are not read"
    return None


def _compiler() -> xgrammar.GrammarCompiler:
    from transformers import AutoTokenizer

    global _COMPILER
    if _COMPILER is None:
        info = xgrammar.TokenizerInfo.from_huggingface(
            AutoTokenizer.from_pretrained(DEMO / "sdar"),
            vocab_size=VOCAB,
            stop_token_ids=list(STOP_IDS),
        )
        _COMPILER = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    return _COMPILER


_COMPILER: xgrammar.GrammarCompiler | None = None
