"""Attention, and what is between the products, by Triton kernels. Imported only when selected, because Triton is not installed everywhere.

N tokens of this step   H query heads   KV key/value heads   D head_dim
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..attention import Attention
from ..batch import Backend, Batch, build_ranges, ranges_of_rows
from ..cache import KVCache
from .fused import rms_norm, rotate_and_write, silu_times
from .paged_attention import paged_attention, warm_up


def where_it_is(function: Callable) -> Callable:
    """The function, called with the GPU of its first argument as the current one."""

    def call(tensor: Tensor, *args) -> Tensor:
        with torch.cuda.device_of(tensor):
            return function(tensor, *args)

    return call


def store_rotated(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: Batch,
) -> Tensor:
    """Normalize queries and keys where the family does, and rotate them; store keys and values, and return the queries."""
    weights = (attention.q_norm.weight, attention.k_norm.weight) if attention.qk_norm else None
    eps = attention.q_norm.eps if attention.qk_norm else 0.0
    k_cache, v_cache = batch.cache.k[attention.layer_id], batch.cache.v[attention.layer_id]
    with torch.cuda.device_of(q):
        return rotate_and_write(q, k, v, cos, sin, weights, eps, k_cache, v_cache, batch.slot_mapping)


def attend_in_place(q: Tensor, layer_id: int, batch: Batch, split_keys: int = 0, tile_rows: int | None = None) -> Tensor:
    """Attend to the blocks in place: q [N, H, D] to [N, H, D]."""
    [ranges] = batch.view
    k_cache, v_cache = batch.cache.k[layer_id], batch.cache.v[layer_id]
    # Triton launches on the thread's current GPU, wherever the tensors are.
    with torch.cuda.device_of(q):
        return paged_attention(
            q,
            k_cache,
            v_cache,
            ranges.block_tables,
            ranges.query_starts,
            ranges.context_lens,
            ranges.max_query_len,
            ranges.max_context_len,
            split_keys=split_keys,
            tile_rows=tile_rows,
        )


def compile_kernels(cache: KVCache, num_heads: int, max_model_len: int) -> None:
    """Compile every kernel of attention that a step of an engine with this cache may launch."""
    with torch.cuda.device_of(cache.k):
        warm_up(cache.k[0], cache.v[0], num_heads, max_model_len)


TRITON = Backend(
    name="triton",
    build_view=build_ranges,
    view_rows=ranges_of_rows,
    norm=where_it_is(rms_norm),
    store=store_rotated,
    attend=attend_in_place,
    gate=where_it_is(silu_times),
    warm_up=compile_kernels,
)


def exact_backend(split_keys: int, tile_rows: int | None = None) -> Backend:
    """The backend triton, with splits that do not depend on how many sequences there are."""
    return TRITON._replace(attend=partial(attend_in_place, split_keys=split_keys, tile_rows=tile_rows))
