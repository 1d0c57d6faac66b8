# SPDX-License-Identifier: Apache-2.0
"""LLaDA's decoding with Fast-dLLM's caches, in plain torch.

Keys and values of every position are kept as the last forward that had the position
computed them. Independent of the plugin and of vLLM.
"""

from collections.abc import Callable
from typing import Any

import torch
from dense_reference import Weights, attend, rms_norm, rotate


class CachedLLaDA:
    """The network, and the keys and values of a canvas.

    Args:
        length: positions of the canvas.
    """

    def __init__(self, config: dict[str, Any], weights: Weights, length: int) -> None:
        self.config, self.weights = config, weights
        heads = config["n_heads"]
        shape = (config["n_layers"], 2, heads, length, config["d_model"] // heads)
        self.cache = torch.full(shape, torch.nan)

    def forward(self, ids: list[int], first: int, end: int) -> torch.Tensor:
        """Logits [len(ids), vocab] of the positions from ``first`` on.

        They see all positions before ``end``.
        """
        eps, theta = self.config["rms_norm_eps"], self.config["rope_theta"]
        rows = slice(first, first + len(ids))
        everything = torch.ones((len(ids), end), dtype=torch.bool)
        x = self.weights["model.transformer.wte.weight"][torch.tensor(ids)]

        def split(t: torch.Tensor) -> torch.Tensor:
            return t.view(len(ids), self.config["n_heads"], -1).transpose(0, 1)

        for layer, cache in enumerate(self.cache):

            def get(part: str, layer: int = layer) -> torch.Tensor:
                return self.weights[f"model.transformer.blocks.{layer}.{part}.weight"]

            h = rms_norm(x, get("attn_norm"), eps)
            q, k = (rotate(split(h @ get(f"{n}_proj").T), theta, first) for n in "qk")
            cache[0, :, rows], cache[1, :, rows] = k, split(h @ get("v_proj").T)
            mixed = attend(q, cache[0, :, :end], cache[1, :, :end], everything)
            x = x + mixed @ get("attn_out").T
            h = rms_norm(x, get("ff_norm"), eps)
            gate = torch.nn.functional.silu(h @ get("ff_proj").T)
            x = x + (gate * (h @ get("up_proj").T)) @ get("ff_out").T
        x = rms_norm(x, self.weights["model.transformer.ln_f.weight"], eps)
        head = self.weights["model.transformer.ff_out.weight"]
        return (x @ head.T)[:, : self.config["vocab_size"]]


def decode_cached(
    config: dict[str, Any],
    weights: Weights,
    prompt: list[int],
    max_tokens: int,
    *,
    block: int,
    choose: Callable[[list[int], torch.Tensor, list[int], int, int], list[int]],
    dual: bool,
    refresh: int,
) -> tuple[list[int], list[int]]:
    """Greedy decoding that forwards the whole canvas in some steps only.

    Args:
        choose: as for ``dense_reference.decode``.
        dual: whether the other steps forward the open block alone, and not all that
            is not before it.
        refresh: steps of a block from one that forwards the whole canvas to the next.

    Returns:
        The output tokens, and the rows of each forward.
    """
    mask_id = config["mask_token_id"]
    ids = prompt + [mask_id] * (-(-max_tokens // block) * block)
    network = CachedLLaDA(config, weights, len(ids))
    rows = []
    for start in range(len(prompt), len(ids), block):
        for step in range(block):
            masked = [i for i in range(block) if ids[start + i] == mask_id]
            if not masked:
                break
            first, end = start, start + block if dual else len(ids)
            if step % refresh == 0:
                first, end = 0, len(ids)
            rows.append(end - first)
            logits = network.forward(ids[first:end], first, len(ids))
            logits = logits[start - first :][:block]
            logits[:, mask_id] = -torch.inf
            confidence, candidate = logits.softmax(-1).max(-1)
            columns = choose(masked, confidence, candidate.tolist(), step, block)
            for column in columns:
                ids[start + column] = int(candidate[column])
    return ids[len(prompt) :][:max_tokens], rows
