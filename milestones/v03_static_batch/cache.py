"""Keys and values of the tokens already seen.

N tokens of this step   S sequences   L layers   B max_num_seqs   T max_model_len   KV key/value heads   D head_dim
n positions so far
"""
import os

import torch
from torch import Tensor

from .config import ModelConfig


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """The size of one token's keys and values in all layers, in bytes."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def memory_bytes(device: torch.device) -> int:
    """The most bytes that a cache could take: a GPU's free memory or, on a CPU, all of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(kv_bytes: int, device: torch.device, remedy: str) -> None:
    """Raise ValueError if device cannot hold a cache of kv_bytes; remedy ends the message."""
    available = memory_bytes(device)
    if kv_bytes > available:
        needed, there = f"{kv_bytes / 2**30:.1f} GiB", f"{available / 2**30:.1f} GiB"
        raise ValueError(f"the cache needs {needed} of memory, but {device} has {there}; {remedy}")


class KVCache:
    """A slab of keys and values: a row of max_model_len positions for each sequence of a batch.

    The next sequence overwrites what the last one left. A token attends only to positions that its own sequence has
    written, in the same step or an earlier one. Masked positions are read too, and a weight of 0 cancels only finite
    numbers: 0 * NaN is NaN. So a row is cleared when its first position is written.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.kv_bytes = max_num_seqs * max_model_len * kv_bytes_per_token(config, dtype)
        check_memory(self.kv_bytes, device, "lower max_num_seqs or max_model_len")
        shape = (config.num_layers, max_num_seqs, max_model_len, config.num_kv_heads, config.head_dim)
        self.num_used = 0  # the most positions read of any row so far
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # [L, B, T, KV, D]
        self.v = torch.zeros(shape, device=device, dtype=dtype)  # [L, B, T, KV, D]

    def write(self, layer_id: int, k: Tensor, v: Tensor, batch) -> None:
        """Store the step's keys and values, [N, KV, D], in their rows, at their positions."""
        self.k[layer_id, :, : self.num_used].index_fill_(0, batch.new_rows, 0)
        self.v[layer_id, :, : self.num_used].index_fill_(0, batch.new_rows, 0)
        self.k[layer_id][batch.cache_rows, batch.positions] = k
        self.v[layer_id][batch.cache_rows, batch.positions] = v

    def read(self, layer_id: int, batch) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far, [S, n, KV, D]: views, not copies."""
        s, n = batch.num_seqs, batch.context_len
        self.num_used = max(self.num_used, n)
        return self.k[layer_id][:s, :n], self.v[layer_id][:s, :n]
