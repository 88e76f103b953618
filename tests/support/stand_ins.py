"""What the chapters' Triton kernels compute, by PyTorch: a thousand times faster than Triton's interpreter.

A stand-in takes a launch's arguments, and reads and writes the same elements as the kernel. As in the kernel, the order of
each sum depends on nothing else in the launch. tests/claims/test_v15.py and test_v16.py compare each with its kernel.
"""
import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from shared.verify.pretend_gpu import pretend_gpu


def in_order(a: Tensor, b: Tensor) -> Tensor:
    """a [..., n, K] times b [..., K, m] in float32, summed over K one after another: [..., n, m]."""
    total = torch.zeros(())
    for column, row in zip(a.float().unbind(-1), b.float().unbind(-2), strict=True):
        total = total + column[..., None] * row[..., None, :]
    return total


def norm(out: Tensor, hidden: Tensor, result: Tensor, weight: Tensor, eps: float, ADD: bool, **_) -> None:
    wide = hidden.float()
    if ADD:
        wide = (wide + result.float()).to(hidden.dtype).float()
        hidden.copy_(wide)
    out.copy_(weight.float() * normalized(wide, eps).to(out.dtype).float())


def normalized(wide: Tensor, eps: float) -> Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def rotate(out, q, k, v, cos, sin, q_weight, k_weight, k_cache, v_cache, slots, *rest, NORM: bool, **_) -> None:
    """A row without a slot stores nothing."""
    eps = rest[-1]
    if NORM:
        q, k = (weight * normalized(x.float(), eps).to(x.dtype) for x, weight in ((q, q_weight), (k, k_weight)))
    out.copy_(turned(q, cos, sin))
    stored = slots >= 0
    k_cache.view(-1, *k.shape[1:])[slots[stored]] = turned(k, cos, sin)[stored]
    v_cache.view(-1, *v.shape[1:])[slots[stored]] = v[stored]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(out, lse, q, k_cache, v_cache, tables, starts, lens, *rest, GROUP: int, TILE_KEYS: int, **_) -> None:
    """Each split of each sequence's keys on its own."""
    # Some chapters' kernels have no split_keys.
    scale, num_tokens, num_splits, *split_keys = rest[3:]
    out, lse = out.view(num_splits, num_tokens, *q.shape[1:]), lse.view(num_splits, num_tokens, -1)
    block_size = k_cache.shape[1]
    for s, context_len in enumerate(lens.tolist()):
        first, last = starts[s].item(), starts[s + 1].item()
        positions = torch.arange(context_len - (last - first), context_len)
        width = TILE_KEYS * math.ceil(context_len / (num_splits * TILE_KEYS))
        if any(split_keys):
            [width] = split_keys
        for split in range(num_splits):
            keys = torch.arange(context_len)[split * width : (split + 1) * width]
            if not len(keys):
                out[split, first:last], lse[split, first:last] = 0, -math.inf
                continue
            blocks, offsets = tables[s, keys // block_size].long(), keys % block_size
            k, v = (cache[blocks, offsets].repeat_interleave(GROUP, dim=1).transpose(0, 1) for cache in (k_cache, v_cache))
            scores = in_order(q[first:last].transpose(0, 1), k.transpose(1, 2)) * scale  # [H, Q, n]
            scores = scores.masked_fill(keys > positions[:, None], -math.inf)
            # A query before all of these keys has no weight here, and its result is 0.
            top = scores.amax(-1, keepdim=True)
            weights = (scores - top.nan_to_num(neginf=0)).exp()
            total = in_order(weights, torch.ones(len(keys), 1))
            result = in_order(weights, v) / total.where(total > 0, 1.0)
            out[split, first:last] = result.transpose(0, 1).to(out.dtype)
            lse[split, first:last] = (top + total.log())[..., 0].T


def combine(out: Tensor, parts: Tensor, lse: Tensor, *_, **__) -> None:
    weights = (lse - lse.amax(0).nan_to_num(neginf=0.0)).exp()[..., None]
    total = sum(weights)
    out.copy_(sum(weight * part for weight, part in zip(weights, parts)) / total.where(total > 0, 1.0))


def gate(out: Tensor, gate: Tensor, up: Tensor, *_, **__) -> None:
    wide = gate.float()
    # F.silu computes the last elements of a tensor in another way.
    out.copy_((wide / (1 + torch.exp(-wide))).to(gate.dtype) * up)


def product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_, BIAS: bool, **__) -> None:
    result = in_order(x, weight.T)
    out.copy_(result + bias.float() if BIAS else result)


STAND_INS = {
    "_norm_kernel": norm,
    "_rotate_kernel": rotate,
    "_attend_kernel": attend,
    "_combine_kernel": combine,
    "_gate_kernel": gate,
}
# An exact engine launches these too.
EXACT_STAND_INS = {"_product_kernel": product}


def run_stand_in(kernel, *args, grid, warmup=False, num_warps=None, **constants) -> None:
    """Takes the place of a launch in Triton's interpreter."""
    # All tensors are the CPU's here. Without the simulation between, their operations take a tenth of the time.
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        (STAND_INS | EXACT_STAND_INS)[kernel.__name__](*args, **constants)


@contextlib.contextmanager
def quick_gpu(run=run_stand_in) -> Iterator[list[str]]:
    """As pretend_gpu, but run runs the kernels."""
    from triton.runtime.interpreter import InterpretedFunction

    with mock.patch.object(InterpretedFunction, "run", run), pretend_gpu() as crossings:
        yield crossings
