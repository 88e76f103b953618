"""Keys and values of the tokens already seen.

N tokens of this step   L layers   T max_model_len   KV key/value heads   D head_dim   n tokens so far
"""
import os

import torch
from torch import Tensor

from .config import ModelConfig


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that one token's keys and values take, over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def check_memory(kv_bytes: int, device: torch.device, remedy: str) -> None:
    """Raise ValueError if a cache of so many bytes cannot be held: on a GPU by what is free, else by what there is."""
    if device.type == "cuda":
        memory_bytes = torch.cuda.mem_get_info(device)[0]
    else:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if kv_bytes > memory_bytes:
        needed, there = f"{kv_bytes / 2**30:.1f} GiB", f"{memory_bytes / 2**30:.1f} GiB"
        raise ValueError(f"the cache would take {needed} of memory, {device} has {there}; {remedy}")


class KVCache:
    """One sequence's keys and values, in one piece, position by position.

    The next sequence writes over the last one's. A token attends only to what its own sequence has written:
    to a position after it was written, in the same pass or an earlier one.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_model_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.kv_bytes = max_model_len * kv_bytes_per_token(config, dtype)
        check_memory(self.kv_bytes, device, "lower max_model_len")
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
