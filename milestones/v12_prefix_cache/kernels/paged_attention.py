"""Paged attention: Triton kernels that read the blocks of the cache in place.

N tokens of this step, all sequences end to end   S sequences   H query heads   KV key/value heads   G = H / KV
D head_dim   P num_blocks   BS block_size   M blocks of the longest sequence   X splits of a long context
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

# The most keys that a program handles at a time, whatever the block size.
TILE_KEYS = 64
# The most bytes in a tile of queries, keys or values: several must fit into shared memory, 64 KiB on some GPUs.
TILE_BYTES = 2**14
TILE_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# A split with fewer keys would cost more to launch and combine than it saves.
MIN_SPLIT_KEYS = 256


def paged_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
) -> Tensor:
    """The reference for `paged_attention`: one sequence at a time, in float32."""
    out = torch.empty_like(q)
    group, head_dim = q.shape[1] // k_cache.shape[2], q.shape[2]
    for s, n in enumerate(context_lens.tolist()):
        first, last = query_starts[s].item(), query_starts[s + 1].item()
        blocks = block_tables[s, : triton.cdiv(n, k_cache.shape[1])].long()
        k = k_cache[blocks].flatten(0, 1)[:n].float().repeat_interleave(group, dim=1)
        v = v_cache[blocks].flatten(0, 1)[:n].float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last].float(), k) * head_dim**-0.5
        positions = torch.arange(n - (last - first), n, device=q.device)
        scores = scores.masked_fill(torch.arange(n, device=q.device) > positions[:, None], -torch.inf)
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)
    return out


@triton.jit
def _write_kernel(
    # tensors
    k_ptr,             # [N, KV, D]
    v_ptr,             # [N, KV, D]
    k_cache_ptr,       # [P * BS, KV * D], contiguous
    v_cache_ptr,       # [P * BS, KV * D], contiguous
    slot_mapping_ptr,  # [N] int64
    # strides in elements; the last dimension is contiguous
    stride_k_n, stride_k_kv,
    stride_v_n, stride_v_kv,
    # compile-time
    HEAD_DIM: tl.constexpr,   # D
    SIZE: tl.constexpr,       # KV * D
    PADDED_SIZE: tl.constexpr,  # SIZE, rounded up to a power of two
):
    """Program n stores the key and value of token n in its slot."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + n)
    offs = tl.arange(0, PADDED_SIZE)
    # hides the padding
    mask = offs < SIZE
    head, offs_d = offs // HEAD_DIM, offs % HEAD_DIM
    k = tl.load(k_ptr + n * stride_k_n + head * stride_k_kv + offs_d, mask=mask)
    v = tl.load(v_ptr + n * stride_v_n + head * stride_v_kv + offs_d, mask=mask)
    tl.store(k_cache_ptr + slot * SIZE + offs, k, mask=mask)
    tl.store(v_cache_ptr + slot * SIZE + offs, v, mask=mask)


