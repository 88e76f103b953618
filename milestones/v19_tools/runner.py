"""Decode steps on tensors that live across steps; on a GPU recorded once for each batch size, and replayed.

S sequences   R rows, at least S   M most blocks of a sequence   BS block_size   E hidden_size
"""
import sys
import time
from array import array
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from .batch import Backend, Batch, Draw, Rows, move
from .cache import KVCache
from .model import CausalLM
from .sequence import Sequence

# The slot of a row that only pads a batch: its key and value are stored nowhere.
NO_SLOT = -1


def choose_sizes(max_num_seqs: int) -> list[int]:
    """The numbers of sequences for which a pass is recorded; a batch is padded to the next of them.

    >>> choose_sizes(21)
    [1, 2, 4, 8, 16, 21]
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class Runner:
    """Runs steps in which each sequence feeds one token. Their tensors are allocated once, and overwritten by each step.

    On a GPU, such a step launches the same kernels on the same addresses every time, so it is recorded, and one call
    replays it. A number that Python computed during the recording, such as a tensor's size, is the same in every replay.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        backend: Backend,
        device: torch.device,
        max_num_seqs: int,
        max_model_len: int,
        graphs: bool,
    ):
        self.model = model
        self.cache = cache
        self.backend = backend
        self.device = device
        self.max_model_len = max_model_len
        self.sizes = choose_sizes(max_num_seqs) if graphs else []
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by size: the pass, and its hidden states
        self.pool = None  # the memory of this engine's recordings; only one runs at a time, so they share it
        self.stream = torch.cuda.Stream(device) if graphs else None  # PyTorch's own for recordings is on one GPU only
        shape = max_num_seqs, max_model_len, cache.block_size
        # A copy from pinned memory does not make Python wait for the GPU.
        self.written = Rows(*shape, torch.device("cpu"), pinned=device.type == "cuda")
        self.read = Rows(*shape, device) if device.type == "cuda" else self.written
        self.indices = torch.arange(max_num_seqs, device=device)
        # On a few numbers, NumPy's operations take less time than PyTorch's; both see the same memory.
        self.arrays = self.written.numpy()
        self.row_ids = np.arange(max_num_seqs)
        # By row: the block table that it holds, and how many of its blocks.
        self.tables: list[tuple[array | None, int]] = [(None, 0)] * max_num_seqs

    def accepts(self, seqs: list[Sequence]) -> bool:
        """Whether each sequence feeds one token, its last."""
        return all(seq.num_computed == len(seq.token_ids) - 1 for seq in seqs)

    def build(self, seqs: list[Sequence]) -> Batch:
        """The batch that feeds the last token of each sequence; valid until the next one is built."""
        num_seqs, block_size = len(seqs), self.cache.block_size
        size = self.size_of(num_seqs)
        rows = self.arrays
        changed = self.update_tables(seqs)
        positions = rows.positions[:num_seqs]
        rows.token_ids[:num_seqs] = [seq.token_ids[-1] for seq in seqs]
        positions[:] = [seq.num_computed for seq in seqs]
        rows.context_lens[:num_seqs] = positions + 1
        offsets = positions % block_size
        blocks = rows.block_tables[self.row_ids[:num_seqs], positions // block_size].astype(np.int64)
        rows.slots[:num_seqs] = blocks * block_size + offsets
        # The rows that pad the batch have no context and no slot.
        rows.token_ids[num_seqs:size] = rows.positions[num_seqs:size] = rows.context_lens[num_seqs:size] = 0
        rows.slots[num_seqs:size] = NO_SLOT
        if self.read is not self.written:
            # The last step has waited for its tokens, so the GPU has finished the copies before these.
            self.read.memory.copy_(self.written.memory, non_blocking=True)
            for row in changed:
                self.read.block_tables[row].copy_(self.written.block_tables[row], non_blocking=True)
        new_blocks = move(torch.from_numpy(blocks[offsets == 0]), self.device)
        draws = [Draw(seq, len(seq.token_ids)) for seq in seqs]
        return self.batch_of(num_seqs, draws, new_blocks, max_context_len=int(rows.context_lens[:num_seqs].max()))

    def size_of(self, num_seqs: int) -> int:
        """The number of rows of a batch, with those that pad it; without recordings there are none."""
        return next((size for size in self.sizes if size >= num_seqs), num_seqs)

    def update_tables(self, seqs: list[Sequence]) -> list[int]:
        """Write to each sequence's row the blocks that its block table has gained; return the rows that have changed."""
        changed = []
        for row, seq in enumerate(seqs):
            table, held = self.tables[row]
            count = len(seq.block_table)
            if table is not seq.block_table:
                # The row was another sequence's, or this one's before it was preempted. What is not used is read too.
                self.arrays.block_tables[row] = seq.block_table[0]
                held = 0
            if held < count:
                self.arrays.block_tables[row, held:count] = seq.block_table[held:]
                self.tables[row] = seq.block_table, count
                changed.append(row)
        return changed

    def batch_of(self, size: int, draws: list[Draw], new_blocks: Tensor | None, max_context_len: int) -> Batch:
        """A batch of the first rows."""
        rows = self.read
        return Batch(
            token_ids=rows.token_ids[:size],
            positions=rows.positions[:size],
            logit_rows=self.indices[:size],
            draws=draws,
            cache=self.cache,
            slot_mapping=rows.slots[:size],
            new_blocks=new_blocks,
            backend=self.backend,
            view=self.backend.view_rows(self.written, rows, size, max_context_len),
        )

    def run(self, batch: Batch) -> Tensor:
        """The final hidden states [S, E] of a batch from `build`."""
        if not self.sizes:
            return self.model(batch)
        num_seqs = len(batch.draws)
        size = self.size_of(num_seqs)
        if size not in self.recorded:
            self.record(size)
        graph, hidden = self.recorded[size]
        graph.replay()
        return hidden[:num_seqs]

    def record(self, size: int) -> None:
        """Record the pass of a batch of this size, on what the rows hold."""
        batch = self.batch_of(size, [], None, self.max_model_len)
        with torch.cuda.device(self.device):
            # Libraries and Triton allocate and compile when they first run, which a recording does not allow.
            self.model(batch)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                hidden = self.model(batch)
        self.pool = graph.pool()
        self.recorded[size] = graph, hidden

    def warm_up(self) -> None:
        """Record the pass of every size, on rows that store nothing."""
        if not self.sizes:
            return
        start, free = time.perf_counter(), torch.cuda.mem_get_info(self.device)[0]
        self.written.memory.zero_()
        self.written.slots.fill_(NO_SLOT)
        self.read.memory.copy_(self.written.memory)
        # The largest first: the memory that it needs suffices for the others.
        for number, size in enumerate(reversed(self.sizes), 1):
            if size not in self.recorded:
                self.record(size)
            if sys.stderr.isatty():
                with suppress(OSError):
                    print(f"recorded {number} of {len(self.sizes)} batch sizes", end="\r", file=sys.stderr)
        seconds, nbytes = time.perf_counter() - start, free - torch.cuda.mem_get_info(self.device)[0]
        with suppress(OSError):
            print(f"recorded {len(self.sizes)} batch sizes in {seconds:.1f} s, {nbytes / 2**20:.0f} MiB", file=sys.stderr)
