"""Keys and values of the tokens already seen.

N tokens of this step   L layers   T max_model_len   KV key/value heads   D head_dim   n tokens so far
"""
import torch
from torch import Tensor

from .config import ModelConfig


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take, over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


class KVCache:
    """One sequence's keys and values, in one piece, position by position.

    The next sequence writes over the last one's. What is read is what the sequence has written itself:
    a position is read only after it was written in the same pass or an earlier one.
    """

    def __init__(self, config: ModelConfig, max_model_len: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_layers, max_model_len, config.num_kv_heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # [L, T, KV, D]
        self.v = torch.zeros(shape, device=device, dtype=dtype)  # [L, T, KV, D]

    def write(self, layer_id: int, k: Tensor, v: Tensor, batch) -> None:
        """Store the step's keys and values, [N, KV, D], at its positions."""
        self.k[layer_id][batch.positions] = k
        self.v[layer_id][batch.positions] = v

    def read(self, layer_id: int, batch) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far, [n, KV, D]: views, not copies."""
        return self.k[layer_id][: batch.context_len], self.v[layer_id][: batch.context_len]
