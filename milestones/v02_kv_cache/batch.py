"""What one forward pass works on.

N tokens of this step   R rows whose logits are wanted   n keys
"""
from dataclasses import dataclass, replace
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
    """The tokens of one step, all sequences end to end; built once on the CPU, read by every layer."""

    token_ids: Tensor  # [N]
    positions: Tensor  # [N]
    logit_rows: Tensor  # [R] which of the N tokens' logits are wanted
    draws: list[Draw]  # [R] what each of those rows decides
    mask: Tensor  # [N, n] which keys each token attends to
    cache: KVCache  # read and written by attention
    context_len: int  # positions that attention reads, this step's included

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on device."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            logit_rows=self.logit_rows.to(device),
            mask=self.mask.to(device),
        )


def causal_mask(positions: Tensor, num_keys: int) -> Tensor:
    """Which keys each query attends to, [..., n] bool for queries at positions [...]: its own and those before it.

    >>> causal_mask(torch.tensor([1, 2]), num_keys=3).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.arange(num_keys) <= positions[..., None]


def build_batch(seqs: list[Sequence], cache: KVCache) -> Batch:
    """Feed the one sequence what the cache does not hold yet."""
    [seq] = seqs
    new_ids = seq.new_ids
    end = seq.num_computed + len(new_ids)
    positions = torch.arange(seq.num_computed, end)
    return Batch(
        token_ids=torch.tensor(new_ids),
        positions=positions,
        logit_rows=torch.tensor([len(new_ids) - 1]),
        draws=[Draw(seq, seq.num_tokens)],
        mask=causal_mask(positions, end),
        cache=cache,
        context_len=end,
    )
