# SPDX-License-Identifier: Apache-2.0
"""What strategies need of a checkpoint's folder: a trained filter, the tokenizer."""

from collections import OrderedDict
from functools import cached_property
from pathlib import Path

import torch
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_unmask.decoding.delimiter import transitions
from vllm_unmask.decoding.learned import load_filter

logger = init_logger("vllm.vllm_unmask.engine.strategy_data")

# A table of 32 bytes and 150,000 tokens is 5 MB.
_MAX_TABLES = 16
_DELIMITERS = {"newline": b"\n", "comma": b",", "period": b"."}


def find_filter(given: str | None, model: str, block_length: int) -> str | None:
    """The file of the filter that a server has, None if it has none.

    Args:
        given: the option; its file must fit the model.
        model: path of the checkpoint, which may have one beside it.
        block_length: of the model; another one's filter beside it is left alone.

    Raises:
        ValueError: the given file cannot be used.
    """
    if given is not None:
        load_filter(given, block_length)
        return given
    # In a folder of its own: vLLM loads every safetensors file beside the weights.
    beside = Path(model, "unmask", "filter.safetensors")
    if not beside.is_file():
        return None
    try:
        load_filter(beside, block_length)
    except ValueError as error:
        logger.warning("The strategy learned is not available: %s", error)
        return None
    return str(beside)


class Delimiters:
    """What tokens have of a text; reads the tokenizer when first asked.

    Args:
        model_config: names the tokenizer.
        vocab_size: of the model.
        device: of the result.
    """

    def __init__(
        self, model_config: ModelConfig, vocab_size: int, device: torch.device
    ) -> None:
        self.model_config = model_config
        self.vocab_size = vocab_size
        self.device = device
        self.known: dict[str, torch.Tensor] = {}
        self.tables: OrderedDict[str, torch.Tensor] = OrderedDict()

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """Bytes of every token."""
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(
            cached_tokenizer_from_config(self.model_config),
            vocab_size=self.vocab_size,
        )
        return info.decoded_vocab

    def __call__(self, name: str) -> torch.Tensor:
        """bool [vocab] of a delimiter's name: which tokens end with it."""
        if name not in self.known:
            text = _DELIMITERS[name]
            ends = [token.endswith(text) for token in self.vocabulary]
            self.known[name] = torch.tensor(ends, device=self.device)
        return self.known[name]

    def table(self, text: str) -> torch.Tensor:
        """`transitions` of a text that requests ask for; the last few are kept."""
        if text not in self.tables:
            table = transitions(self.vocabulary, text.encode())
            self.tables[text] = table.to(self.device)
        self.tables.move_to_end(text)
        if len(self.tables) > _MAX_TABLES:
            self.tables.popitem(last=False)
        return self.tables[text]
