# SPDX-License-Identifier: Apache-2.0
"""Write a training checkpoint as a model folder, and read one back."""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from model import DemoModel, ModelConfig
from safetensors.torch import load_file, save_file


def model_config(
    config: ModelConfig, block_size: int | None, stop: int, pad: int, mask: int
):
    """config.json of the diffusion model (SDAR), or without blocks the twin (Qwen3)."""
    ar = block_size is None
    result = {
        "architectures": ["Qwen3ForCausalLM" if ar else "SDARForCausalLM"],
        "model_type": "qwen3" if ar else "sdar",
        **config.to_dict(),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": stop,
        "pad_token_id": pad,
        "dtype": "bfloat16",
    }
    if not ar:
        result |= {"block_size": block_size, "mask_token_id": mask}
    return result


def export(checkpoint: Path, tokenizer: Path, out: Path) -> None:
    """Write bf16 safetensors, configs and tokenizer; readers never see half a file."""
    state = torch.load(checkpoint, weights_only=True)
    vocab = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in vocab["added_tokens"]}
    stop, pad, mask = ids["<|im_end|>"], ids["<|endoftext|>"], ids["<|MASK|>"]
    block_size = None if state["ar"] else state["block_size"]
    config = model_config(ModelConfig(**state["config"]), block_size, stop, pad, mask)
    generation = {
        "do_sample": False,
        "eos_token_id": [stop, pad],
        "pad_token_id": pad,
    }
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {k: v.to(torch.bfloat16) for k, v in state["model"].items()}
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
    ):
        text = json.dumps(content, indent=2) + "\n"
        (part / name).write_text(text, encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, part / name)
    out.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        os.replace(file, out / file.name)
    part.rmdir()


def load(folder: Path) -> tuple[DemoModel, int | None]:
    """(model with the exported weights in fp32, block size or None of the twin)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields = ModelConfig.__dataclass_fields__
    model = DemoModel(ModelConfig(**{k: config[k] for k in fields}))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().eval(), config.get("block_size")


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a training checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    export(args.checkpoint, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