def write_slots(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store keys and values, [N, KV, D], in their slots [N] of the caches, [P, BS, KV, D].

    Reads and writes 2 * N * KV * D elements.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and k.stride(2) == v.stride(2) == 1
    size = num_kv_heads * head_dim
    _write_kernel[(num_tokens,)](
        k, v, k_cache, v_cache, slot_mapping,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        HEAD_DIM=head_dim, SIZE=size, PADDED_SIZE=triton.next_power_of_2(size),
    )


# Triton compiles one variant per class of an integer: 1, a multiple of 16, any other. These change from step to step.
@triton.jit(do_not_specialize=["stride_t_s", "num_tokens", "num_splits"])
def _attend_kernel(
    # tensors
    out_ptr,           # [X, N, H, D], contiguous; the result if X = 1, else that of each split
    lse_ptr,           # [X, N, H] float32: log of the sum of exponentials of each split's scores
    q_ptr,             # [N, H, D]
    k_cache_ptr,       # [P, BS, KV, D], contiguous
    v_cache_ptr,       # [P, BS, KV, D], contiguous
    block_tables_ptr,  # [S, M] int32, contiguous
    query_starts_ptr,  # [S + 1] int32
    context_lens_ptr,  # [S] int32, this step's tokens included
    # strides in elements; the last dimension is contiguous
    stride_q_n, stride_q_h,
    stride_t_s,
    # scalars
    scale,
    num_tokens,        # N
    num_splits,        # X
    # compile-time
    GROUP: tl.constexpr,       # G
    NUM_KV_HEADS: tl.constexpr,  # KV
    BLOCK_SIZE: tl.constexpr,  # BS
    HEAD_DIM: tl.constexpr,    # D
    PADDED_DIM: tl.constexpr,  # D, rounded up to a power of two
    TILE_ROWS: tl.constexpr,   # rows of scores: a row is one query of one head
    TILE_KEYS: tl.constexpr,
    TILE_DTYPE: tl.constexpr,  # the dtype in which tiles are multiplied; sums are float32
):
    """Program (s, kv, i) attends from a tile of sequence s's queries, in the query heads of kv, to a split of its keys.

    i is tile * num_splits + split. Products are computed in full precision (ieee), never in TF32.
    """
    # which piece is mine; addresses are int64, because a cache can have more than 2**31 elements
    s = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    split = tl.program_id(2) % num_splits
    tile = tl.program_id(2) // num_splits
    first_query = tl.load(query_starts_ptr + s)
    num_queries = tl.load(query_starts_ptr + s + 1) - first_query
    # the grid is sized for the sequence with the most queries
    if tile * TILE_ROWS >= num_queries * GROUP:
        return
    context_len = tl.load(context_lens_ptr + s)
    offs_r = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    offs_d = tl.arange(0, PADDED_DIM)
    offs_k = tl.arange(0, TILE_KEYS)
    query = offs_r // GROUP
    head = kv * GROUP + offs_r % GROUP
    position = context_len - num_queries + query
    # hides rows past the last query, which belong to the next sequence or to none
    row_mask = query < num_queries
    # hides the padding of D
    dim_mask = offs_d < HEAD_DIM
    token = (first_query + query).to(tl.int64)
    q_offs = token[:, None] * stride_q_n + head[:, None] * stride_q_h + offs_d[None, :]
    q = tl.load(q_ptr + q_offs, mask=row_mask[:, None] & dim_mask[None, :], other=0.0).to(TILE_DTYPE)

    # my keys: a share of the context, at most up to the position of the tile's last query
    tiles_a_split = (context_len + num_splits * TILE_KEYS - 1) // (num_splits * TILE_KEYS)
    begin = split * tiles_a_split * TILE_KEYS
    last_query = tl.minimum((tile * TILE_ROWS + TILE_ROWS - 1) // GROUP, num_queries - 1)
    end = tl.minimum(begin + tiles_a_split * TILE_KEYS, context_len - num_queries + last_query + 1)

    # running softmax over the keys seen so far
    score_max = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    exp_sum = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, PADDED_DIM], tl.float32)  # not yet divided by exp_sum
    for start in range(begin, end, TILE_KEYS):
        key = start + offs_k
        # hides slots past the last key: this sequence's future, empty slots, or another sequence's
        key_mask = key < end
        block = tl.load(block_tables_ptr + s * stride_t_s + key // BLOCK_SIZE, mask=key_mask, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + key % BLOCK_SIZE
        kv_offs = (slot[:, None] * NUM_KV_HEADS + kv) * HEAD_DIM + offs_d[None, :]
        mask = key_mask[:, None] & dim_mask[None, :]
        k = tl.load(k_cache_ptr + kv_offs, mask=mask, other=0.0).to(TILE_DTYPE)
        v = tl.load(v_cache_ptr + kv_offs, mask=mask, other=0.0).to(TILE_DTYPE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        # hides the future
        scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))

        new_max = tl.maximum(score_max, tl.max(scores, axis=1))
        # a row whose position is before all keys so far still has -inf: -inf - -inf would be NaN
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp(score_max - shift)
        weights = tl.exp(scores - shift[:, None])
        exp_sum = exp_sum * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None] + tl.dot(weights.to(TILE_DTYPE), v, input_precision="ieee")
        score_max = new_max

    # a row that has seen no key would get 0 / 0: it gets 0, and an lse of -inf, which means no weight
    out = acc / tl.where(exp_sum == 0.0, 1.0, exp_sum)[:, None]
    row = (split.to(tl.int64) * num_tokens + token) * (NUM_KV_HEADS * GROUP) + head
    out_offs = row[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask[None, :])
    # not read if there is only one split
    lse = tl.where(exp_sum == 0.0, float("-inf"), score_max + tl.log(tl.where(exp_sum == 0.0, 1.0, exp_sum)))
    tl.store(lse_ptr + row, lse, mask=row_mask)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _combine_kernel(
    # tensors
    out_ptr,    # [N, H, D], contiguous
    parts_ptr,  # [X, N, H, D] float32, contiguous
    lse_ptr,    # [X, N, H] float32
    # scalars
    num_rows,   # N * H
    num_splits,  # X
    # compile-time
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
):
    """Program r combines the splits' results for row r, one query of one head, by their shares of the softmax."""
    r = tl.program_id(0).to(tl.int64)
    offs_x = tl.arange(0, PADDED_SPLITS)
    offs_d = tl.arange(0, PADDED_DIM)
    split_mask = offs_x < num_splits
    dim_mask = offs_d < HEAD_DIM
    rows = offs_x.to(tl.int64) * num_rows + r
    lse = tl.load(lse_ptr + rows, mask=split_mask, other=float("-inf"))
    weights = tl.exp(lse - tl.max(lse, axis=0))
    parts = tl.load(
        parts_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :],
        mask=split_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )
    out = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + r * HEAD_DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=dim_mask)


