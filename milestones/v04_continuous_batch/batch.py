"""The input of one forward pass.

N tokens of this step   R rows whose logits are needed   S sequences   Q queries each   n keys
"""
from collections import defaultdict
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


class Rectangle(NamedTuple):
    """Sequences that feed the same number of tokens, so one call computes attention for all of them."""

    tokens: Tensor  # [S * Q] indices of their tokens among the N, one sequence after another
    rows: Tensor  # [S] their cache rows
    context_len: int  # positions that attention reads, this step's included
    mask: Tensor  # [S * Q, n] which keys each of these tokens attends to

    def to(self, device: torch.device) -> "Rectangle":
        """The same rectangle with its tensors on device."""
        return self._replace(**on_device(self._asdict(), device))


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, all sequences end to end; built once on the CPU, read by every layer."""

    token_ids: Tensor  # [N]
    positions: Tensor  # [N]
    logit_rows: Tensor  # [R] which of the N tokens' logits are needed
    draws: list[Draw]  # [R] what each of those rows decides
    cache: KVCache  # read and written by attention
    cache_rows: Tensor  # [N] the cache row in which each token's key and value are stored
    new_rows: Tensor  # rows of sequences that start in this step
    view: list[Rectangle]  # the sequences as attention reads them; each is in exactly one rectangle

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on device."""
        moved = on_device(vars(self), device)
        moved["view"] = [part.to(device) for part in self.view]
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
    """Build a batch that feeds the new_ids of each sequence, one sequence after another."""
    token_ids, positions, logit_rows, draws, cache_rows = [], [], [], [], []
    for seq in seqs:
        new_ids = seq.new_ids
        end = seq.num_computed + len(new_ids)
        logit_rows.append(len(token_ids) + len(new_ids) - 1)
        draws.append(Draw(seq, seq.num_tokens))
        cache_rows += [seq.row] * len(new_ids)
        token_ids += new_ids
        positions += range(seq.num_computed, end)
    positions = torch.tensor(positions)
    return Batch(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        draws=draws,
        cache=cache,
        cache_rows=torch.tensor(cache_rows),
        new_rows=torch.tensor([seq.row for seq in seqs if seq.num_computed == 0], dtype=torch.int64),
        view=build_rectangles(seqs),
    )


def build_rectangles(seqs: list[Sequence]) -> list[Rectangle]:
    """Group the sequences into rectangles, one for each distinct number of new tokens."""
    equally_long = defaultdict(list)
    first = 0
    for seq in seqs:
        width = len(seq.new_ids)
        equally_long[width].append((first, seq))
        first += width
    return [build_rectangle(width, members) for width, members in equally_long.items()]


def build_rectangle(width: int, members: list[tuple[int, Sequence]]) -> Rectangle:
    """Build the rectangle of sequences that feed width tokens each; members are (index of first token, sequence)."""
    columns = torch.arange(width)  # [Q]
    first = torch.tensor([[first] for first, _ in members])  # [S, 1]
    start = torch.tensor([[seq.num_computed] for _, seq in members])  # [S, 1]
    context_len = max(seq.num_computed for _, seq in members) + width
    return Rectangle(
        tokens=(first + columns).flatten(),
        rows=torch.tensor([seq.row for _, seq in members]),
        context_len=context_len,
        mask=causal_mask((start + columns).flatten(), context_len),
    )
