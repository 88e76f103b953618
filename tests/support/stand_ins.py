"""What the chapters' Triton kernels compute, by PyTorch: a thousand times faster than Triton's interpreter.

A stand-in takes a launch's arguments, and reads and writes the same elements as the kernel. tests/claims/test_v15.py
compares each with its kernel.
"""
import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from shared.verify.pretend_gpu import pretend_gpu


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
    scale, num_tokens, num_splits = rest[-3:]
    out, lse = out.view(num_splits, num_tokens, *q.shape[1:]), lse.view(num_splits, num_tokens, -1)
    block_size = k_cache.shape[1]
    for s, context_len in enumerate(lens.tolist()):
        first, last = starts[s].item(), starts[s + 1].item()
        positions = torch.arange(context_len - (last - first), context_len)
        width = TILE_KEYS * math.ceil(context_len / (num_splits * TILE_KEYS))
        for split in range(num_splits):
            keys = torch.arange(context_len)[split * width : (split + 1) * width]
            if not len(keys):
                out[split, first:last], lse[split, first:last] = 0, -math.inf
                continue
            blocks, offsets = tables[s, keys // block_size].long(), keys % block_size
            k, v = (cache[blocks, offsets].float().repeat_interleave(GROUP, dim=1) for cache in (k_cache, v_cache))
            scores = torch.einsum("qhd,khd->qhk", q[first:last].float(), k) * scale
            scores = scores.masked_fill((keys > positions[:, None])[:, None], -math.inf)
            sums = scores.logsumexp(-1)
            # A query before all of these keys has no weight here, and its result is 0.
            weights = (scores - sums.nan_to_num(neginf=0)[..., None]).exp()
            out[split, first:last] = torch.einsum("qhk,khd->qhd", weights, v).to(out.dtype)
            lse[split, first:last] = sums


def combine(out: Tensor, parts: Tensor, lse: Tensor, *_, **__) -> None:
    weights = (lse - lse.amax(0).nan_to_num(neginf=0.0)).exp()
    total = weights.sum(0)
    out.copy_((parts * weights[..., None]).sum(0) / total.where(total > 0, 1.0)[..., None])


def gate(out: Tensor, gate: Tensor, up: Tensor, *_, **__) -> None:
    out.copy_(torch.nn.functional.silu(gate.float()).to(gate.dtype) * up)


STAND_INS = {
    "_norm_kernel": norm,
    "_rotate_kernel": rotate,
    "_attend_kernel": attend,
    "_combine_kernel": combine,
    "_gate_kernel": gate,
}


def run_stand_in(kernel, *args, grid, warmup=False, num_warps=None, **constants) -> None:
    """Takes the place of a launch in Triton's interpreter."""
    # All tensors are the CPU's here. Without the simulation between, their operations take a tenth of the time.
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        STAND_INS[kernel.__name__](*args, **constants)


@contextlib.contextmanager
def quick_gpu(run=run_stand_in) -> Iterator[list[str]]:
    """As pretend_gpu, but run runs the kernels."""
    from triton.runtime.interpreter import InterpretedFunction

    with mock.patch.object(InterpretedFunction, "run", run), pretend_gpu() as crossings:
        yield crossings
