# SPDX-License-Identifier: Apache-2.0
"""What would be done with a checkpoint, from its files and vLLM's configuration."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from vllm_unmask.families import FAMILIES

# Attention of a family -> what it means, and what its cache may be.
_ATTENTION = {
    "block_causal": (
        "block-causal: a position sees its block and what lies before it",
        ["none (exact)", "sub_block (approximate)"],
    ),
    "full": (
        "full: a position sees prompt and canvas",
        ["none (exact)", "prefix (approximate)", "dual (approximate)"],
    ),
    "causal": (
        "causal: known tokens, then decided ones, then masks",
        ["exact"],
    ),
}


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """What vLLM, with the plugin registered, would do with a checkpoint.

    Returns:
        JSON-safe facts. If vLLM would not start with it, ``refused`` says why and
        what to do, and the others end where that was found.

    """
    report: dict[str, Any] = {}
    # vLLM logs to stdout, where the report goes.
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        report |= _family_of(folder)
        report |= _served(folder)
    # What vLLM raises depends on what it stumbles over.
    except Exception as error:
        report["refused"] = _reason(error)
    finally:
        logging.disable(disabled)
    return report


def _family_of(folder: Path) -> dict[str, Any]:
    """What the files say, without vLLM. Raises ValueError if nothing serves them."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            "no config.json in this folder; give that of a downloaded checkpoint"
        )
    config = _read_json(folder / "config.json")
    names = config.get("architectures") or []
    family = next((f for f in FAMILIES if f.architecture in names), None)
    if family is None:
        known = ", ".join(f.architecture for f in FAMILIES)
        raise ValueError(
            f"architectures={names} in config.json is none of this plugin's ({known}): "
            "vLLM serves it as without the plugin, or not at all"
        )
    if config.get("model_type") != family.model_type:
        raise ValueError(
            f"model_type={config.get('model_type')!r} in config.json: expected "
            f"{family.model_type!r}, by which vLLM knows {family.architecture}; set it"
        )
    index = folder / "model.safetensors.index.json"
    files = ["*.safetensors"]
    if index.is_file():
        files = sorted(set(_read_json(index)["weight_map"].values()))
    if absent := [name for name in files if not any(folder.glob(name))]:
        raise ValueError(f"no {', '.join(absent)} in this folder; download the rest")
    strategy = json.dumps({"unmask": {"strategy": family.presets[0]}})
    serve = ["vllm", "serve", str(folder), "--additional-config", strategy]
    attention, caches = _ATTENTION[family.attention]
    return {
        "architecture": family.architecture,
        "checkpoints": family.checkpoints,
        "attention": attention,
        "cache": caches,
        "exact": family.exact,
        "approximate": family.approximate,
        "recommended": list(family.presets),
        "command": shlex.join(serve),
    }


def _served(folder: Path) -> dict[str, Any]:
    """What vLLM makes of it, from a configuration that no engine is started with."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True)
    model = arguments.create_engine_config().model_config
    served = model.hf_config.unmask_served
    stops: set[int] = set()
    for config in (model.hf_config.to_dict(), model.try_get_generation_config()):
        ids = config.get("eos_token_id")
        stops.update([ids] if isinstance(ids, int) else ids or [])
    return {
        "block_length": served["block_length"],
        "mask_token_id": served["mask_token_id"],
        "stop_token_ids": sorted(stops),
        "context": model.max_model_len,
        "quantization": model.quantization,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def _reason(error: Exception) -> str:
    """One line: of pydantic's error, which vLLM wraps ours in, the message alone."""
    if details := getattr(error, "errors", None):
        return str(details()[0]["msg"]).removeprefix("Value error, ")
    return " ".join(str(error).split()) or type(error).__name__
