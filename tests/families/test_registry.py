# SPDX-License-Identifier: Apache-2.0
"""The list of families, its page, and the config classes."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    llada2_config,
    llada_config,
    llada_moe_config,
    sdar_moe_config,
)
from family_references import REFERENCES

from vllm_unmask.families import FAMILIES, Family, family_of
from vllm_unmask.presets import PRESETS

PAGE = Path(__file__).parents[2] / "vllm_plugin" / "families" / "README.md"


def config_class(family: Family) -> Any:
    module, _, name = family.config_cls.partition(":")
    return getattr(importlib.import_module(module), name)


def rows(num_columns: int) -> list[list[str]]:
    """The table of the page with that many columns, without its head."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| `")
    ]
    return [row for row in cells if len(row) == num_columns]


def test_page_says_what_the_list_says() -> None:
    assert rows(6) == [
        [
            f"`{family.architecture}`",
            family.checkpoints,
            str(config_class(family)().block_size),
            ", ".join(f"`{preset}`" for preset in family.presets),
            family.exact,
            family.approximate,
        ]
        for family in FAMILIES
    ]
    measured = [row[0].strip("`") for row in rows(4)]
    assert measured == [family.architecture for family in FAMILIES]


def test_every_family_has_a_reference_and_known_strategies() -> None:
    assert list(REFERENCES) == [family.architecture for family in FAMILIES]
    for family in FAMILIES:
        assert family.presets and set(family.presets) <= set(PRESETS)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_published_keys(family: Family) -> None:
    """The tiny config of the tests is that of a checkpoint of this family."""
    published = REFERENCES[family.architecture].config(8)
    config = config_class(family)(**published)
    assert published["architectures"] == [family.architecture]
    assert (published["model_type"], config.model_type) == (family.model_type,) * 2
    assert (config.block_size, config.canvas_length) == (8, 8)
    assert not config.tie_word_embeddings
    for key in ("mask_token_id", "eos_token_id", "head_dim", "num_key_value_heads"):
        # Qwen2 has no head size of its own.
        if key in published:
            assert getattr(config, key) == published[key]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_the_release_stands_in_for_missing_keys(family: Family) -> None:
    published = REFERENCES[family.architecture].config(
        ..., mask_token_id=..., head_dim=..., eos_token_id=..., rotary_dim=...
    )
    config = config_class(family)(**published)
    expected = {
        "SDARForCausalLM": (4, 151669, None, 128),
        "SDARMoeForCausalLM": (4, 151669, None, 128),
        "LLaDA2MoeModelLM": (32, 156895, 156892, 128),
        # Qwen2 has no head size of its own.
        "Fast_dLLM_QwenForCausalLM": (32, 151665, 151645, None),
        # Its heads share the hidden size, and that is in the file.
        "LLaDAModelLM": (32, 126336, 126081, 32),
        "LLaDAMoEModelLM": (32, 156895, 156892, 128),
        "DreamModel": (32, 151666, 151643, None),
        # The same, if the file has no head size.
        "WeDLMForCausalLM": (16, 151665, None, 32),
    }[family.architecture]
    found = config.block_size, config.mask_token_id, config.eos_token_id
    assert (*found, getattr(config, "head_dim", None)) == expected
    assert config.canvas_length == config.block_size


def test_sdar_moe_normalises_the_experts_weights() -> None:
    cls = config_class(FAMILIES[1])
    assert cls(**sdar_moe_config(norm_topk_prob=...)).norm_topk_prob
    assert not cls(**sdar_moe_config(norm_topk_prob=False)).norm_topk_prob


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score_function", "softmax"),
        ("use_rmsnorm", False),
        ("norm_topk_prob", False),
        ("use_qkv_bias", True),
        ("rotary_dim", 32),
    ],
)
def test_llada2_refuses_another_network(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}={value!r} in config.json"):
        config_class(FAMILIES[2])(**llada2_config(**{key: value}))


@pytest.mark.parametrize("use_qk_norm", [..., True, False])
def test_llada2_does_not_ask_whether_queries_are_normalised(use_qk_norm: Any) -> None:
    config_class(FAMILIES[2])(**llada2_config(use_qk_norm=use_qk_norm))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {
            "rope_theta": ...,
            "partial_rotary_factor": ...,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ],
    ids=["published", "transformers 5"],
)
def test_llada2_rotates_half_of_the_channels(keys: dict[str, Any]) -> None:
    from vllm.transformers_utils.config import patch_rope_parameters

    config = config_class(FAMILIES[2])(**llada2_config(**keys))
    patch_rope_parameters(config)
    assert config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    }


def test_llada_is_written_in_names_of_its_own() -> None:
    cls = config_class(family_of("LLaDAModelLM"))
    config = cls(**llada_config(n_kv_heads=None, embedding_size=192))
    assert (config.hidden_size, config.num_hidden_layers) == (128, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 4)
    assert (config.intermediate_size, config.max_position_embeddings) == (96, 1024)
    assert (config.vocab_size, config.num_ids) == (192, 160)
    release = cls()
    assert (release.hidden_size, release.vocab_size) == (4096, 126464)


def test_llada_moe_does_not_normalise_the_experts_weights() -> None:
    cls = config_class(family_of("LLaDAMoEModelLM"))
    config = cls(**llada_moe_config())
    assert not config.norm_topk_prob
    assert config.mlp_only_layers == [0]
    assert (config.intermediate_size, config.moe_intermediate_size) == (128, 32)
    assert cls(**llada_moe_config(moe_layer_freq=1)).mlp_only_layers == []


@pytest.mark.parametrize(
    "config",
    [
        llada_config(block_type="sequential"),
        llada_config(include_bias=True),
        llada_config(activation_type="gelu"),
        llada_moe_config(shared_expert_intermediate_size=64),
        llada_moe_config(moe_router_enable_expert_bias=True),
        llada_moe_config(qk_layernorm=False),
    ],
)
def test_llada_refuses_another_network(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="in config.json is not LLaDA's network"):
        config_class(family_of(config["architectures"][0]))(**config)
