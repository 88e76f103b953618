"""Attention by Triton kernels. Imported only where it is asked for: Triton is not everywhere.

N tokens of this step   H query heads   KV key/value heads   D head_dim
"""
from torch import Tensor

from ..batch import Batch
from .paged_attention import paged_attention, write_slots


def attend_in_place(q: Tensor, k: Tensor, v: Tensor, layer_id: int, batch: Batch) -> Tensor:
    """Store the step's keys and values, [N, KV, D], then attend over the blocks where they lie: q [N, H, D] to [N, H, D]."""
    k_cache, v_cache = batch.cache.k[layer_id], batch.cache.v[layer_id]
    write_slots(k, v, k_cache, v_cache, batch.slot_mapping)
    return paged_attention(
        q,
        k_cache,
        v_cache,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        batch.max_query_len,
        batch.max_context_len,
    )
