# SPDX-License-Identifier: Apache-2.0
"""The tokenizer as a grammar sees it: bytes per token, and what is no text."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xgrammar


class Vocabulary:
    """Bytes of every token, and the tokens that stand for no text.

    A grammar works on bytes, and xgrammar lets every token with bytes stand inside
    a JSON string, a mask token spelled `<|mask|>` too. A vocabulary therefore takes
    the bytes away from the mask and special tokens: without bytes they are legal
    nowhere. Stop tokens are legal where the grammar is complete, only there.

    Args:
        info: the tokenizer, of the model's padded vocabulary size.
        mask_id: token that marks a masked position.
        stop_ids: tokens that end a completed grammar.
        special_ids: more tokens that are never text.

    Raises:
        ValueError: no stop token, or an id that is not in the vocabulary.

    """

    def __init__(
        self,
        info: xgrammar.TokenizerInfo,
        mask_id: int,
        stop_ids: Iterable[int],
        special_ids: Iterable[int] = (),
    ) -> None:
        self.mask_id = mask_id
        self.stop_ids = tuple(stop_ids)
        self.vocab_size: int = info.vocab_size
        silent = {mask_id, *self.stop_ids, *special_ids}
        if not self.stop_ids or mask_id in self.stop_ids:
            raise ValueError(f"stop_ids={self.stop_ids} with {mask_id=}")
        if min(silent) < 0 or max(silent) >= self.vocab_size:
            raise ValueError(f"ids {sorted(silent)} outside of {self.vocab_size=}")
        # Bytes per id, of length `vocab_size`.
        self.tokens: list[bytes] = info.decoded_vocab
        self.tokens += [b""] * (self.vocab_size - len(self.tokens))
        for token in silent:
            self.tokens[token] = b""
        # From decoded bytes, whatever the tokenizer's own encoding: both ends of a
        # serialised grammar must have equal metadata.
        self.info = xgrammar.TokenizerInfo(
            self.tokens,
            xgrammar.VocabType.RAW,
            vocab_size=self.vocab_size,
            stop_token_ids=list(self.stop_ids),
        )

    @classmethod
    def from_tokens(
        cls, tokens: Sequence[bytes], mask_id: int, stop_ids: Iterable[int]
    ) -> "Vocabulary":
        """From the bytes of every id; empty bytes are special or padding tokens."""
        return cls(xgrammar.TokenizerInfo(list(tokens)), mask_id, stop_ids)

    @classmethod
    def from_huggingface(
        cls, tokenizer: Any, vocab_size: int, mask_id: int, stop_ids: Iterable[int]
    ) -> "Vocabulary":
        """From a Hugging Face tokenizer.

        `vocab_size` is the width of the model's logits, which may be larger or
        smaller than the tokenizer's own size. Tokens that the tokenizer calls
        special are left out of its decoded text, so they are no text here either.
        """
        stop_ids = tuple(stop_ids)
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=list(stop_ids)
        )
        special_ids = [i for i in tokenizer.all_special_ids if i < vocab_size]
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special_ids += [i for i, t in added.items() if t.special and i < vocab_size]
        return cls(info, mask_id, stop_ids, special_ids)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens without bytes that do not stop: never legal. Holds the mask token."""
        return tuple(self.info.special_token_ids)

    def of(self, kind: str) -> "Vocabulary":
        """The vocabulary of a kind of grammar: for JSON, without control characters.

        xgrammar lets them stand in strings with a length or a pattern, where JSON
        wants an escape; between tokens of JSON a blank does.
        """
        return self._of_json if kind in ("json_schema", "json_object") else self

    @cached_property
    def _of_json(self) -> "Vocabulary":
        tokens = [
            token if min(token, default=0) >= 32 else b"" for token in self.tokens
        ]
        return Vocabulary.from_tokens(tokens, self.mask_id, self.stop_ids)

    @cached_property
    def byte_ids(self) -> np.ndarray:
        """`[256]` int32: smallest id of the token of one byte, -1 where none is."""
        ids = np.full(256, -1, dtype=np.int32)
        for token in reversed(range(self.vocab_size)):
            if len(self.tokens[token]) == 1:
                ids[self.tokens[token][0]] = token
        return ids

    @cached_property
    def digest(self) -> str:
        """Hash of the content: equal for vocabularies that are equal."""
        return hashlib.sha256(self.dumps()).hexdigest()

    def dumps(self) -> bytes:
        """The vocabulary as bytes, for another process."""
        header = {"mask_id": self.mask_id, "stop_ids": self.stop_ids}
        lengths = np.fromiter(map(len, self.tokens), "<u4", self.vocab_size)
        parts = (json.dumps(header).encode(), lengths.tobytes(), b"".join(self.tokens))
        sizes = np.array([len(part) for part in parts], "<u4")
        return b"".join((sizes.tobytes(), *parts))

    @classmethod
    def loads(cls, data: bytes) -> "Vocabulary":
        """The vocabulary that `dumps` wrote."""
        first, second, _ = np.frombuffer(data, "<u4", 3).tolist()
        header = json.loads(data[12 : 12 + first])
        start = 12 + first + second
        lengths = np.frombuffer(data[12 + first : start], "<u4")
        ends = (start + np.cumsum(lengths, dtype=np.int64)).tolist()
        tokens = [data[a:b] for a, b in zip([start, *ends[:-1]], ends, strict=True)]
        return cls.from_tokens(tokens, **header)
