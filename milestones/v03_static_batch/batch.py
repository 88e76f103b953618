"""What one forward pass works on.

N tokens of this step   R rows whose logits are wanted
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import KVCache
from .sequence import Sequence

# Fills rows that are shorter than the rectangle. Any token would do: its logits are not asked for.
PAD_ID = 0


class Draw(NamedTuple):
    """What one row of logits decides: the token of seq at position."""

    seq: Sequence
    position: int


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, all sequences end to end; built once, read by every layer."""

    token_ids: Tensor  # [N]
    positions: Tensor  # [N]
    logit_rows: Tensor  # [R] which of the N tokens' logits are wanted
    draws: list[Draw]  # [R] what each of those rows decides
    cache: KVCache  # read and written by attention
    context_len: int  # positions that attention reads, this step's included
    num_seqs: int  # rows of the rectangle, equally many tokens each
    cache_rows: Tensor  # [N] the row of the cache in which each token's key and value are kept


def build_batch(seqs: list[Sequence], cache: KVCache, device: torch.device) -> Batch:
    """Feed each sequence what the cache does not hold yet, padded on the right to the longest."""
    width = max(len(seq.new_ids) for seq in seqs if not seq.finished)
    token_ids, positions, logit_rows, draws, cache_rows = [], [], [], [], []
    for row, seq in enumerate(seqs):
        # A sequence that has ended rides along: it is fed what there is room for, and nothing is drawn.
        new_ids = seq.new_ids[:width]
        if not seq.finished:
            logit_rows.append(len(token_ids) + len(new_ids) - 1)
            draws.append(Draw(seq, seq.num_tokens))
        cache_rows += [row] * width
        token_ids += new_ids + [PAD_ID] * (width - len(new_ids))
        positions += range(seq.num_computed, seq.num_computed + width)
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        logit_rows=torch.tensor(logit_rows, device=device, dtype=torch.int64),
        draws=draws,
        cache=cache,
        context_len=max(positions) + 1,
        num_seqs=len(seqs),
        cache_rows=torch.tensor(cache_rows, device=device),
    )
