"""Attention: the only layer in which a token depends on other tokens.

N tokens of this step   H query heads   KV key/value heads   G = H / KV   D head_dim   n keys
"""
import math

import torch
from torch import Tensor, nn

from .batch import Batch
from .config import ModelConfig
from .layers import Projection, Returning, RMSNorm, products, rotate


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """For each query, average the values of the keys that its mask allows, weighted by the softmax of the scores.

    Args:
        q: [N, H, D].
        k, v: [n, KV, D]. Query heads i * G to (i + 1) * G - 1 share KV head i.
        mask: [N, n] bool; True where a query attends to a key.
    Returns:
        [N, H, D]; the softmax is taken in float32.
    Source: https://arxiv.org/abs/1706.03762; grouped heads, https://arxiv.org/abs/2305.13245.
    """
    _, num_kv_heads, head_dim = k.shape
    q = q.unflatten(1, (num_kv_heads, -1))  # [N, KV, G, D]
    scores = torch.einsum("qhgd,khd->hgqk", q, k) / math.sqrt(head_dim)  # [KV, G, N, n]
    scores = scores.masked_fill(~mask, -math.inf)  # [KV, G, N, n]
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)  # [KV, G, N, n]
    return torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2)


class Attention(nn.Module):
    """Grouped-query self-attention."""

    def __init__(self, config: ModelConfig, layer_id: int):
        super().__init__()
        self.layer_id = layer_id
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Projection(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = Projection(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = Projection(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = Returning(q_size, config.hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each token, with queries and keys rotated by its position."""
        num_tokens = hidden.shape[0]
        q, k, v = products(hidden, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(num_tokens, -1, self.head_dim)  # [N, H, D]
        k = k.view(num_tokens, -1, self.head_dim)  # [N, KV, D]
        v = v.view(num_tokens, -1, self.head_dim)  # [N, KV, D]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.project(hidden, cos, sin)
        batch.cache.write(self.layer_id, k, v, batch)
        k, v = batch.cache.read(self.layer_id, batch)
        out = attend(q, k, v, batch.mask)  # [N, H, D]
        return self.o_proj(out.flatten(1))
