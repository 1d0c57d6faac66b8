# SPDX-License-Identifier: Apache-2.0
"""One request's grammar on a canvas: frontier-exact, verify-ahead, budget-guarded.

The *frontier* is the leftmost output column that is not verified; the matcher
stands there and never moves over a mask. Only the frontier's logits are masked by
the grammar. Columns right of it are *tentative*: unmasked by the ordinary rule,
shown to the model, and verified or masked again when the frontier arrives.

The guard makes every output end in time. A token is legal only if what is left of
the budget still holds a *witness*, tokens that complete the output after it. With
no token to spare the witness itself is written. All of this depends on the
verified tokens alone, so replaying them restores the state, in mid-closure too.
"""

import enum
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xgrammar

from vllm_unmask.grammar.closing import Closer
from vllm_unmask.grammar.parsing import Parse
from vllm_unmask.grammar.vocabulary import Vocabulary

# Half of a surrogate pair, and what lies beyond Unicode: bytes that xgrammar takes for
# a character, and that decode to replacement characters.
_NO_CHARACTER = re.compile(rb"\xed[\xa0-\xbf]|\xf4[\x90-\xbf]")


class Status(enum.IntEnum):
    """Whether an output goes on, and who ended it."""

    RUNNING = 0
    STOPPED = 1  # by a stop token, where the grammar is complete
    CLOSED = 2  # by the guard: complete and valid, for want of budget or of tokens


class StepResult(NamedTuple):
    """A block after one denoising step."""

    block: list[int]  # [W], the mask id where masked
    num_verified: int  # output tokens verified so far
    num_forced: int  # columns that the guard wrote
    remasked: bool  # a tentative column did not verify and is masked again
    looked_ahead: bool  # the frontier took a token for the sake of those right of it


