# SPDX-License-Identifier: Apache-2.0
"""Whole-sequence reference of a block-causal model, in plain torch.

Independent of the plugin and of vLLM: no cache, no pages, no batching. The mask
is built position by position and the decode loop follows SDAR's description.
"""

from collections.abc import Callable
from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, theta: float, first: int = 0) -> torch.Tensor:
    # x: [heads, sequence, dim], of the positions from `first` on
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    positions = first + torch.arange(x.shape[1], dtype=torch.float64)
    angle = positions[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def block_causal_mask(length: int, block: int) -> torch.Tensor:
    """bool [length, length]: query sees every key of its block and before."""
    index = torch.arange(length) // block
    return index[:, None] >= index[None, :]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Grouped-query attention under an explicit mask.

    Args:
        q: [heads, queries, dim].
        k, v: [kv heads, keys, dim].
        mask: bool [queries, keys].

    Returns:
        [queries, heads * dim].
    """
    k, v = (t.repeat_interleave(len(q) // len(k), dim=0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    return mixed.transpose(0, 1).reshape(len(mask), -1)


def gated_mlp(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU with the three matrices under ``name``."""
    gate, up, down = (
        weights[f"{name}.{part}_proj.weight"].T for part in ("gate", "up", "down")
    )
    return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down


# (masked columns, confidence [block], candidates, step, masks of the new block) ->
# columns to unmask.
Choose = Callable[..., list[int]]
FeedForward = Callable[[dict[str, Any], Weights, str, torch.Tensor], torch.Tensor]


def _dense_feed_forward(
    config: dict[str, Any], weights: Weights, name: str, x: torch.Tensor
) -> torch.Tensor:
    return gated_mlp(weights, name, x)


def dense_logits(
    config: dict[str, Any],
    weights: Weights,
    ids: list[int],
    mask: torch.Tensor,
    feed_forward: FeedForward = _dense_feed_forward,
) -> torch.Tensor:
    """Logits [sequence, vocab] of a Qwen3 or Qwen2 network under an explicit mask.

    Args:
        feed_forward: (config, weights, name of the layer's ``mlp``, input) -> output.
    """
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim", config["hidden_size"] // heads)
    n = len(ids)
    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(config["num_hidden_layers"]):

        def get(name: str, layer: int = layer) -> torch.Tensor:
            return weights[f"model.layers.{layer}.{name}.weight"]

        h = rms_norm(x, get("input_layernorm"), eps)
        prefix = f"model.layers.{layer}.self_attn"
        q, k, v = (
            (h @ get(f"self_attn.{name}_proj").T)
            .add(weights.get(f"{prefix}.{name}_proj.bias", 0))
            .view(n, count, dim)
            .transpose(0, 1)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        if f"{prefix}.q_norm.weight" in weights:
            q = rms_norm(q, get("self_attn.q_norm"), eps)
            k = rms_norm(k, get("self_attn.k_norm"), eps)
        q, k = rotate(q, theta), rotate(k, theta)
        x = x + attend(q, k, v, mask) @ get("self_attn.o_proj").T
        h = rms_norm(x, get("post_attention_layernorm"), eps)
        x = x + feed_forward(config, weights, f"model.layers.{layer}.mlp", h)
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def decode(
    config: dict[str, Any],
    weights: Weights,
    prompt: list[int],
    max_tokens: int,
    *,
    block: int,
    choose: Choose,
    max_model_len: int = 1 << 30,
    stop: frozenset[int] = frozenset(),
    logits_of: Callable[..., torch.Tensor] = dense_logits,
) -> tuple[list[int], int]:
    """Greedy decoding, block by block, one whole-sequence forward a step.

    Args:
        choose: the rule.
        logits_of: (config, weights, ids, mask) -> logits [sequence, vocab], row i of
            position i.

    Returns:
        The output tokens and the number of denoising forwards.
    """
    mask_id = config["mask_token_id"]
    ids = list(prompt)
    output: list[int] = []
    forwards = 0
    while True:
        start = len(ids) // block * block
        end = min(start + block, max_model_len)
        first = len(ids)
        opened = end - first
        ids += [mask_id] * opened
        step = 0
        while mask_id in ids[first:]:
            logits = logits_of(
                config, weights, ids, block_causal_mask(len(ids), block)
            )[start:end]
            logits[:, mask_id] = -torch.inf
            confidence, candidate = logits.softmax(-1).max(-1)
            masked = [i - start for i in range(first, end) if ids[i] == mask_id]
            columns = choose(masked, confidence, candidate.tolist(), step, opened)
            assert columns
            for column in columns:
                ids[start + column] = int(candidate[column])
            step += 1
            forwards += 1
        for token in ids[first:end]:
            output.append(token)
            if token in stop or len(output) >= max_tokens:
                return output, forwards
        if end >= max_model_len:
            return output, forwards


def decode_full(
    config: dict[str, Any],
    weights: Weights,
    prompt: list[int],
    max_tokens: int,
    *,
    block: int,
    choose: Choose,
    max_model_len: int = 1 << 30,
    window: int = 1 << 30,
    logits_of: Callable[..., torch.Tensor],
) -> tuple[list[int], int]:
    """Greedy decoding where every position sees every other one (LLaDA, Dream).

    Blocks from the end of the prompt; each step forwards prompt and canvas.

    Args:
        choose: as for ``decode``.
        max_model_len: positions of prompt and canvas at most.
        window: positions from the open block on that are forwarded.
        logits_of: as for ``decode``.

    Returns:
        The output tokens and the number of forwards.
    """
    mask_id = config["mask_token_id"]
    blocks = -(-max_tokens // block)
    ids = prompt + [mask_id] * (blocks * block)
    ids = ids[:max_model_len]
    forwards = 0
    for start in range(len(prompt), len(ids), block):
        end = min(start + block, len(ids))
        for step in range(block):
            masked = [i - start for i in range(start, end) if ids[i] == mask_id]
            if not masked:
                break
            seen = ids[: start + -(-window // block) * block]
            everything = torch.ones((len(seen), len(seen)), dtype=torch.bool)
            logits = logits_of(config, weights, seen, everything)
            logits = logits[start:end]
            logits[:, mask_id] = -torch.inf
            confidence, candidate = logits.softmax(-1).max(-1)
            columns = choose(masked, confidence, candidate.tolist(), step, end - start)
            for column in columns:
                ids[start + column] = int(candidate[column])
            forwards += 1
    return ids[len(prompt) :][:max_tokens], forwards


def streaming_mask(ids: list[int], start: int, mask_id: int) -> torch.Tensor:
    """bool [length, length]: causal, where masks from ``start`` on come last."""
    place = [i + len(ids) * (i >= start and ids[i] == mask_id) for i in range(len(ids))]
    rows = torch.tensor(place)
    return rows[:, None] >= rows[None, :]


def decode_streaming(
    config: dict[str, Any],
    weights: Weights,
    prompt: list[int],
    max_tokens: int,
    *,
    block: int,
    choose: Choose,
    max_model_len: int = 1 << 30,
    logits_of: Callable[..., torch.Tensor] = dense_logits,
    sureness: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[list[int], int]:
    """Greedy decoding in a window of ``block`` positions that moves on (WeDLM).

    Args:
        choose: as for ``decode``.
        sureness: logits [window, vocab] -> what ``choose`` gets for the confidence.

    Returns:
        The output tokens and the number of forwards.
    """
    mask_id = config["mask_token_id"]
    ids, step = list(prompt), 0
    window: list[int] = []
    while len(ids) < min(len(prompt) + max_tokens, max_model_len):
        start = len(ids)
        end = min(start + block, max_model_len)
        window += [mask_id] * (end - start - len(window))
        seen = ids + window
        logits = logits_of(config, weights, seen, streaming_mask(seen, start, mask_id))[
            start:
        ]
        logits[:, mask_id] = -torch.inf
        confidence, candidate = logits.softmax(-1).max(-1)
        if sureness is not None:
            confidence = sureness(logits)
        masked = [i for i, token in enumerate(window) if token == mask_id]
        columns = choose(masked, confidence, candidate.tolist(), step, end - start)
        assert columns
        for column in columns:
            window[column] = int(candidate[column])
        step += 1
        while window and window[0] != mask_id:
            ids.append(window.pop(0))
    return ids[len(prompt) :][:max_tokens], step


def first_alone(choose: Choose) -> Choose:
    """The first position of a block before anything else of it (Fast-dLLM v2)."""

    def choose_first(masked: list[int], *args: Any, **options: Any) -> list[int]:
        step = args[2]
        if masked[0] == 0 and step == 0:
            return [0]
        return choose(masked, *args, **options)

    return choose_first


def choose_static(
    masked: list[int],
    confidence: torch.Tensor,
    candidates: list[int],
    step: int,
    opened: int,
    steps: int | None = None,
) -> list[int]:
    """The schedule alone: ``opened`` masks over ``steps`` steps, remainder first."""
    steps = steps or opened
    count = max(1, opened // steps + (step < opened % steps))
    return sorted(masked, key=lambda i: (-float(confidence[i]), i))[:count]


def choose_threshold(
    masked: list[int],
    confidence: torch.Tensor,
    candidates: list[int],
    step: int,
    opened: int,
    threshold: float = 0.9,
) -> list[int]:
    """Everything above the threshold, at least the surest."""
    above = [i for i in masked if float(confidence[i]) > threshold]
    return above or choose_static(masked, confidence, candidates, 0, 1)


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    """Nats of each row."""
    return torch.distributions.Categorical(logits=logits).entropy()


def choose_near(
    masked: list[int],
    entropy: torch.Tensor,
    candidates: list[int],
    step: int,
    opened: int,
    bound: float = 0.4,
    penalty: float = 0.02,
) -> list[int]:
    """Low entropy, the lower the farther from the first mask; at least the lowest."""
    doubt = {i: float(entropy[i]) + penalty * (i - masked[0]) for i in masked}
    return [i for i in masked if doubt[i] < bound] or [
        min(masked, key=doubt.__getitem__)
    ]
