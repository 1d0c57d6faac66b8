# SPDX-License-Identifier: Apache-2.0
"""A model folder with a vocabulary of real size and seeded random weights.

The tokens are those of the Tekken tokenizer that `mistral_common` brings with it,
150,000 of them. vLLM wants a Hugging Face tokenizer, so its merges are made again
from the ranks. The weights say nothing; sizes and costs are what counts.
"""

import base64
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

SOURCE = "tekken_240718.json"
# Logits are wider than the tokenizer in most models; here too.
_MULTIPLE = 128


def write_model(
    folder: Path, like: Path, sizes: Mapping[str, Any] | None = None
) -> None:
    """Write configuration, weights and tokenizer.

    Args:
        folder: is made.
        like: a model folder whose kind, special tokens and chat template it gets.
        sizes: keys of config.json; default: next to no layers.
    """
    folder.mkdir(parents=True)
    settings = json.loads((like / "tokenizer_config.json").read_text())
    known = json.loads((like / "tokenizer.json").read_text())["added_tokens"]
    specials = [token["content"] for token in known]
    tokenizer = _tokenizer(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = (like / "generation_config.json").read_text()
    (folder / "generation_config.json").write_text(generation)
    config = json.loads((like / "config.json").read_text()) | {
        "vocab_size": -(-tokenizer.get_vocab_size() // _MULTIPLE) * _MULTIPLE,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    config |= sizes or {}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(config), folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer(specials: list[str]) -> Tokenizer:
    text = files("mistral_common").joinpath("data", SOURCE).read_text("utf-8")
    content = json.loads(text)
    ranks = {
        base64.b64decode(entry["token_bytes"]): entry["rank"]
        for entry in content["vocab"]
    }
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(a, b) for a, b in halves if a in ranks and b in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spell(a), spell(b)) for a, b in pairs]
    vocabulary = {token: index for index, token in enumerate(specials)}
    vocabulary |= {spell(token): rank + len(specials) for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(content["config"]["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Random weights under the published names, bfloat16."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim, vocab = config["head_dim"], config["vocab_size"]
    query = config["num_attention_heads"] * dim
    key = config["num_key_value_heads"] * dim

    def matrix(*shape: int, scale: float = 0.15) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(torch.bfloat16)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    # Scaled so that some confidences pass a threshold and others do not.
    weights = {
        "model.embed_tokens.weight": matrix(vocab, hidden, scale=0.6),
        "model.norm.weight": ones(hidden),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(vocab, hidden, scale=0.8)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            f"{prefix}self_attn.q_proj.weight": matrix(query, hidden),
            f"{prefix}self_attn.k_proj.weight": matrix(key, hidden),
            f"{prefix}self_attn.v_proj.weight": matrix(key, hidden),
            f"{prefix}self_attn.o_proj.weight": matrix(hidden, query),
            f"{prefix}self_attn.q_norm.weight": ones(dim),
            f"{prefix}self_attn.k_norm.weight": ones(dim),
            f"{prefix}mlp.gate_proj.weight": matrix(inner, hidden),
            f"{prefix}mlp.up_proj.weight": matrix(inner, hidden),
            f"{prefix}mlp.down_proj.weight": matrix(hidden, inner),
            f"{prefix}input_layernorm.weight": ones(hidden),
            f"{prefix}post_attention_layernorm.weight": ones(hidden),
        }
    return weights