class GrammarState:
    """The verified frontier of one request.

    Args:
        compiled: the grammar, compiled for `vocabulary.info`.
        vocabulary: bytes of the tokens, mask and stop ids.
        closer: finds the witnesses of `compiled`. None switches the guard off:
            `max_tokens` may then cut an output off.
        max_tokens: output tokens that the request may have.
        stop_ids: tokens that may end this request, by default the vocabulary's.
            One with bytes is text to the grammar, and ignored here.
        verified: output tokens of before a preemption, to go on from.

    Raises:
        ValueError: no complete output fits into `max_tokens`, or `verified` is not
            the beginning of one.

    """

    def __init__(
        self,
        compiled: xgrammar.CompiledGrammar,
        vocabulary: Vocabulary,
        closer: Closer | None,
        *,
        max_tokens: int,
        stop_ids: Sequence[int] | None = None,
        verified: Sequence[int] = (),
    ) -> None:
        self.max_tokens = max_tokens
        self.num_verified = 0
        self.status = Status.RUNNING
        self._tokens = vocabulary.tokens
        self._mask_id = vocabulary.mask_id
        stops = vocabulary.stop_ids if stop_ids is None else stop_ids
        self._stop_ids = [token for token in stops if not self._tokens[token]]
        self._known_stop_ids = vocabulary.stop_ids
        # What fills a block after the end of its output.
        self._filler = (*self._stop_ids, *vocabulary.stop_ids)[0]
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._closer = closer
        # None once the network cannot follow; the witness then holds to the end.
        self._parse: Parse | None = closer.start() if closer else None
        # Completes the output from the frontier. None while its length in bytes
        # proves that one fits, so that it need not be spelled out.
        self._witness: tuple[int, ...] | None = None
        self.stalled = False  # the last step left the frontier to the next one
        self._lead = b""  # last byte of the output
        if closer and not self._fits(self._parse, max_tokens):
            raise ValueError(f"no complete output fits into {max_tokens=}")
        for place, token in enumerate(verified):
            if self.status == Status.RUNNING and not self._accept(token):
                raise ValueError(f"token {token} is not legal at position {place}")

    @property
    def remaining(self) -> int:
        """Output tokens left of the budget."""
        return self.max_tokens - self.num_verified

    def frontier_mask(self, row: np.ndarray) -> None:
        """Write which tokens are legal next; the budget is not looked at.

        Args:
            row: int32 [ceil(vocab / 32)], C-contiguous. Token `i` is bit `i % 32` of
                word `i // 32`, 1 if legal. Stop tokens are legal where the output
                is complete, the mask token never is.

        """
        ended = self.status != Status.RUNNING
        if ended:
            row.fill(0)
        else:
            self._matcher.fill_next_token_bitmask(row[None])
        if ended or self._matcher.is_completed():
            words = row.view(np.uint32)
            for token in self._known_stop_ids:
                words[token >> 5] &= ~np.uint32(1 << (token & 31))
            for token in self._stop_ids:
                words[token >> 5] |= np.uint32(1 << (token & 31))

    def draft_masks(self, drafts: Sequence[int], rows: np.ndarray) -> int:
        """Write `frontier_mask` behind each beginning of a draft, to its row.

        Returns how many: up to that of the first draft that is no legal text.
        """
        followed = 0
        for place, token in enumerate(drafts):
            self.frontier_mask(rows[place])
            if not self._tokens[token] or not self._matcher.accept_token(token):
                break
            followed += 1
        self._matcher.rollback(followed)
        return min(followed + 1, len(drafts))

    def step(
        self,
        block: Sequence[int],
        first: int,
        tokens: Sequence[int],
        accepted: Sequence[bool],
        candidates: Sequence[int],
        sampled: bool,
    ) -> StepResult:
        """Unmask what the rule accepted, verify from the frontier, close in time.

        Every step unmasks or verifies a column, and the frontier moves at least
        every other step: a block takes at most `2 * W` steps. A block without masks
        is verified entirely.

        Args:
            block: [W], ids of the output columns of the open block before this step,
                the mask id where masked; none beyond `max_tokens`.
            first: output index of column 0.
            tokens: [W], what each column would take.
            accepted: [W], masked columns that the rule would unmask.
            candidates: [K], legal tokens of the frontier, best first, then any number
                of -1. With none the guard writes the next token.
            sampled: the request has a temperature. The frontier then takes its
                sampled token, whatever stands right of it.

        Returns:
            The block, with those tentative columns masked that did not verify, and
            filled with stop tokens from the end of the output on.

        """
        ids = list(block)
        frontier = self.num_verified - first
        forced = 0
        remasked = looked_ahead = False
        if self.status == Status.RUNNING and frontier < len(ids):
            unmasked = self._unmask(ids, frontier, tokens, accepted)
            choices = [token for token in candidates if token >= 0]
            # What was unmasked ahead or seeded is as good as accepted.
            standing = None if ids[frontier] == self._mask_id else ids[frontier]
            lead = tokens[frontier] if accepted[frontier] else standing
            if lead is None and not sampled:
                lead = self._look_ahead(ids, frontier + 1, choices)
                looked_ahead = lead is not None
            doubtful = lead is None and bool(choices)
            self.stalled = doubtful and unmasked and not self.stalled
            if not self.stalled:
                if sampled and standing is None:
                    lead = tokens[frontier]
                if lead is not None and choices:
                    choices.insert(0, lead)
                forced = self._take(ids, frontier, choices)
                remasked = self._walk(ids, frontier + 1)
            forced += self._close(ids, first)
        if self.status != Status.RUNNING:
            end = max(self.num_verified - first, 0)
            ids[end:] = [self._filler] * (len(ids) - end)
        return StepResult(ids, self.num_verified, forced, remasked, looked_ahead)

    def _unmask(
        self,
        ids: list[int],
        frontier: int,
        tokens: Sequence[int],
        accepted: Sequence[bool],
    ) -> bool:
        """Write tentative tokens right of the frontier; whether there were any."""
        unmasked = False
        for column in range(frontier + 1, len(ids)):
            # A token without bytes is no text. A stop token least of all: the model
            # would take everything right of it for the end.
            if (
                accepted[column]
                and ids[column] == self._mask_id
                and self._tokens[tokens[column]]
            ):
                ids[column] = tokens[column]
                unmasked = True
        return unmasked

    def _look_ahead(self, ids: list[int], start: int, choices: list[int]) -> int | None:
        """The choice after which the longest run from column `start` on is legal."""
        best, longest = None, 0
        if start == len(ids) or ids[start] == self._mask_id:
            return None
        matcher = self._matcher
        for choice in choices:
            if not self._tokens[choice] or not matcher.accept_token(choice):
                continue
            run = 0
            for token in ids[start:]:
                if token == self._mask_id or not matcher.accept_token(token):
                    break
                run += 1
            matcher.rollback(run + 1)
            if run > longest:
                best, longest = choice, run
        return best

    def _take(self, ids: list[int], frontier: int, choices: list[int]) -> int:
        """Write the first legal choice, or what the guard says; returns how many."""
        for choice in dict.fromkeys(choices):
            if self._accept(choice):
                ids[frontier] = choice
                return 0
        ids[frontier] = self._force()
        return 1

    def _walk(self, ids: list[int], column: int) -> bool:
        """Verify up to a mask; the first violator is masked. Whether there was one."""
        while (
            self.status == Status.RUNNING
            and column < len(ids)
            and ids[column] != self._mask_id
        ):
            if not self._accept(ids[column]):
                ids[column] = self._mask_id
                return True
            column += 1
        return False

    def _close(self, ids: list[int], first: int) -> int:
        """Write the witness if no token is to spare, or the end if nothing follows."""
        forced = 0
        column = self.num_verified - first
        while self.status == Status.RUNNING and column < len(ids) and self._is_tight():
            ids[column] = self._force()
            column += 1
            forced += 1
        if forced and self.remaining == 0:
            self.status = Status.CLOSED
        parse = self._parse
        over = parse is not None and parse.complete and not parse.configurations
        if over and self.status == Status.RUNNING and column < len(ids):
            ids[column] = self._filler
            self.status = Status.STOPPED
            self.num_verified += 1
        return forced

    def _accept(self, token: int) -> bool:
        """Move the frontier over a token, if it is legal and leaves room to close."""
        text = self._tokens[token]
        if not text:
            if token not in self._stop_ids or not self._matcher.is_completed():
                return False
            self.status = Status.STOPPED
            self.num_verified += 1
            return True
        if not text.isascii() and _NO_CHARACTER.search(self._lead + text):
            return False
        if not self._matcher.accept_token(token):
            return False
        if self._closer is not None:
            parse = self._parse and self._closer.advance(self._parse, text)
            if not self._fits(parse, self.remaining - 1, token):
                self._matcher.rollback(1)
                return False
            self._parse = parse
        self._lead = text[-1:]
        self.num_verified += 1
        return True

    def _fits(self, parse: Parse | None, budget: int, token: int = -1) -> bool:
        """Whether a witness for `parse`, reached by `token`, fits into `budget`."""
        closer = self._closer
        assert closer is not None
        if parse and closer.spells_bytes and parse.distance <= budget:
            self._witness = None
        elif self._witness and self._witness[0] == token:
            # As long as its tokens are followed, a witness that did fit does.
            self._witness = self._witness[1:]
        else:
            witness = closer.witness(parse) if parse else None
            if witness is None or len(witness) > budget:
                return False
            self._witness = witness
        return True

    def _spelled(self) -> tuple[int, ...] | None:
        """The witness, spelled out if it was not yet."""
        if self._witness is None and self._closer and self._parse:
            self._witness = self._closer.witness(self._parse)
        return self._witness

    def _is_tight(self) -> bool:
        """Whether only the witness is left to be written."""
        closer, parse = self._closer, self._parse
        if closer is None:
            return False
        if parse and closer.spells_bytes and parse.distance < self.remaining:
            return False
        witness = self._spelled() or ()
        return len(witness) >= (self.remaining if parse else 1) > 0

    def _force(self) -> int:
        """The witness's next token, or the end where the output is complete."""
        witness = self._spelled()
        if witness:
            if not self._accept(witness[0]):
                where = f"output position {self.num_verified}"
                raise RuntimeError(f"witness {witness} is not legal at {where}")
            return witness[0]
        if not self._matcher.is_completed():
            raise RuntimeError(f"no token is legal at output {self.num_verified}")
        self.status = Status.CLOSED
        self.num_verified += 1
        return self._filler
