"""Attention by Triton kernels. Imported only when selected, because Triton is not installed everywhere.

N tokens of this step   H query heads   KV key/value heads   D head_dim
"""
import torch
from torch import Tensor

from ..batch import Backend, Batch, build_ranges
from ..cache import KVCache
from .paged_attention import paged_attention, warm_up, write_slots


def attend_in_place(q: Tensor, k: Tensor, v: Tensor, layer_id: int, batch: Batch) -> Tensor:
    """Store the step's keys and values, [N, KV, D], then attend to the blocks in place: q [N, H, D] to [N, H, D]."""
    [ranges] = batch.view
    k_cache, v_cache = batch.cache.k[layer_id], batch.cache.v[layer_id]
    # Triton launches on the thread's current GPU, wherever the tensors are.
    with torch.cuda.device_of(q):
        write_slots(k, v, k_cache, v_cache, batch.slot_mapping)
        return paged_attention(
            q,
            k_cache,
            v_cache,
            ranges.block_tables,
            ranges.query_starts,
            ranges.context_lens,
            ranges.max_query_len,
            ranges.max_context_len,
        )


def compile_kernels(cache: KVCache, num_heads: int, max_model_len: int) -> None:
    """Compile every kernel that a step of an engine with this cache may launch."""
    with torch.cuda.device_of(cache.k):
        warm_up(cache.k[0], cache.v[0], num_heads, max_model_len)


TRITON = Backend(name="triton", build_view=build_ranges, attend=attend_in_place, warm_up=compile_kernels)
