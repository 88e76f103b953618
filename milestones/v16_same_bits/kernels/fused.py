"""What stands between two matrix products, as one Triton kernel each: less to launch, and each value is read once.

Where the parts would round to the model's dtype, the kernels round too; only the order of the sums in a norm
and the last bit of the exponential differ.

N tokens of this step   E hidden_size   I intermediate_size   H query heads   KV key/value heads   D head_dim
P num_blocks   BS block_size
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a row that a program of the gate handles.
TILE = 1024


@triton.jit
def _norm_kernel(
    # tensors, contiguous
    out_ptr,     # [N, E]
    hidden_ptr,  # [N, E]; the sum is stored here
    result_ptr,  # [N, E]; not read unless ADD
    weight_ptr,  # [E]
    # scalars
    eps,
    # compile-time
    ADD: tl.constexpr,
    SIZE: tl.constexpr,         # E
    PADDED_SIZE: tl.constexpr,  # E, rounded up to a power of two
):
    """Program n normalizes row n, to which it first adds the result."""
    n = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, PADDED_SIZE)
    # hides the padding
    mask = offs < SIZE
    dtype = out_ptr.dtype.element_ty
    hidden = tl.load(hidden_ptr + n * SIZE + offs, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        hidden += tl.load(result_ptr + n * SIZE + offs, mask=mask, other=0.0).to(tl.float32)
        hidden = hidden.to(dtype).to(tl.float32)
        tl.store(hidden_ptr + n * SIZE + offs, hidden.to(dtype), mask=mask)
    scaled = hidden * tl.rsqrt(tl.sum(hidden * hidden, axis=0) / SIZE + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = weight * scaled.to(dtype).to(tl.float32)
    tl.store(out_ptr + n * SIZE + offs, out.to(dtype), mask=mask)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, result: Tensor | None = None) -> Tensor:
    """Scale each vector of hidden [N, E] to unit root mean square, then by weight [E]; first add result to hidden, in place.

    Reads N * E elements, or with a result 2 * N * E, and writes as many.
    """
    num_tokens, size = hidden.shape
    assert hidden.is_contiguous() and (result is None or result.is_contiguous())
    out = torch.empty_like(hidden)
    _norm_kernel[(num_tokens,)](
        out, hidden, hidden if result is None else result, weight, eps,
        ADD=result is not None, SIZE=size, PADDED_SIZE=triton.next_power_of_2(size),
    )
    return out


@triton.jit
def _rotate_kernel(
    # tensors
    out_ptr,           # [N, H, D], contiguous; the queries
    q_ptr,             # [N, H, D]
    k_ptr,             # [N, KV, D]
    v_ptr,             # [N, KV, D]
    cos_ptr,           # [N, 1, D / 2], contiguous
    sin_ptr,           # [N, 1, D / 2], contiguous
    q_weight_ptr,      # [D]; not read unless NORM
    k_weight_ptr,      # [D]; not read unless NORM
    k_cache_ptr,       # [P * BS, KV, D], contiguous
    v_cache_ptr,       # [P * BS, KV, D], contiguous
    slot_mapping_ptr,  # [N] int64
    # strides in elements; the last two dimensions are contiguous
    stride_q_n, stride_k_n, stride_v_n,
    # scalars
    eps,
    # compile-time
    NORM: tl.constexpr,
    NUM_HEADS: tl.constexpr,     # H
    NUM_KV_HEADS: tl.constexpr,  # KV
    HALF: tl.constexpr,          # D / 2
    PADDED_HALF: tl.constexpr,   # HALF, rounded up to a power of two
):
    """Program (n, h) handles one head of token n: of its queries, then of its keys, then of its values."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    offs = tl.arange(0, PADDED_HALF)
    # hides the padding
    mask = offs < HALF
    dtype = out_ptr.dtype.element_ty
    slot = tl.load(slot_mapping_ptr + n)
    # a row that only pads the batch stores nothing
    if h >= NUM_HEADS:
        mask = offs < tl.where(slot >= 0, HALF, 0)
    if h < NUM_HEADS:
        source = q_ptr + n * stride_q_n + h * 2 * HALF
        target = out_ptr + (n * NUM_HEADS + h) * 2 * HALF
        weight = q_weight_ptr
    elif h < NUM_HEADS + NUM_KV_HEADS:
        source = k_ptr + n * stride_k_n + (h - NUM_HEADS) * 2 * HALF
        target = k_cache_ptr + (slot * NUM_KV_HEADS + h - NUM_HEADS) * 2 * HALF
        weight = k_weight_ptr
    else:
        source = v_ptr + n * stride_v_n + (h - NUM_HEADS - NUM_KV_HEADS) * 2 * HALF
        target = v_cache_ptr + (slot * NUM_KV_HEADS + h - NUM_HEADS - NUM_KV_HEADS) * 2 * HALF
        weight = k_weight_ptr
    first = tl.load(source + offs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + offs, mask=mask, other=0.0).to(tl.float32)
    if h < NUM_HEADS + NUM_KV_HEADS:
        if NORM:
            scale = tl.rsqrt((tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / (2 * HALF) + eps)
            first_weight = tl.load(weight + offs, mask=mask, other=0.0).to(tl.float32)
            second_weight = tl.load(weight + HALF + offs, mask=mask, other=0.0).to(tl.float32)
            first = (first_weight * (first * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
            second = (second_weight * (second * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        cos = tl.load(cos_ptr + n * HALF + offs, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + n * HALF + offs, mask=mask, other=0.0).to(tl.float32)
        turned = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
        second = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
        first = turned
    tl.store(target + offs, first.to(dtype), mask=mask)
    tl.store(target + HALF + offs, second.to(dtype), mask=mask)


def rotate_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotate queries and keys, store keys and values in their slots, and return the queries, [N, H, D].

    Args:
        q, k, v: [N, H, D], [N, KV, D], [N, KV, D].
        cos, sin: [N, 1, D / 2].
        weights: those of an RMSNorm of each query head and each key head, [D], applied first; None for no norm.
        k_cache, v_cache: [P, BS, KV, D].
        slot_mapping: [N] int64.
    Reads N * (H + 2 * KV) * D elements, and writes as many.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    assert all(x.stride(1) == head_dim and x.stride(2) == 1 for x in (q, k, v))
    out = torch.empty(num_tokens, num_heads, head_dim, device=q.device, dtype=q.dtype)
    q_weight, k_weight = weights or (q, k)
    _rotate_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
        out, q, k, v, cos, sin, q_weight, k_weight, k_cache, v_cache, slot_mapping,
        q.stride(0), k.stride(0), v.stride(0),
        eps,
        NORM=weights is not None, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2, PADDED_HALF=triton.next_power_of_2(head_dim // 2), num_warps=1, enable_fp_fusion=False,
    )
    return out


@triton.jit
def _gate_kernel(
    # tensors
    out_ptr,   # [N, I], contiguous
    gate_ptr,  # [N, I]
    up_ptr,    # [N, I]
    # strides in elements; the last dimension is contiguous
    stride_gate_n, stride_up_n,
    # compile-time
    SIZE: tl.constexpr,  # I
    TILE: tl.constexpr,
):
    """Program (n, i) handles tile i of row n."""
    n = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * TILE + tl.arange(0, TILE)
    # hides what is past the end of the row
    mask = offs < SIZE
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + n * stride_gate_n + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + n * stride_up_n + offs, mask=mask, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + n * SIZE + offs, (silu * up).to(dtype), mask=mask)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [N, I]. Reads 2 * N * I elements, and writes N * I."""
    num_tokens, size = gate.shape
    assert gate.stride(1) == up.stride(1) == 1
    out = torch.empty(num_tokens, size, device=gate.device, dtype=gate.dtype)
    _gate_kernel[(num_tokens, triton.cdiv(size, TILE))](
        out, gate, up, gate.stride(0), up.stride(0), SIZE=size, TILE=TILE,
    )
    return out
