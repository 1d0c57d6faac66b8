# SPDX-License-Identifier: Apache-2.0
"""From an admitted grammar to one that matches tokens.

A compiled grammar travels to the model's process as its source, not as
`CompiledGrammar.serialize_json`: xgrammar 0.2.8 writes the automaton of the whole
grammar once for every rule of it. For 24 nullable strings with a maxLength that is
136 MB of JSON, 5.5 s to write and 2.2 s to read back into as many copies, where
compiling takes 0.08 s (vocabulary of 512; with 150,000 tokens 184 MB, 5.0 s, 2.3 s and
8 s).
"""

import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import NamedTuple

import xgrammar

from vllm_unmask.grammar.closing import Closer
from vllm_unmask.grammar.spec import GrammarSpec, is_lark
from vllm_unmask.grammar.vocabulary import Vocabulary


class CompiledSpec(NamedTuple):
    """A grammar that is known to compile, and how its shortest known output ends."""

    spec: GrammarSpec
    closing: tuple[int, ...]
    """Tokens of a complete output, without a stop token."""
    num_bytes: int
    """Memory of the compiled grammar."""
    seconds: float
    """Time that compiling took, the search for `closing` included."""


def compile_spec(
    compiler: xgrammar.GrammarCompiler, spec: GrammarSpec
) -> xgrammar.CompiledGrammar:
    """Compile. Releases the GIL, may take long, and may crash on a hostile text.

    Raises:
        RuntimeError: xgrammar refuses the text.

    """
    if spec.kind in ("json_schema", "json_object"):
        return compiler.compile_json_schema(
            spec.text,
            any_whitespace=spec.whitespace > 0,
            separators=None if spec.whitespace else (",", ":"),
            max_whitespace_cnt=spec.whitespace or None,
        )
    if spec.kind == "regex":
        return compiler.compile_regex(spec.text)
    if spec.kind == "structural_tag":
        return compiler.compile_structural_tag(spec.text)
    if spec.kind == "ebnf" and is_lark(spec.text):
        return compiler.compile_lark(spec.text)
    return compiler.compile_grammar(spec.text)


class LoadedGrammar(NamedTuple):
    """What the requests of one grammar share."""

    compiled: xgrammar.CompiledGrammar
    closer: Closer
    vocabulary: Vocabulary
    """That of its kind, see `Vocabulary.of`."""


class GrammarLoader:
    """Compiles admitted grammars again, where the model runs; each of them once.

    Grammars are kept until newer ones fill `cache_bytes`. May be used from any
    thread.
    """

    def __init__(self, vocabulary: Vocabulary, cache_bytes: int = 256 << 20) -> None:
        self._vocabulary = vocabulary
        self._cache_bytes = cache_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._grammars: OrderedDict[GrammarSpec, Future[LoadedGrammar]] = OrderedDict()

    def find(self, spec: GrammarSpec) -> "Future[LoadedGrammar] | None":
        """The grammar if it is here or being compiled, without waiting for it."""
        with self._lock:
            if spec in self._grammars:
                self._grammars.move_to_end(spec)
            return self._grammars.get(spec)

    def load(self, spec: GrammarSpec) -> LoadedGrammar:
        """The grammar, ready for a matcher. Blocks while it compiles.

        Raises:
            RuntimeError: xgrammar refuses the text.
            ValueError: its outputs cannot be closed.

        """
        with self._lock:
            known = spec in self._grammars
            future = self._grammars.setdefault(spec, Future())
            self._grammars.move_to_end(spec)
        if known:
            return future.result()
        vocabulary = self._vocabulary.of(spec.kind)
        # One of its own: its cache shares masks between equal rules of a grammar,
        # but would keep every grammar a second time.
        compiler = xgrammar.GrammarCompiler(vocabulary.info, max_threads=1)
        try:
            grammar = compile_spec(compiler, spec)
            loaded = LoadedGrammar(grammar, Closer(grammar, vocabulary), vocabulary)
        except Exception as error:
            with self._lock:
                del self._grammars[spec]
            future.set_exception(error)
            raise
        with self._lock:
            future.set_result(loaded)
            self._num_bytes += grammar.memory_size_bytes
            self._evict()
        return loaded

    def _evict(self) -> None:
        """Drop the oldest grammars that are ready, except for the newest of them."""
        ready = [spec for spec, future in self._grammars.items() if future.done()]
        for spec in ready[:-1]:
            if self._num_bytes <= self._cache_bytes:
                break
            grammar = self._grammars.pop(spec).result().compiled
            self._num_bytes -= grammar.memory_size_bytes
