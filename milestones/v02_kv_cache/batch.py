"""The input of one forward pass.

N tokens of this step   R rows whose logits are needed   n keys
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import KVCache
from .sequence import Sequence


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
    """Build a batch that feeds the new_ids of the one sequence."""
    [seq] = seqs
    end = seq.num_tokens
    new_ids = seq.new_ids
    positions = torch.arange(seq.num_computed, end)
    return Batch(
        token_ids=torch.tensor(new_ids),
        positions=positions,
        logit_rows=torch.tensor([len(new_ids) - 1]),
        draws=[Draw(seq, end)],
        mask=causal_mask(positions, end),
        cache=cache,
        context_len=end,
    )
