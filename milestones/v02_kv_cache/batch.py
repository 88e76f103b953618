"""What one forward pass works on.

N tokens of this step   R rows whose logits are wanted
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import KVCache
from .sequence import Sequence


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


def build_batch(seqs: list[Sequence], cache: KVCache, device: torch.device) -> Batch:
    """Feed the one sequence what the cache does not hold yet."""
    [seq] = seqs
    new_ids = seq.new_ids
    end = seq.num_computed + len(new_ids)
    return Batch(
        token_ids=torch.tensor(new_ids, device=device),
        positions=torch.arange(seq.num_computed, end, device=device),
        logit_rows=torch.tensor([len(new_ids) - 1], device=device),
        draws=[Draw(seq, seq.num_tokens)],
        cache=cache,
        context_len=end,
    )
