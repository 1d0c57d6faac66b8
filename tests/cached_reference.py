# SPDX-License-Identifier: Apache-2.0
"""Decoding with the caches of Fast-dLLM and Fast-dLLM v2, in plain torch.

Keys and values of every position are kept as the last forward that had the position
computed them. Independent of the plugin and of vLLM.
"""

from typing import Any, NamedTuple

import torch
from dense_reference import Choose, FeedForward, Weights, attend, rms_norm, rotate

# The names of Dream and Fast-dLLM v2 (Qwen2's), SDAR's (Qwen3's) and LLaDA2's ->
# LLaDA's.
_RENAMED = {
    "model.word_embeddings": "model.transformer.wte",
    "attention.query_layernorm": "q_norm",
    "attention.key_layernorm": "k_norm",
    "attention.dense": "attn_out",
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "model.layers": "model.transformer.blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def as_llada(config: dict[str, Any], weights: Weights) -> tuple[Any, Weights]:
    """A tiny checkpoint under LLaDA's names, besides its own."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    renamed = dict(weights)
    for name, weight in weights.items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if "attention.query_key_value" not in name:
            renamed[name] = weight
            continue
        dim = len(weight) // (heads + 2 * kv_heads)
        parts = weight.split([heads * dim, kv_heads * dim, kv_heads * dim])
        for part, rows in zip("qkv", parts, strict=True):
            own = name.replace("attention.query_key_value", f"{part}_proj")
            renamed[own] = rows
    return config | {
        "d_model": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": kv_heads,
    }, renamed


class CachedLLaDA:
    """The network, and the keys and values of a canvas.

    Args:
        length: positions of the canvas.
        feed_forward: as for ``dense_reference.dense_logits``; without it, LLaDA's.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: Weights,
        length: int,
        feed_forward: FeedForward | None = None,
    ) -> None:
        self.config, self.weights = config, weights
        self.feed_forward = feed_forward
        self.dim = config.get("head_dim", config["d_model"] // config["n_heads"])
        shape = (config["n_layers"], 2, config["n_kv_heads"], length, self.dim)
        self.cache = torch.full(shape, torch.nan)

    def forward(self, ids: list[int], first: int, end: int) -> torch.Tensor:
        """Logits [len(ids), vocab] of the positions from ``first`` on.

        They see all positions before ``end``.
        """
        eps, theta = self.config["rms_norm_eps"], self.config["rope_theta"]
        rows = slice(first, first + len(ids))
        everything = torch.ones((len(ids), end), dtype=torch.bool)
        x = self.weights["model.transformer.wte.weight"][torch.tensor(ids)]

        for layer, cache in enumerate(self.cache):
            prefix = f"model.transformer.blocks.{layer}"

            def get(part: str, prefix: str = prefix) -> torch.Tensor:
                return self.weights[f"{prefix}.{part}.weight"]

            h = rms_norm(x, get("attn_norm"), eps)
            q, k, v = (
                (h @ get(f"{name}_proj").T)
                .add(self.weights.get(f"{prefix}.{name}_proj.bias", 0))
                .view(len(ids), -1, self.dim)
                .transpose(0, 1)
                for name in "qkv"
            )
            if f"{prefix}.q_norm.weight" in self.weights:
                q, k = rms_norm(q, get("q_norm"), eps), rms_norm(k, get("k_norm"), eps)
            turned = self.config.get("rotary_dim", self.dim)
            q, k = (
                torch.cat((rotate(x[..., :turned], theta, first), x[..., turned:]), -1)
                for x in (q, k)
            )
            cache[0, :, rows], cache[1, :, rows] = k, v
            mixed = attend(q, cache[0, :, :end], cache[1, :, :end], everything)
            x = x + mixed @ get("attn_out").T
            h = rms_norm(x, get("ff_norm"), eps)
            if self.feed_forward is not None:
                name = f"model.layers.{layer}.mlp"
                x = x + self.feed_forward(self.config, self.weights, name, h)
                continue
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
    choose: Choose,
    dual: bool,
    refresh: int,
    shifted: bool = False,
) -> tuple[list[int], list[int]]:
    """Greedy decoding that forwards the whole canvas in some steps only.

    Args:
        choose: as for ``dense_reference.decode``.
        dual: whether the other steps forward the open block alone, and not all that
            is not before it.
        refresh: steps of a block from one that forwards the whole canvas to the next.
        shifted: whether row ``i - 1`` scores token ``i``. The row before the block is
            that of the last step that forwarded it.

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
            if shifted:
                if first == 0:
                    before = logits[start - 1 :][:1]
                logits = torch.cat((before, logits[start - first : -1]))
            else:
                logits = logits[start - first :]
            logits = logits[:block].clone()
            logits[:, mask_id] = -torch.inf
            confidence, candidate = logits.softmax(-1).max(-1)
            columns = choose(masked, confidence, candidate.tolist(), step, block)
            for column in columns:
                ids[start + column] = int(candidate[column])
    return ids[len(prompt) :][:max_tokens], rows


class Decoded(NamedTuple):
    """What came of a request whose blocks have sub-blocks."""

    tokens: list[int]
    sureness: list[float]  # of each token's logits row, when it was unmasked
    rows: list[list[int]]  # rows of the forwards that unmask, by block


def decode_sub_blocks(
    config: dict[str, Any],
    weights: Weights,
    prompt: list[int],
    max_tokens: int,
    *,
    block: int,
    small_block: int,
    threshold: float,
    shifted: bool,
    keep: bool = True,
    seeds: tuple[int, ...] = (),
    max_model_len: int = 1 << 30,
    feed_forward: FeedForward | None = None,
) -> Decoded:
    """The release's ``generate`` of Fast-dLLM v2, greedy, with both of its caches.

    Blocks are final after a forward of their own; of a shifted model it also has the
    first token of the next one. Sub-blocks are filled from left to right: all tokens
    above the threshold, at least the surest. The mask is no token here.

    Args:
        small_block: positions of a sub-block.
        shifted: whether row ``i - 1`` scores token ``i``. The release knows no other
            case; without the shift a block's first token is one like the others.
        keep: whether a forward after a sub-block's first one has the sub-block alone,
            where no row before it is asked.
        seeds: what the output starts with, the mask where that is open.
        feed_forward: as for `CachedLLaDA`.
    """
    mask_id = config["mask_token_id"]
    stop = min(len(prompt) + max_tokens, max_model_len)
    network = CachedLLaDA(config, weights, stop + block, feed_forward)

    def best(first: int, last: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = network.forward(ids[first:last], first, end)
        logits[:, mask_id] = -torch.inf
        return logits.softmax(-1).max(-1)

    ids, sureness = list(prompt), [1.0] * len(prompt)
    for start in range(0, len(prompt) // block * block, block):
        following = best(start, start + block, start + block)
    rows = []
    while len(ids) < stop:
        start, known = len(ids) // block * block, len(ids) - len(prompt)
        end = min(start + block, max_model_len)
        ids += (*seeds[known:], *[mask_id] * block)[: end - len(ids)]
        sureness += [1.0] * (end - len(sureness))
        if shifted and ids[start] == mask_id:
            sureness[start], ids[start] = (x[-1].item() for x in following)
        rows.append([])
        for left in range(start, end, small_block):
            right, visits = min(left + small_block, end), 0
            while masked := [i for i in range(left, right) if ids[i] == mask_id]:
                whole = visits == 0 or (shifted and ids[left] == mask_id) or not keep
                visits += 1
                first, last = (start, end) if whole else (left, right)
                rows[-1].append(last - first)
                sure, token = best(first, last, end)
                scored_by = {i: max(i - shifted, first) - first for i in masked}
                surest = max(masked, key=lambda i: float(sure[scored_by[i]]))
                for i in masked:
                    if i == surest or float(sure[scored_by[i]]) > threshold:
                        ids[i] = int(token[scored_by[i]])
                        sureness[i] = float(sure[scored_by[i]])
        following = best(start, end, end)
    output = slice(len(prompt), stop)
    return Decoded(ids[output], sureness[output], rows)
