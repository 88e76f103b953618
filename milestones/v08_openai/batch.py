"""What one forward pass works on.

N tokens of this step   R rows whose logits are wanted   S sequences   Q queries each   n keys
M blocks of the longest sequence   BS block_size
"""
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
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
    block_tables: Tensor  # [S, M] int32, the blocks of each, in order; a shorter table is padded with its own first block
    context_len: int  # positions that attention reads, this step's included
    mask: Tensor  # [S * Q, n] which keys each of them attends to

    def to(self, device: torch.device) -> "Rectangle":
        """The same rectangle with its tensors on device."""
        return self._replace(**on_device(self._asdict(), device))


class Ranges(NamedTuple):
    """All sequences, each as a range of the N tokens: for kernels, which find a sequence's queries and keys themselves."""

    block_tables: Tensor  # [S, M] int32
    query_starts: Tensor  # [S + 1] int32; sequence s brings tokens query_starts[s] to query_starts[s + 1] of the N
    context_lens: Tensor  # [S] int32, positions of each sequence, this step's included
    max_query_len: int  # the most tokens that a sequence brings
    max_context_len: int

    def to(self, device: torch.device) -> "Ranges":
        """The same ranges with their tensors on device."""
        return self._replace(**on_device(self._asdict(), device))


class Backend(NamedTuple):
    """A way to attend. An engine has one, and every batch carries it to the layers."""

    name: str
    build_view: Callable  # (seqs): once a step, what attend reads of the sequences, a list of parts that have `to`
    attend: Callable  # (q, k, v, layer_id, batch): in each layer, stores keys and values, and gives the result, [N, H, D]
    warm_up: Callable  # (cache, num_heads, max_model_len): before the first step, compiles what steps may need


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, all sequences end to end; built once on the CPU, read by every layer."""

    token_ids: Tensor  # [N]
    positions: Tensor  # [N]
    logit_rows: Tensor  # [R] which of the N tokens' logits are wanted
    draws: list[Draw]  # [R] what each of those rows decides
    cache: KVCache  # read and written by attention
    slot_mapping: Tensor  # [N] the slot of the cache in which each token's key and value are kept: block * BS + offset
    new_blocks: Tensor  # blocks whose first position is written in this step
    backend: Backend  # attends
    view: list[Rectangle] | list[Ranges]  # how the backend sees the sequences: each is in one

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on device."""
        moved = on_device(vars(self), device)
        moved["view"] = [part.to(device) for part in self.view]
        return replace(self, **moved)


def on_device(fields: dict, device: torch.device) -> dict:
    """Those of the fields that are tensors, moved to device."""
    return {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}


def causal_mask(positions: Tensor, num_keys: int) -> Tensor:
    """Which keys each query attends to, [N, n] bool for queries at positions [N]: its own and those before it.

    >>> causal_mask(torch.tensor([1, 2]), num_keys=3).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.arange(num_keys) <= positions[:, None]


def build_batch(seqs: list[Sequence], cache: KVCache, backend: Backend) -> Batch:
    """Feed each sequence its new_ids, one sequence after the other."""
    token_ids, positions, logit_rows, draws, query_lens = [], [], [], [], []
    for seq in seqs:
        new_ids = seq.new_ids
        end = seq.num_computed + len(new_ids)
        for position in range(seq.first_draw, end + 1):
            logit_rows.append(len(token_ids) + position - 1 - seq.num_computed)
            draws.append(Draw(seq, position))
        query_lens.append(len(new_ids))
        token_ids += new_ids
        positions += range(seq.num_computed, end)
    tables = pad_tables([seq.block_table for seq in seqs])
    positions = torch.tensor(positions)
    slots = find_slots(tables, torch.tensor(query_lens), positions, cache.block_size)
    return Batch(
        token_ids=torch.tensor(token_ids),
        positions=positions,
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
        draws=draws,
        cache=cache,
        slot_mapping=slots,
        new_blocks=slots[positions % cache.block_size == 0] // cache.block_size,
        backend=backend,
        view=backend.build_view(seqs),
    )


def build_rectangles(seqs: list[Sequence]) -> list[Rectangle]:
    """The sequences in as few rectangles as there are different numbers of tokens that they bring."""
    equally_long = defaultdict(list)
    first = 0
    for seq in seqs:
        width = len(seq.new_ids)
        equally_long[width].append((first, seq))
        first += width
    return [build_rectangle(width, members) for width, members in equally_long.items()]


def build_rectangle(width: int, members: list[tuple[int, Sequence]]) -> Rectangle:
    """Sequences that bring width tokens each; members say where their first token stands."""
    columns = torch.arange(width)  # [Q]
    first = torch.tensor([[first] for first, _ in members])  # [S, 1]
    start = torch.tensor([[seq.num_computed] for _, seq in members])  # [S, 1]
    context_len = max(seq.num_computed for _, seq in members) + width
    return Rectangle(
        tokens=(first + columns).flatten(),
        block_tables=pad_tables([seq.block_table for _, seq in members]),
        context_len=context_len,
        mask=causal_mask((start + columns).flatten(), context_len),
    )


def build_ranges(seqs: list[Sequence]) -> list[Ranges]:
    """One part, which has them all."""
    query_lens = [len(seq.new_ids) for seq in seqs]
    context_lens = [seq.num_computed + query_len for seq, query_len in zip(seqs, query_lens, strict=True)]
    ranges = Ranges(
        block_tables=pad_tables([seq.block_table for seq in seqs]),
        query_starts=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
    )
    return [ranges]


def pad_tables(tables: list[array]) -> Tensor:
    """Tables of unequal length as one tensor, [S, M] int32.

    The padding is read too, so it must be a block of the same sequence: another's may hold NaN.

    >>> pad_tables([array("i", [5]), array("i", [7, 2])]).tolist()
    [[5, 5], [7, 2]]
    """
    padded = np.empty((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
        row[len(table) :] = table[0]
    return torch.from_numpy(padded)


def find_slots(tables: Tensor, query_lens: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The slot of each token, [N] int64: of sequence s the next query_lens[s] of positions [N], by row s of tables [S, M].

    >>> find_slots(torch.tensor([[5, 5], [7, 2]]), torch.tensor([1, 2]), torch.tensor([3, 4, 5]), block_size=4).tolist()
    [23, 8, 9]
    """
    rows = torch.arange(len(tables)).repeat_interleave(query_lens)  # [N]
    return tables[rows, positions // block_size] * block_size + positions % block_size
