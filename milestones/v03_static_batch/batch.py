"""The input of one forward pass.

N tokens of this step   R rows whose logits are needed   n keys
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import KVCache
from .sequence import Sequence

# Fills rows that are shorter than the rectangle. Any token would do, because its logits are never computed.
PAD_ID = 0


class Draw(NamedTuple):
    """The token that one row of logits decides: the token of seq at position."""

    seq: Sequence
    position: int


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, all sequences end to end; built once on the CPU, read by every layer."""

    token_ids: Tensor  # [N]
    positions: Tensor  # [N]
    logit_rows: Tensor  # [R] which of the N tokens' logits are needed
    draws: list[Draw]  # [R] what each of those rows decides
    mask: Tensor  # [N, n] which keys each token attends to
    cache: KVCache  # read and written by attention
    context_len: int  # positions that attention reads, this step's included
    num_seqs: int  # rows of the rectangle, all of the same width
    cache_rows: Tensor  # [N] the cache row in which each token's key and value are stored
    new_rows: Tensor  # rows of sequences that start in this step

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on device."""
        moved = on_device(vars(self), device)
        return replace(self, **moved)


def on_device(fields: dict, device: torch.device) -> dict:
    """The tensors among the fields, moved to device; other fields are left out."""
    return {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}


def causal_mask(positions: Tensor, num_keys: int) -> Tensor:
    """The keys that each query attends to, [N, n] bool for queries at positions [N]: its own and all earlier ones.

    >>> causal_mask(torch.tensor([1, 2]), num_keys=3).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.arange(num_keys) <= positions[:, None]


def build_batch(seqs: list[Sequence], cache: KVCache) -> Batch:
    """Build a batch that feeds the new_ids of each sequence, padded on the right to the longest."""
    width = max(len(seq.new_ids) for seq in seqs if not seq.finished)
    token_ids, positions, logit_rows, draws, cache_rows = [], [], [], [], []
    for row, seq in enumerate(seqs):
        # A finished sequence stays in the rectangle: it is fed as many tokens as fit, and nothing is drawn for it.
        new_ids = seq.new_ids[:width]
        if not seq.finished:
            logit_rows.append(len(token_ids) + len(new_ids) - 1)
            draws.append(Draw(seq, seq.num_tokens))
        cache_rows += [row] * width
        token_ids += new_ids + [PAD_ID] * (width - len(new_ids))
        positions += range(seq.num_computed, seq.num_computed + width)
    end = max(positions) + 1
    positions = torch.tensor(positions)
    return Batch(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        draws=draws,
        mask=causal_mask(positions, end),
        cache=cache,
        context_len=end,
        num_seqs=len(seqs),
        cache_rows=torch.tensor(cache_rows),
        new_rows=torch.tensor([row for row, seq in enumerate(seqs) if seq.num_computed == 0], dtype=torch.int64),
    )
