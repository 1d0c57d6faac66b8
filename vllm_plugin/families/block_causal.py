# SPDX-License-Identifier: Apache-2.0
"""What the models of all block-causal families do beside their network."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

from vllm_unmask.engine import model_state_cls

if TYPE_CHECKING:
    from vllm_unmask.engine.carry import Carry
    from vllm_unmask.engine.model_state import BlockDiffusionModelState

# Module of vLLM's -> the modules of a checkpoint that it holds.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Start of a parameter's name in vLLM's fused experts -> modules of each expert.
_EXPERT = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}
# Copies of what the configuration says, which vLLM drops.
_DROPPED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class BlockCausalLM(nn.Module):
    """Stands in front of a vLLM model class among the bases of a family's class.

    Brings the canvas, and makes the first loading strict. vLLM's own checks let a
    checkpoint pass that lacks a linear layer, a part of a fused one or an expert, and
    cut a weight that is too large. Later calls of ``load_weights`` may bring a part,
    as trainers do.
    """

    # Set by the engine where row i - 1 scores token i.
    carry: "Carry | None" = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        parallel = vllm_config.parallel_config
        self._num_experts = vllm_config.model_config.get_num_experts()
        self._experts_filtered = (
            parallel.enable_expert_parallel and parallel.enable_ep_weight_filter
        )
        self._quantized = vllm_config.quant_config is not None
        # Without a checkpoint all that ever comes may be parts.
        self._is_first = vllm_config.load_config.load_format != "dummy"

    @staticmethod
    def get_model_state_cls() -> "type[BlockDiffusionModelState]":
        return model_state_cls()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        if self.carry is not None:
            hidden_states = self.carry.exchange(hidden_states)
        logits: torch.Tensor | None = super().compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint.

        Raises:
            ValueError: at the first call, a weight that is missing, unexpected or of
                another size. Of a quantized checkpoint, whose names and shapes depend
                on its format: a module without any weight, or what vLLM refuses.

        """
        found: dict[str, int] = {}
        loaded = self._load(_noted(weights, found))
        if self._is_first:
            self._require_complete(found)
            self._is_first = False
        return loaded

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """vLLM's loading."""
        loaded: set[str] = super().load_weights(weights)
        return loaded

    def checkpoint_name(self, name: str) -> str:
        """A checkpoint's name of a weight that vLLM's class, unfused, calls `name`."""
        return name

    def _require_complete(self, found: dict[str, int]) -> None:
        """Compare the names found, and how many values each weight has."""
        experts = [
            expert
            for expert in range(self._num_experts)
            if not self._experts_filtered
            or any(f".experts.{expert}." in name for name in found)
        ]
        published = {
            parameter: [
                self.checkpoint_name(name)
                for name in published_names(parameter, experts)
            ]
            for parameter, _ in self.named_parameters()
        }
        expected = {name for names in published.values() for name in names}
        # A tied head may be there, and is then dropped.
        again = {p for p, _ in self.named_parameters(remove_duplicate=False)}
        allowed = {self.checkpoint_name(name) for name in again - published.keys()}
        if self._quantized:
            if missing := sorted(_modules(expected) - _modules(found)):
                raise _other_checkpoint(f"lacks {_some(missing)}")
            return
        if missing := sorted(expected - found.keys()):
            raise _other_checkpoint(f"lacks {_some(missing)}")
        unknown = found.keys() - expected - allowed
        if unknown := {name for name in unknown if not name.endswith(_DROPPED)}:
            raise _other_checkpoint(f"has {_some(sorted(unknown))} too many")
        for parameter, names in published.items():
            path, _, kind = parameter.rpartition(".")
            if not (kind.endswith("weight") or kind == "bias"):
                continue
            size = _num_values(self.get_submodule(path), kind, len(names))
            if size not in (None, sum(found[name] for name in names)):
                raise _other_checkpoint(f"has other shapes in {_some(names)}")


def published_names(parameter: str, experts: Iterable[int]) -> list[str]:
    """The weights of a checkpoint that vLLM keeps in one parameter.

    Args:
        parameter: name in vLLM's model, such as ``...mlp.gate_up_proj.weight``.
        experts: the experts that are loaded.

    """
    *stem, module, kind = parameter.split(".")
    if module == "routed_experts":
        fused, _, kind = kind.partition("_")
        each = [f"{expert}.{part}" for expert in experts for part in _EXPERT[fused]]
    else:
        each = list(_FUSED.get(module, (module,)))
    return [".".join((*stem, part, kind)) for part in each]


def _num_values(module: nn.Module, kind: str, num_names: int) -> int | None:
    """Values of a layer's weight in the checkpoint; None if vLLM compares shapes.

    Args:
        kind: the parameter, a weight or ``bias``.
        num_names: weights of the checkpoint that form the layer's.

    """
    if isinstance(module, RoutedExperts):
        moe = module.moe_config
        return num_names * moe.intermediate_size * moe.hidden_dim_unpadded
    if isinstance(module, LinearBase):
        num_outputs = module.output_size
        if isinstance(module, QKVParallelLinear):
            # Where ranks outnumber the KV heads, vLLM's own sizes count copies.
            heads = module.total_num_heads + 2 * module.total_num_kv_heads
            num_outputs = heads * module.head_size
        return num_outputs * (1 if kind == "bias" else module.input_size)
    return None


def _noted(
    weights: Iterable[tuple[str, torch.Tensor]], found: dict[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in weights:
        found[name] = weight.numel()
        yield name, weight


def _modules(names: Iterable[str]) -> set[str]:
    """The modules that have a weight, of any format: scales may be in the config."""
    split = (name.rpartition(".") for name in names)
    return {m for m, _, kind in split if "weight" in kind and "scale" not in kind}


def _some(names: list[str]) -> str:
    noun = "weight" if len(names) == 1 else "weights"
    return f"{len(names)} {noun} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


def _other_checkpoint(what: str) -> ValueError:
    return ValueError(
        f"the checkpoint {what}; is a file of it missing, or does its config.json "
        "belong to another one?"
    )
