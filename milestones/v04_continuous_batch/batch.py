"""What one forward pass works on.

N tokens of this step   R rows whose logits are wanted
"""
from collections import defaultdict
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


class Rectangle(NamedTuple):
    """Sequences that bring equally many tokens, so that one call attends for all of them."""

    tokens: Tensor  # [S * Q] where their tokens stand among the N, one sequence after the other
    rows: Tensor  # [S] of the cache
    context_len: int  # positions that attention reads, this step's included


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, all sequences end to end; built once, read by every layer."""

    token_ids: Tensor  # [N]
    positions: Tensor  # [N]
    logit_rows: Tensor  # [R] which of the N tokens' logits are wanted
    draws: list[Draw]  # [R] what each of those rows decides
    cache: KVCache  # read and written by attention
    cache_rows: Tensor  # [N] the row of the cache in which each token's key and value are kept
    rectangles: list[Rectangle]  # each sequence is in one


def build_batch(seqs: list[Sequence], cache: KVCache, device: torch.device) -> Batch:
    """Feed each sequence what the cache does not hold yet, one sequence after the other."""
    token_ids, positions, logit_rows, draws, cache_rows = [], [], [], [], []
    equally_long = defaultdict(list)
    for seq in seqs:
        new_ids = seq.new_ids
        end = seq.num_computed + len(new_ids)
        equally_long[len(new_ids)].append((len(token_ids), seq))
        logit_rows.append(len(token_ids) + len(new_ids) - 1)
        draws.append(Draw(seq, seq.num_tokens))
        cache_rows += [seq.row] * len(new_ids)
        token_ids += new_ids
        positions += range(seq.num_computed, end)
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        logit_rows=torch.tensor(logit_rows, device=device, dtype=torch.int64),
        draws=draws,
        cache=cache,
        cache_rows=torch.tensor(cache_rows, device=device),
        rectangles=[build_rectangle(width, members, device) for width, members in equally_long.items()],
    )


def build_rectangle(width: int, members: list[tuple[int, Sequence]], device: torch.device) -> Rectangle:
    """Attention's view of sequences that bring width tokens each; members say where their first token stands."""
    return Rectangle(
        tokens=torch.tensor([first + i for first, _ in members for i in range(width)], device=device),
        rows=torch.tensor([seq.row for _, seq in members], device=device),
        context_len=max(seq.num_computed for _, seq in members) + width,
    )
