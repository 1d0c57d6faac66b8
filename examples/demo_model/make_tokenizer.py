# SPDX-License-Identifier: Apache-2.0
"""Train the 512-entry byte-level BPE tokenizer and save it for AutoTokenizer.

It learns its merges from training-side examples only. Two choices serve copying:
digits are single tokens, and a space before a capital letter is a token of its own,
so a name has the same tokens after a space and after a quotation mark.
"""

import argparse
import json
import random
from pathlib import Path

from tasks import make_example
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
IM_END = "<|im_end|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
MASK = "<|MASK|>"
SPECIALS = [END_OF_TEXT, IM_END, USER, ASSISTANT, MASK]
VOCAB_SIZE = 512

# Lower-case words keep their leading space, capitalised ones and digits do not.
PIECES = r" ?\p{Ll}+|\p{Lu}+\p{Ll}*|\p{N}| ?[^\s\p{L}\p{N}]+|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{ASSISTANT}{{{{ message['content'] }}}}{IM_END}"
    "{% else %}"
    f"{USER}{{{{ message['content'] }}}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def train_tokenizer(seed: int = 0, examples: int = 20000) -> Tokenizer:
    """Byte-level BPE over ``examples`` prompts and answers of the training side."""
    rng = random.Random(seed)

    def texts():
        for _ in range(examples):
            example = make_example(rng)
            yield example.prompt
            yield example.answer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the settings that AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "mask_token": MASK,
        "additional_special_tokens": [USER, ASSISTANT],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and save the tokenizer.")
    parser.add_argument("--out", type=Path, default=Path("tokenizer"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    save_tokenizer(train_tokenizer(args.seed), args.out)


if __name__ == "__main__":
    main()
