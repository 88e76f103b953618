"""The input of one forward pass.

N tokens of this step   R rows whose logits are needed   S sequences   Q queries each   n keys
M blocks of the longest sequence   BS block_size
"""
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cache import KVCache
from .sequence import Sequence

# The length, in positions, below which sequences are padded rather than computed apart.
MIN_LEN = 64


class Draw(NamedTuple):
    """The token that one row of logits decides: the token of seq at position."""

    seq: Sequence
    position: int


class Rectangle(NamedTuple):
    """Sequences that feed the same number of tokens, so one call computes attention for all of them."""

    tokens: Tensor  # [S * Q] indices of their tokens among the N, one sequence after another
    block_tables: Tensor  # [S, M] int32, the blocks of each, in order; a shorter table is padded with its own first block
    context_len: int  # positions that attention reads, this step's included
    mask: Tensor  # [S * Q, n] which keys each of these tokens attends to

    def to(self, device: torch.device) -> "Rectangle":
        """The same rectangle with its tensors on device."""
        return self._replace(**on_device(self._asdict(), device))


class Ranges(NamedTuple):
    """All sequences, each as a range of the N tokens, for kernels that locate the queries and keys themselves."""

    block_tables: Tensor  # [S, M] int32
    query_starts: Tensor  # [S + 1] int32; sequence s feeds tokens query_starts[s] to query_starts[s + 1] - 1
    context_lens: Tensor  # [S] int32, positions of each sequence, this step's included
    max_query_len: int  # the most tokens that any sequence feeds
    max_context_len: int

    def to(self, device: torch.device) -> "Ranges":
        """The same ranges with their tensors on device."""
        return self._replace(**on_device(self._asdict(), device))


class Rows:
    """The sequences of a decode step, a row each: what they feed, and what attention reads of them."""

    def __init__(self, num_rows: int, max_len: int, block_size: int, device: torch.device, pinned: bool = False):
        self.block_size = block_size
        # For tensors that do not begin at a multiple of 16 bytes, Triton would compile other variants.
        num_rows += num_rows % 2
        # The first four share their memory, so one copy moves them.
        self.memory = torch.zeros(28 * num_rows, dtype=torch.uint8, device=device, pin_memory=pinned)
        wide = self.memory[: 24 * num_rows].view(torch.int64)
        self.token_ids, self.positions, self.slots = wide.view(3, num_rows).unbind()  # [R]
        self.context_lens = self.memory[24 * num_rows :].view(torch.int32)  # [R]
        max_blocks = -(-max_len // block_size)
        self.block_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device, pin_memory=pinned)  # [R, M]
        self.starts = torch.arange(num_rows + 1, dtype=torch.int32, device=device)  # [R + 1]

    def numpy(self) -> SimpleNamespace:
        """Its tensors as NumPy arrays on the same memory."""
        return SimpleNamespace(**{name: value.numpy() for name, value in vars(self).items() if isinstance(value, Tensor)})


class Backend(NamedTuple):
    """An implementation of attention and of what is between the products. An engine has one, and every batch carries it to the layers."""

    name: str
    build_view: Callable  # (seqs), once per step: what attend reads of the sequences, a list of parts with `to`
    view_rows: Callable  # (written, read, num_seqs, max_context_len): the same of the first rows, in a decode step
    norm: Callable  # (hidden, weight, eps, result): RMSNorm of hidden, to which result is added first, in place, unless None
    store: Callable  # (attention, q, k, v, cos, sin, batch): rotates, stores keys and values, returns the queries [N, H, D]
    attend: Callable  # (q, layer_id, batch): attention over the cache, [N, H, D]
    gate: Callable  # (gate, up): silu(gate) * up, [N, I]
    warm_up: Callable  # (cache, num_heads, max_model_len), before the first step: compiles what steps may launch


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, all sequences end to end; built once on the CPU, read by every layer."""

    token_ids: Tensor  # [N]
    positions: Tensor  # [N]
    logit_rows: Tensor  # [R] which of the N tokens' logits are needed
    draws: list[Draw]  # [R] what each of those rows decides
    cache: KVCache  # read and written by attention
    slot_mapping: Tensor  # [N] the cache slot in which each token's key and value are stored: block * BS + offset
    new_blocks: Tensor  # blocks whose first position is written in this step
    backend: Backend  # computes attention
    view: list[Rectangle] | list[Ranges]  # what the backend reads of the sequences; each is in one part

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on device."""
        moved = on_device(vars(self), device)
        moved["view"] = [part.to(device) for part in self.view]
        return replace(self, **moved)