def count_sms(device: torch.device) -> int:
    """A GPU's number of streaming multiprocessors (SMs), each of which runs a few programs at a time; 1 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_splits(num_programs: int, max_context_len: int, num_sms: int) -> int:
    """The number of splits per context that lets even a few sequences keep all SMs busy.

    >>> choose_splits(num_programs=8, max_context_len=4096, num_sms=132), choose_splits(900, 4096, 132)
    (16, 1)
    """
    wanted = 2 * num_sms // num_programs
    return max(1, min(wanted, max_context_len // MIN_SPLIT_KEYS))


def choose_tile(padded_dim: int, itemsize: int) -> int:
    """The number of keys, and the most rows of scores, that a program handles at a time.

    >>> choose_tile(padded_dim=128, itemsize=2), choose_tile(128, 4), choose_tile(256, 4)
    (64, 32, 16)
    """
    return max(16, min(TILE_KEYS, TILE_BYTES // (padded_dim * itemsize)))


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    max_context_len: int,
    num_splits: int | None = None,
) -> Tensor:
    """Compute the attention of each sequence's queries to the keys and values in its blocks.

    Args:
        q: [N, H, D], the sequences' queries end to end; they are at the last positions of each context.
        k_cache, v_cache: [P, BS, KV, D]. Slots past a sequence's context are never read.
        block_tables: [S, M] int32; entry i is the block of positions i * BS to (i + 1) * BS - 1.
        query_starts: [S + 1] int32; sequence s has rows query_starts[s] to query_starts[s + 1] - 1 of q.
        context_lens: [S] int32, positions to attend to, those of q included.
        max_query_len, max_context_len: the most queries and the most positions of any sequence; they size the grid.
        num_splits: splits of each context, each by a program of its own; by default enough to keep the device busy.
    Returns:
        [N, H, D] in q's dtype; accumulated in float32.
    Loads 2 * KV * D elements for each key and tile of queries, because the heads of a group share them.
    Source: https://arxiv.org/abs/2309.06180; online softmax, https://arxiv.org/abs/1805.02867; splits,
    https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    group = num_heads // num_kv_heads
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.is_contiguous() and q.stride(2) == 1
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    tile_keys = choose_tile(padded_dim, q.element_size())
    tile_rows = max(16, triton.next_power_of_2(min(max_query_len * group, tile_keys)))
    num_tiles = triton.cdiv(max_query_len * group, tile_rows)
    num_seqs = len(context_lens)
    if num_splits is None:
        num_programs = num_seqs * num_kv_heads * num_tiles
        num_splits = choose_splits(num_programs, max_context_len, count_sms(q.device))
    out = torch.empty(num_tokens, num_heads, head_dim, device=q.device, dtype=q.dtype)
    parts = torch.empty(num_splits, *out.shape, device=q.device, dtype=torch.float32) if num_splits > 1 else out
    lse = torch.empty(num_splits, num_tokens, num_heads, device=q.device, dtype=torch.float32)
    # The interpreter cannot multiply bfloat16, so 16-bit tiles are multiplied only on a GPU.
    tile_dtype = TILE_DTYPES[q.dtype] if q.is_cuda else tl.float32
    _attend_kernel[(num_seqs, num_kv_heads, num_tiles * num_splits)](
        parts, lse, q, k_cache, v_cache, block_tables, query_starts, context_lens,
        q.stride(0), q.stride(1), block_tables.stride(0),
        head_dim**-0.5, num_tokens, num_splits,
        GROUP=group, NUM_KV_HEADS=num_kv_heads, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, PADDED_DIM=padded_dim,
        TILE_ROWS=tile_rows, TILE_KEYS=tile_keys, TILE_DTYPE=tile_dtype,
    )
    if num_splits > 1:
        _combine_kernel[(num_tokens * num_heads,)](
            out, parts, lse, num_tokens * num_heads, num_splits,
            HEAD_DIM=head_dim, PADDED_DIM=padded_dim, PADDED_SPLITS=triton.next_power_of_2(num_splits),
        )
    return out


