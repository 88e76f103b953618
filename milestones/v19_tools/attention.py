"""Attention: the only layer in which a token depends on other tokens.

N tokens of this step   S sequences   Q queries each   H query heads   KV key/value heads   G = H / KV
D head_dim   n keys
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch
from .config import ModelConfig
from .layers import Projection, Returning, RMSNorm, products, rotate


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """For each query, average the values of the keys that its mask allows, weighted by the softmax of the scores.

    Args:
        q: [S * Q, H, D], a rectangle: Q queries of each sequence, one sequence after another.
        k, v: [S, n, KV, D]. Query heads i * G to (i + 1) * G - 1 share KV head i.
        mask: [S * Q, n] bool; True where a query attends to a key.
    Returns:
        [S * Q, H, D]; the softmax is taken in float32.
    Source: https://arxiv.org/abs/1706.03762; grouped heads, https://arxiv.org/abs/2305.13245.
    """
    num_seqs, num_keys = k.shape[:2]
    mask = mask.view(num_seqs, 1, -1, num_keys)  # [S, 1, Q, n]
    q = q.unflatten(0, (num_seqs, -1))  # [S, Q, H, D]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # [S, H, Q, D]
    return out.transpose(1, 2).flatten(0, 1)


def store_rotated(
    attention: "Attention",
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: Batch,
) -> Tensor:
    """Normalize queries and keys where the family does, and rotate them; store keys and values, and return the queries."""
    if attention.qk_norm:
        q, k = attention.q_norm(q, batch), attention.k_norm(k, batch)
    batch.cache.write(attention.layer_id, rotate(k, cos, sin), v, batch)
    return rotate(q, cos, sin)


def attend_cached(q: Tensor, layer_id: int, batch: Batch) -> Tensor:
    """Attend over the cache: q [N, H, D] to [N, H, D]."""
    if len(batch.view) == 1:
        [rectangle] = batch.view
        return attend(q, *batch.cache.read(layer_id, rectangle), rectangle.mask)
    out = torch.empty_like(q)
    for rectangle in batch.view:
        tokens = rectangle.tokens
        keys, values = batch.cache.read(layer_id, rectangle)
        out[tokens] = attend(q[tokens], keys, values, rectangle.mask)
    return out


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

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each token, not yet rotated."""
        num_tokens = hidden.shape[0]
        q, k, v = products(hidden, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(num_tokens, -1, self.head_dim)  # [N, H, D]
        k = k.view(num_tokens, -1, self.head_dim)  # [N, KV, D]
        v = v.view(num_tokens, -1, self.head_dim)  # [N, KV, D]
        return q, k, v

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        q = batch.backend.store(self, *self.project(hidden), cos, sin, batch)  # [N, H, D]
        out = batch.backend.attend(q, self.layer_id, batch)  # [N, H, D]
        return self.o_proj(out.flatten(1))