def on_device(fields: dict, device: torch.device) -> dict:
    """The tensors among the fields, moved to device; other fields are left out."""
    return {name: move(value, device) for name, value in fields.items() if isinstance(value, Tensor)}


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on device. Python does not wait for a GPU: it copies from pinned memory in its own time."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def causal_mask(positions: Tensor, num_keys: int) -> Tensor:
    """The keys that each query attends to, [N, n] bool for queries at positions [N]: its own and all earlier ones.

    >>> causal_mask(torch.tensor([1, 2]), num_keys=3).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    return torch.arange(num_keys) <= positions[:, None]


def build_batch(seqs: list[Sequence], cache: KVCache, backend: Backend) -> Batch:
    """Build a batch that feeds the new_ids of each sequence, one sequence after another."""
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
    """Group the sequences into rectangles: in each, the numbers of new tokens are equal, and no length is twice another.

    A shorter sequence in a rectangle is padded. Up to MIN_LEN positions, that costs less than another rectangle.
    """
    equally_long = defaultdict(list)
    first = 0
    for seq in seqs:
        width = len(seq.new_ids)
        end = seq.num_computed + width
        equally_long[width, (max(end, MIN_LEN) - 1).bit_length()].append((first, seq))
        first += width
    return [build_rectangle(width, members) for (width, _), members in equally_long.items()]


def build_rectangle(width: int, members: list[tuple[int, Sequence]]) -> Rectangle:
    """Build the rectangle of sequences that feed width tokens each; members are (index of first token, sequence)."""
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


def rectangles_of_rows(written: Rows, read: Rows, num_seqs: int, max_context_len: int) -> list[Rectangle]:
    """The rectangles of the first rows, each of which feeds one token."""
    lens = written.context_lens[:num_seqs].numpy()
    classes = np.frexp(np.maximum(lens, MIN_LEN) - 1)[1]  # bit lengths, as in build_rectangles
    rectangles = []
    for each in sorted(set(classes.tolist())):
        members = np.flatnonzero(classes == each)
        context_len = int(lens[members].max())
        tables = written.block_tables[:, : -(-context_len // written.block_size)].numpy()
        rectangle = Rectangle(
            tokens=torch.from_numpy(members),
            block_tables=torch.from_numpy(tables[members]),
            context_len=context_len,
            mask=torch.from_numpy(np.arange(context_len) < lens[members, None]),
        )
        rectangles.append(rectangle.to(read.memory.device))
    return rectangles


def ranges_of_rows(written: Rows, read: Rows, num_seqs: int, max_context_len: int) -> list[Ranges]:
    """A list of one part, the first rows, each of which feeds one token."""
    ranges = Ranges(
        block_tables=read.block_tables[:num_seqs],
        query_starts=read.starts[: num_seqs + 1],
        context_lens=read.context_lens[:num_seqs],
        max_query_len=1,
        max_context_len=max_context_len,
    )
    return [ranges]


def build_ranges(seqs: list[Sequence]) -> list[Ranges]:
    """A list of one part, which holds all sequences."""
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
    """Tables of unequal length as one tensor, [S, M] int32, each padded with its own first block.

    The padding is read too, and a block of another sequence may hold NaN.

    >>> pad_tables([array("i", [5]), array("i", [7, 2])]).tolist()
    [[5, 5], [7, 2]]
    """
    padded = np.empty((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
        row[len(table) :] = table[0]
    return torch.from_numpy(padded)


def find_slots(tables: Tensor, query_lens: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """The slot of each token, [N] int64; sequence s has the next query_lens[s] of positions and row s of tables [S, M].

    >>> find_slots(torch.tensor([[5, 5], [7, 2]]), torch.tensor([1, 2]), torch.tensor([3, 4, 5]), block_size=4).tolist()
    [23, 8, 9]
    """
    rows = torch.arange(len(tables)).repeat_interleave(query_lens)  # [N]
    return tables[rows, positions // block_size] * block_size + positions % block_size