def warm_up(k_cache: Tensor, v_cache: Tensor, num_heads: int, max_context_len: int) -> None:
    """Compile every kernel variant that a step may need, by launching each; the contents of the caches stay the same.

    Variants of the attention kernel differ in TILE_ROWS and in the dtype that they write, which is float32 for splits.
    Variants of the combining kernel differ in PADDED_SPLITS.

    Args:
        k_cache, v_cache: [P, BS, KV, D], of one layer.
        num_heads: H.
        max_context_len: the longest context that a step may have; it limits the number of splits.
    """
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    group, device = num_heads // num_kv_heads, k_cache.device
    slot = torch.zeros(1, device=device, dtype=torch.int64)
    write_slots(k_cache[0, :1].clone(), v_cache[0, :1].clone(), k_cache, v_cache, slot)
    max_splits = choose_splits(num_kv_heads, max_context_len, count_sms(device))
    powers = [2**i for i in range(max_splits.bit_length())]  # 1, 2, 4, ... up to max_splits
    for num_queries in {1, *(triton.cdiv(rows, group) for rows in (16, 32, TILE_KEYS))}:
        q = torch.zeros(num_queries, num_heads, head_dim, device=device, dtype=k_cache.dtype)
        # one sequence, whose table has block 0 in every entry
        tables = torch.zeros(1, triton.cdiv(num_queries, block_size), device=device, dtype=torch.int32)
        starts = torch.tensor([0, num_queries], device=device, dtype=torch.int32)
        lens = torch.tensor([num_queries], device=device, dtype=torch.int32)
        for num_splits in {*powers, max_splits}:
            paged_attention(q, k_cache, v_cache, tables, starts, lens, num_queries, num_queries, num_splits)
