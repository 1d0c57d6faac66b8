# SPDX-License-Identifier: Apache-2.0
"""Compiling under limits: what hangs, crashes or floods harms nobody else."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xgrammar

from vllm_unmask.grammar import compile_worker, loading
from vllm_unmask.grammar.compilation import GrammarCompilers
from vllm_unmask.grammar.loading import CompiledSpec, GrammarLoader
from vllm_unmask.grammar.spec import GrammarError, GrammarLimits, GrammarSpec, admit
from vllm_unmask.grammar.state import GrammarState
from vllm_unmask.grammar.vocabulary import Vocabulary

MASK, END = 256, 257
VOCABULARY = Vocabulary.from_tokens(
    [bytes([i]) for i in range(256)] + [b"<m>", b"", b'{"a":', b"true"], MASK, (END,)
)
LIMITS = GrammarLimits(
    compile_seconds=3.0, compile_memory=512 << 20, waiting=1, closing_tokens=500
)
FLAG = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


def slow(number: int = 0) -> GrammarSpec:
    """A grammar that takes far longer than it may."""
    return admit("json", {"enum": [f"value {i}" for i in range(number, 17_000)]})


def text(tokens: tuple[int, ...]) -> bytes:
    return b"".join(VOCABULARY.tokens[token] for token in tokens)


def message(compilers: GrammarCompilers, spec: GrammarSpec) -> str:
    error = compilers.submit(spec).exception(timeout=60)
    assert isinstance(error, GrammarError), error
    assert error.parameter == spec.parameter and error.value == spec.text
    assert str(error).startswith(f"{spec.parameter}=")
    return str(error)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def wait_for(condition: object, seconds: float = 30.0) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def worker(compilers: GrammarCompilers) -> int:
    """Process id of the process that forks compilations."""
    process = compilers._worker._process
    assert process is not None
    return process.pid


@pytest.fixture(scope="module")
def compilers() -> Iterator[GrammarCompilers]:
    """Shared by tests that leave it as it was."""
    compilers = GrammarCompilers(VOCABULARY, LIMITS)
    yield compilers
    compilers.close()


def beside(compilers: GrammarCompilers, **limits: float) -> GrammarCompilers:
    """Compilers of other limits that share a process, which takes long to start."""
    other = GrammarCompilers(VOCABULARY, LIMITS._replace(**limits), processes=1)
    other._worker = compilers._worker
    return other


# What compiles


def test_a_compiled_grammar_carries_its_shortest_output(
    compilers: GrammarCompilers,
) -> None:
    compiled = compilers.submit(admit("json", FLAG)).result(60)
    assert text(compiled.closing) in (b'{"a":true}', b'{"a":null}')
    assert compiled.num_bytes > 0 and 0 < compiled.seconds < 60


@pytest.mark.parametrize(
    ("field", "value", "shortest"),
    [
        ("regex", r"\d{2}-[ab]", 4),
        ("choice", ["yes", "no"], 2),
        ("grammar", 'root ::= "(" root ")" | "xyz"', 3),
        ("grammar", 'start: "ab"', 2),
        ("json_object", True, 2),
        ("structural_tag", '{"type":"structural_tag","format":{"type":"any_text"}}', 0),
    ],
)
def test_every_kind_compiles(
    compilers: GrammarCompilers, field: str, value: object, shortest: int
) -> None:
    compiled = compilers.submit(admit(field, value)).result(60)
    assert len(text(compiled.closing)) == shortest


def test_it_can_be_awaited(compilers: GrammarCompilers) -> None:
    async def both() -> list[CompiledSpec]:
        specs = [admit("regex", "await a"), admit("regex", "await b")]
        futures = [asyncio.wrap_future(compilers.submit(spec)) for spec in specs]
        return await asyncio.gather(*futures)

    assert [text(c.closing) for c in asyncio.run(both())] == [b"await a", b"await b"]


# What is refused


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("json", {"type": "nope"}, 'cannot be compiled: Unsupported type "nope"'),
        ("json", {"$ref": "#/nope"}, "Cannot find field nope"),
        ("json", {"type": "integer", "minimum": 2, "maximum": 1}, "Invalid range"),
        ("json", "false", "cannot accept any value"),
        ("json", {"$ref": "#"}, "cannot be closed by any tokens"),
        ("regex", "(", "cannot be compiled: Regex parsing error at position 2"),
        ("regex", "(?=a)b", "Lookahead is not supported"),
        ("regex", r"[^\s\S]", "cannot be closed by any tokens"),
        ("regex", "a{501}", "cannot be closed within 500 tokens"),
        ("grammar", "root ::= x", 'Rule "x" is not defined'),
        ("grammar", "rule: x", "no start rule found"),
        ("grammar", "root ::= root", "cannot be closed by any tokens"),
        ("grammar", f"root ::= Token({MASK})", "cannot be closed"),
        ("structural_tag", '{"type":"structural_tag"}', "must have a format field"),
        ("regex", "(" * 10_000 + ")" * 10_000, "Nest layer exceeded"),
        ("grammar", "root ::= " + "(" * 10_000 + '"a"', "Nest layer exceeded"),
    ],
)
def test_refusals(
    compilers: GrammarCompilers, field: str, value: object, says: str
) -> None:
    found = message(compilers, admit(field, value))
    assert says in found and "expected" in found
    assert "/project/" not in found and len(found) < 800


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("regex", "(a{1,1000}){1,1000}"),
        ("regex", "(((a{1,999}b?){1,999}c?){1,999}d?){1,999}"),
        ("regex", "(a+)+b"),
        ("grammar", 'root ::= root "a" | "b"'),
        ("json", {"type": "string", "maxLength": 10**6}),
        ("json", {"type": "array", "items": {"type": "null"}, "maxItems": 10**9}),
    ],
)
def test_what_only_looks_hostile_compiles(
    compilers: GrammarCompilers, field: str, value: object
) -> None:
    assert compilers.submit(admit(field, value)).result(60).seconds < 3


def test_circles_of_references_end(compilers: GrammarCompilers) -> None:
    circle = {f"a{i}": {"$ref": f"#/$defs/a{(i + 1) % 900}"} for i in range(900)}
    spec = admit("json", {"$defs": circle, "$ref": "#/$defs/a0"})
    assert "cannot be closed" in message(compilers, spec)


def test_memory() -> None:
    tight = LIMITS._replace(compile_memory=32 << 20, compiled_bytes=100)
    compilers = GrammarCompilers(VOCABULARY, tight)
    try:
        found = message(compilers, admit("json", FLAG))
        assert "bytes: expected at most 100" in found
        schema = {"type": "array", "items": {"type": "string"}, "minItems": 10**6}
        found = message(compilers, admit("json", schema))
        assert "takes more than 33554432 bytes to compile" in found
    finally:
        compilers.close()


# What goes wrong harms nobody else


def test_a_hang_is_killed_and_others_are_served_meanwhile(
    compilers: GrammarCompilers,
) -> None:
    hanging = compilers.submit(slow())
    started = time.monotonic()
    for i in range(3):
        compilers.submit(admit("regex", f"quick {i}")).result(60)
    assert not hanging.done(), "quick ones waited for the slow one"
    error = hanging.exception(60)
    assert "takes more than 3.0 seconds to compile" in str(error)
    assert 2.0 < time.monotonic() - started < 20
    wait_for(lambda: not children(worker(compilers)))


def test_a_refusal_is_remembered(compilers: GrammarCompilers) -> None:
    first = message(compilers, slow(1))
    started = time.monotonic()
    assert message(compilers, slow(1)) == first
    assert time.monotonic() - started < 0.1


def test_a_refusal_is_forgotten_in_time(compilers: GrammarCompilers) -> None:
    forgetful = beside(compilers, refusal_seconds=0.0)
    message(forgetful, admit("regex", "("))
    assert not forgetful.submit(admit("regex", "(")).done()


def test_a_crash_is_the_refusal_of_that_grammar(compilers: GrammarCompilers) -> None:
    pid = worker(compilers)
    wait_for(lambda: not children(pid))
    crashing = compilers.submit(slow(2))
    wait_for(lambda: children(pid))
    time.sleep(0.3)  # a process that died before it began is only replaced
    os.kill(children(pid)[0], signal.SIGSEGV)
    assert "crashes its compiler" in str(crashing.exception(60))
    compilers.submit(admit("regex", "after the crash")).result(60)
    assert worker(compilers) == pid


def test_a_worker_that_is_gone_is_started_again(compilers: GrammarCompilers) -> None:
    pid = worker(compilers)
    os.kill(pid, signal.SIGKILL)
    compilers.submit(admit("regex", "after the kill")).result(60)
    assert worker(compilers) != pid


def test_a_worker_that_cannot_start_fails_the_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = (sys.executable, "-c", "raise SystemExit(3)")
    monkeypatch.setattr("vllm_unmask.grammar.compilation._WORKER", command)
    compilers = GrammarCompilers(VOCABULARY, LIMITS, processes=1)
    try:
        with pytest.raises(RuntimeError, match="no grammar can be compiled"):
            compilers.submit(admit("regex", "a")).result(60)
    finally:
        compilers.close()


# Queue and cache


def test_equal_grammars_compile_once(compilers: GrammarCompilers) -> None:
    spec = admit("regex", "once")
    with ThreadPoolExecutor(8) as threads:
        futures = list(threads.map(compilers.submit, [spec] * 50))
    results = {id(future.result(60)) for future in futures}
    assert len(results) == 1
    assert compilers.submit(spec).result(0).spec == spec


def test_one_who_gives_up_takes_nothing_from_others(
    compilers: GrammarCompilers,
) -> None:
    spec = admit("regex", "given up")
    assert not compilers.submit(spec).cancel()
    assert text(compilers.submit(spec).result(60).closing) == b"given up"


def test_the_queue_is_bounded(compilers: GrammarCompilers) -> None:
    waiting = [compilers.submit(slow(i)) for i in range(10, 13)]
    found = message(compilers, slow(16))
    assert "too many grammars before it: expected at most 1 that wait" in found
    assert not any(future.done() for future in waiting)
    errors = [str(future.exception(60)) for future in waiting]
    assert all("takes more than" in error for error in errors)
    # It was not its fault, so it is tried when there is room.
    assert "takes more than" in message(compilers, slow(16))


def test_the_cache_is_bounded_and_keeps_what_is_used(
    compilers: GrammarCompilers,
) -> None:
    small = beside(compilers, cache_bytes=5000)
    kept = admit("regex", "kept")
    first = small.submit(kept).result(60)
    for i in range(8):
        latest = small.submit(admit("regex", f"number {i}")).result(60)
        assert small.submit(kept).result(60) is first
        assert small._cache.num_bytes <= 5000
    assert len(small._cache._results) == 4
    assert small.submit(latest.spec).result(60) is latest
    assert not small.submit(admit("regex", "number 0")).done()


# Shutdown


def test_closing_leaves_no_process_and_no_waiter() -> None:
    compilers = GrammarCompilers(VOCABULARY, LIMITS._replace(compile_seconds=600.0))
    compilers.submit(admit("regex", "a")).result(60)
    pid = worker(compilers)
    hanging = [compilers.submit(slow(i)) for i in range(3)]
    wait_for(lambda: len(children(pid)) == 2)
    processes = [pid, *children(pid)]
    started = time.monotonic()
    compilers.close()
    assert time.monotonic() - started < 5
    assert all(isinstance(f.exception(0), RuntimeError) for f in hanging)
    wait_for(lambda: not any(map(is_alive, processes)), 5)
    with pytest.raises(RuntimeError, match="closed"):
        compilers.submit(admit("regex", "b"))
    compilers.close()


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that nobody waits for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_nothing_is_started_that_is_not_used() -> None:
    compilers = GrammarCompilers(VOCABULARY, LIMITS)
    before = threading.active_count()
    compilers.close()
    assert compilers._worker._process is None
    assert threading.active_count() == before


def test_the_worker_ends_with_its_parent() -> None:
    code = (
        "import os, signal, sys\n"
        "from vllm_unmask.grammar.compilation import GrammarCompilers\n"
        "from vllm_unmask.grammar.spec import admit\n"
        "from vllm_unmask.grammar.vocabulary import Vocabulary\n"
        "tokens = [bytes([i]) for i in range(256)] + [b'', b'']\n"
        "compilers = GrammarCompilers(Vocabulary.from_tokens(tokens, 256, (257,)))\n"
        "compilers.submit(admit('regex', 'a')).result(60)\n"
        "sys.stdout.write(str(compilers._worker._process.pid))\n"
        "sys.stdout.flush()\n"
        "if sys.argv[1] == 'kill':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parents = [
        subprocess.Popen([sys.executable, "-c", code, end], stdout=subprocess.PIPE)
        for end in ("exit", "kill")
    ]
    outputs = [parent.communicate(timeout=120)[0] for parent in parents]
    assert [parent.returncode for parent in parents] == [0, -signal.SIGKILL]
    wait_for(lambda: not any(is_alive(int(output)) for output in outputs), 10)


# Where the model runs


def test_a_loaded_grammar_matches() -> None:
    loaded = GrammarLoader(VOCABULARY).load(admit("regex", "ab"))
    matcher = xgrammar.GrammarMatcher(loaded.compiled)
    assert matcher.accept_string("ab") and matcher.is_completed()
    closing = loaded.closer.witness(loaded.closer.start())
    assert closing is not None and text(closing) == b"ab"


def test_a_grammar_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile_slowly(
        compiler: xgrammar.GrammarCompiler, spec: GrammarSpec
    ) -> xgrammar.CompiledGrammar:
        calls.append(spec)
        time.sleep(0.05)
        return compiler.compile_regex(spec.text)

    monkeypatch.setattr(loading, "compile_spec", compile_slowly)
    loader = GrammarLoader(VOCABULARY)
    with ThreadPoolExecutor(8) as threads:
        grammars = list(threads.map(loader.load, [admit("regex", "a")] * 20))
    assert len(calls) == 1 and len({id(grammar) for grammar in grammars}) == 1


def test_a_grammar_that_is_here_is_found_without_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()

    def compile_when_told(
        compiler: xgrammar.GrammarCompiler, spec: GrammarSpec
    ) -> xgrammar.CompiledGrammar:
        assert release.wait(60)
        return compiler.compile_regex(spec.text)

    monkeypatch.setattr(loading, "compile_spec", compile_when_told)
    loader = GrammarLoader(VOCABULARY)
    spec = admit("regex", "a")
    assert loader.find(spec) is None
    with ThreadPoolExecutor(1) as threads:
        loaded = threads.submit(loader.load, spec)
        wait_for(lambda: loader.find(spec) is not None)
        found = loader.find(admit("regex", "a"))
        assert found is not None and not found.done()
        release.set()
        assert found.result(60) is loaded.result(60)
    assert loader.find(spec) is found


def test_a_grammar_that_was_found_is_dropped_last() -> None:
    first, second, third = (admit("regex", text) for text in ("abc", "abd", "abe"))
    size = GrammarLoader(VOCABULARY).load(first).compiled.memory_size_bytes
    loader = GrammarLoader(VOCABULARY, cache_bytes=2 * size)
    loader.load(first)
    loader.load(second)
    assert loader.find(first) is not None
    loader.load(third)
    assert loader.find(first) is not None and loader.find(second) is None


def test_loaded_grammars_are_bounded_and_the_newest_is_kept() -> None:
    size = GrammarLoader(VOCABULARY).load(admit("regex", "abc")).compiled
    loader = GrammarLoader(VOCABULARY, cache_bytes=2 * size.memory_size_bytes)
    first = loader.load(admit("regex", "abc"))
    for pattern in ("abd", "abe"):
        loader.load(admit("regex", pattern))
    assert len(loader._grammars) == 2
    assert loader._num_bytes <= 2 * size.memory_size_bytes
    again = loader.load(admit("regex", "abc"))
    assert again is not first
    small = GrammarLoader(VOCABULARY, cache_bytes=1)
    kept = small.load(admit("regex", "abc"))
    assert small.load(admit("regex", "abc")) is kept


def test_what_cannot_be_loaded_can_be_tried_again() -> None:
    loader = GrammarLoader(VOCABULARY)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not closed"):
            loader.load(admit("regex", "("))
    assert not loader._grammars


def test_json_has_no_control_characters() -> None:
    """xgrammar allows them in strings that have a length."""
    schema = '{"type":"string","minLength":2,"maxLength":9}'
    spec = GrammarSpec("json_schema", schema)
    vocabulary = VOCABULARY.of(spec.kind)
    assert (
        vocabulary is VOCABULARY.of(spec.kind) and VOCABULARY.of("regex") is VOCABULARY
    )
    grammar = GrammarLoader(VOCABULARY).load(spec)
    assert grammar.vocabulary is vocabulary
    assert grammar.closer.spells_bytes
    quote = int(VOCABULARY.byte_ids[ord('"')])
    plain = GrammarLoader(VOCABULARY).load(GrammarSpec("regex", "[^b]{2,9}"))
    state = GrammarState(
        grammar.compiled, vocabulary, grammar.closer, max_tokens=20, verified=[quote]
    )
    wild = GrammarState(plain.compiled, plain.vocabulary, plain.closer, max_tokens=20)
    control = [i for i, text in enumerate(VOCABULARY.tokens) if text and min(text) < 32]
    assert control
    for one, expected in ((state, 0), (wild, 1)):
        row = np.zeros(-(-VOCABULARY.vocab_size // 32), np.int32)
        one.frontier_mask(row)
        assert max((int(row[i // 32]) >> i % 32) & 1 for i in control) == expected


def test_a_refusal_never_lacks_its_reason() -> None:
    where = "[12:00:00] /project/cpp/compiler.cc:83: "
    check = where + "Check failed: (a == b) is false: "
    assert compile_worker._message(RuntimeError(where + "odd regex")) == "odd regex"
    assert compile_worker._message(RuntimeError(check + "not equal")) == "not equal"
    assert "(a == b)" in compile_worker._message(RuntimeError(check))
