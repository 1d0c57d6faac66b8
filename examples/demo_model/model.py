# SPDX-License-Identifier: Apache-2.0
"""Small Qwen3-shaped transformer for training, without vLLM or transformers.

Maths as in Qwen3 and SDAR: pre-norm RMSNorm, grouped-query attention with an RMSNorm
per head on q and k before half-split RoPE, SwiGLU, tied output head, explicit
head_dim. Module names give the published weight names. Attention is written as
matmul and softmax, which is faster than SDPA with a boolean mask on CPU.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class ModelConfig:
    vocab_size: int = 512
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 512
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def to_dict(self) -> dict:
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32, cast back."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


def rope_tables(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, L, head_dim] fp32 for integer positions [B, L]."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    inverse = config.rope_theta ** (-half / config.head_dim)
    angles = positions[..., None].float() * inverse
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE on x [B, heads, L, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, self.heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(self.heads * dim, hidden, bias=False)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(dim, config.rms_norm_eps)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q [B, H, Q, D], k and v [B, KV, K, D], bias [B, Q, K] -> [B, Q, H * D]."""
        batch, _, rows, dim = q.shape
        group = self.heads // self.kv_heads
        # Query heads of one group share their key head: fold them into the rows.
        q = (q * dim**-0.5).reshape(batch, self.kv_heads, group * rows, dim)
        scores = (q @ k.transpose(-1, -2)).view(batch, self.heads, rows, -1)
        # Autocast would widen the softmax, by far the largest tensor, to fp32.
        with torch.autocast("cpu", enabled=False):
            weights = (scores + bias[:, None].to(scores.dtype)).softmax(-1)
        out = weights.view(batch, self.kv_heads, group * rows, -1) @ v
        out = out.view(batch, self.heads, rows, dim)
        return out.transpose(1, 2).reshape(batch, rows, self.heads * dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks) -> Tensor:
        """x [B, L, hidden]; ``masks`` is a list of (first row, end row, first key,
        end key, bias [B, rows, keys]): the rows attend to those keys only."""
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        parts = [
            self._attend(q[:, :, r0:r1], k[:, :, k0:k1], v[:, :, k0:k1], bias)
            for r0, r1, k0, k1, bias in masks
        ]
        return self.o_proj(parts[0] if len(parts) == 1 else torch.cat(parts, 1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, masks)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DemoModel(nn.Module):
    """Decoder with tied head; the attention pattern is the caller's choice."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        residual = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                shrunk = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=residual if shrunk else 0.02)

    def forward(self, tokens: Tensor, positions: Tensor, masks, rows=None) -> Tensor:
        """Logits for integer tokens and positions [B, L].

        ``rows``: boolean [B, L]; when given, only those rows are scored and the
        result is [rows.sum(), vocab] instead of [B, L, vocab].
        """
        x = self.model.embed_tokens(tokens)
        cos, sin = rope_tables(positions, self.config)
        for layer in self.model.layers:
            x = layer(x, cos, sin, masks)
        if rows is not None:
            x = x[rows]
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def causal_bias(positions: Tensor, valid: Tensor, block: int | Tensor) -> Tensor:
    """Block-causal additive bias [B, L, L]: 0 where a key may be seen, else -inf.

    positions [B, L] integer, valid [B, L] boolean (False for padding), block size an
    integer or [B, 1]. A key is visible when its block, counted from absolute
    position 0, is not after the row's block; block 1 is ordinary causal attention.
    """
    index = positions // block
    allowed = (index[:, None, :] <= index[:, :, None]) & valid[:, None, :]
    # A padding row sees itself, so that no softmax runs over nothing.
    eye = torch.eye(positions.shape[1], dtype=torch.bool)
    return to_bias(allowed | eye)


def to_bias(allowed: Tensor) -> Tensor:
    """Boolean mask to additive bias, fp32."""
    return torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))
