# SPDX-License-Identifier: Apache-2.0
"""Witnesses: tokens that complete an output.

A witness spells the fewest bytes that complete the output, in the longest tokens
that fit. So its length in tokens is at most `Parse.distance`, and often a third of
it; another text may be longer in bytes and yet shorter in tokens.
"""

from functools import lru_cache

import xgrammar

from vllm_unmask.grammar.network import UNREACHABLE
from vllm_unmask.grammar.parsing import Parse, Parser
from vllm_unmask.grammar.vocabulary import Vocabulary


class Closer(Parser):
    """Parses and witnesses of one compiled grammar, for the requests that use it.

    Not to be used by two threads at a time.

    Args:
        compiled: the grammar.
        vocabulary: bytes of the tokens.

    Raises:
        Unsupported: the grammar has elements that are no bytes, or is too large.

    """

    def __init__(
        self, compiled: xgrammar.CompiledGrammar, vocabulary: Vocabulary
    ) -> None:
        super().__init__(compiled.grammar)
        self._ids, self._longest = _spelling(vocabulary)
        # Every completion can be spelled, in at most as many tokens as bytes.
        needed = sorted(self.shortest_bytes)
        self.spells_bytes = bool((vocabulary.byte_ids[needed] >= 0).all())

    def witness(self, parse: Parse) -> tuple[int, ...] | None:
        """Tokens that complete an output, None if no tokens spell such a text."""
        if parse.witness is None and parse.distance < UNREACHABLE:
            parse.witness = self._spell(self.shortest(parse))
        return parse.witness

    def _spell(self, text: bytes) -> tuple[int, ...] | None:
        """The longest token, again and again; None where no token fits."""
        tokens = []
        start = 0
        while start < len(text):
            longest = self._longest.get(text[start : start + 2], 1)
            stop = min(start + longest, len(text))
            while (token := self._ids.get(text[start:stop])) is None:
                stop -= 1
                if stop == start:
                    return None
            tokens.append(token)
            start = stop
        return tuple(tokens)


@lru_cache(maxsize=4)
def _spelling(vocabulary: Vocabulary) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """Smallest id of every text; length of the longest one by its first two bytes."""
    ids: dict[bytes, int] = {}
    longest: dict[bytes, int] = {}
    for token, text in enumerate(vocabulary.tokens):
        if text:
            ids.setdefault(text, token)
            longest[text[:2]] = max(longest.get(text[:2], 1), len(text))
    return ids, longest
