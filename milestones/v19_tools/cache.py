"""Keys and values of the tokens already seen.

N tokens of this step   S sequences   L layers   P num_blocks   BS block_size   M blocks of the longest sequence
KV key/value heads   D head_dim   n positions so far   W blocks of swap space
"""
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from itertools import takewhile

import torch
from torch import Tensor

from .config import ModelConfig


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """The size of one token's keys and values in all layers, in bytes."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def memory_bytes(device: torch.device) -> int:
    """The most bytes that a cache could take: a GPU's free memory or, on a CPU, all of the machine's memory."""
    if device.type == "cuda":
        # PyTorch keeps memory that was freed, as by joining weights, unless it is told to give it back.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(kv_bytes: int, device: torch.device, remedy: str, what: str = "the cache") -> None:
    """Raise ValueError if device cannot hold kv_bytes; what needs them begins the message, and remedy ends it."""
    available = memory_bytes(device)
    if kv_bytes > available:
        needed, there = f"{kv_bytes / 2**30:.1f} GiB", f"{available / 2**30:.1f} GiB"
        raise ValueError(f"{what} needs {needed} of memory, but {device} has {there}; {remedy}")


class BlockPool:
    """The free blocks, and where to find full ones. A block that is not free belongs to all sequences whose tables hold its id.

    A free block keeps its content until it is allocated. Blocks that cannot be found are allocated first, then the one freed longest ago.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free_ids = OrderedDict.fromkeys(range(num_blocks))  # the next to be allocated is first
        self.num_owners = [0] * num_blocks
        self.key_of: dict[int, bytes] = {}  # by block that can be found
        self.blocks_of: dict[bytes, dict[int, None]] = {}  # by key, the blocks with this content, in order

    @property
    def num_free(self) -> int:
        return len(self.free_ids)

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that num_tokens tokens need.

        >>> [BlockPool(num_blocks=9, block_size=4).blocks_for(n) for n in (0, 1, 4, 5)]
        [0, 1, 1, 2]
        """
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take blocks out of the pool; the caller owns them until `free`.

        Returns block ids in the order in which tokens fill them, an empty list if num_blocks is 0 or less; or None,
        with nothing taken, if too few blocks are free.

        >>> BlockPool(num_blocks=5, block_size=4).allocate(3)
        [0, 1, 2]
        """
        if num_blocks > self.num_free:
            return None
        block_ids = [self.free_ids.popitem(last=False)[0] for _ in range(num_blocks)]
        self.forget(block_ids)
        for block_id in block_ids:
            self.num_owners[block_id] = 1
        return block_ids

    def publish(self, block_id: int, key: bytes) -> None:
        """Let `find` return a full block. Others with the same content may have been published before."""
        self.key_of[block_id] = key
        self.blocks_of.setdefault(key, {})[block_id] = None

    def forget(self, block_ids: Iterable[int]) -> None:
        """Let `find` no longer return these blocks; some may not have been published."""
        for block_id in block_ids:
            key = self.key_of.pop(block_id, None)
            if key is not None:
                del self.blocks_of[key][block_id]
                if not self.blocks_of[key]:
                    del self.blocks_of[key]

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks with these keys, up to the first key that no block has. Takes none of them."""
        return [next(iter(self.blocks_of[key])) for key in takewhile(self.blocks_of.__contains__, keys)]

    def share(self, block_ids: list[int]) -> None:
        """Add an owner to each of these blocks, which may be free."""
        for block_id in block_ids:
            self.num_owners[block_id] += 1
            self.free_ids.pop(block_id, None)

    def free(self, block_ids: list[int] | array) -> None:
        """Remove an owner from each block of a table, the last block first, and add a block without owners to the free list.

        A block that can be found is added to the list's end; another one to its front, because it is of no more use.
        """
        for block_id in reversed(block_ids):
            assert block_id not in self.free_ids, f"block {block_id} is free already"
            self.num_owners[block_id] -= 1
            if self.num_owners[block_id]:
                continue
            self.free_ids[block_id] = None
            self.free_ids.move_to_end(block_id, last=block_id in self.key_of)


class KVCache:
    """Keys and values in blocks of block_size positions; a block belongs to the sequences whose tables hold its id.

    The next owner overwrites what the last one left. A token attends only to positions that its own sequence has
    written, in the same step or an earlier one, or has found full. Masked positions are read too, and a weight of 0 cancels only finite
    numbers: 0 * NaN is NaN. So a block is cleared when its first position is written.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.block_size = block_size
        self.kv_bytes = num_blocks * block_size * kv_bytes_per_token(config, dtype)
        check_memory(self.kv_bytes, device, "lower kv_bytes, num_blocks or block_size")
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # [L, P, BS, KV, D]
        self.v = torch.zeros(shape, device=device, dtype=dtype)  # [L, P, BS, KV, D]

    def write(self, layer_id: int, k: Tensor, v: Tensor, batch) -> None:
        """Store the step's keys and values, [N, KV, D], in their slots."""
        self.k[layer_id].index_fill_(0, batch.new_blocks, 0)
        self.v[layer_id].index_fill_(0, batch.new_blocks, 0)
        self.k[layer_id].flatten(0, 1).index_copy_(0, batch.slot_mapping, k)
        self.v[layer_id].flatten(0, 1).index_copy_(0, batch.slot_mapping, v)

    def read(self, layer_id: int, rectangle) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far, [S, n, KV, D]: copies, because the blocks need not be adjacent."""
        tables, n = rectangle.block_tables, rectangle.context_len
        k = self.k[layer_id].index_select(0, tables.flatten())  # [S * M, BS, KV, D]
        v = self.v[layer_id].index_select(0, tables.flatten())  # [S * M, BS, KV, D]
        shape = len(tables), -1, *k.shape[2:]
        return k.view(shape)[:, :n], v.view(shape)[:, :n]


class SwapSpace:
    """Blocks in CPU memory, for copies of preempted sequences' keys and values.

    With no blocks it stores nothing, so a preempted sequence is computed again.
    """

    def __init__(self, cache: KVCache, num_blocks: int):
        self.cache = cache
        self.pool = BlockPool(num_blocks, cache.block_size)
        num_layers, _, *block_shape = cache.k.shape
        self.k = torch.empty(num_layers, num_blocks, *block_shape, dtype=cache.k.dtype)  # [L, W, BS, KV, D]
        self.v = torch.empty(num_layers, num_blocks, *block_shape, dtype=cache.k.dtype)  # [L, W, BS, KV, D]

    def save(self, block_ids: array, swap_table: array) -> None:
        """Copy blocks of the cache, and add the ids of the copies to swap_table; do nothing if there is no room for all."""
        swap_ids = self.pool.allocate(len(block_ids))
        if not swap_ids:
            return
        swap_table.extend(swap_ids)
        for copies, blocks in ((self.k, self.cache.k), (self.v, self.cache.v)):
            copies[:, swap_ids] = blocks[:, list(block_ids)].to(copies.device)

    def load(self, swap_table: array, block_table: array, num_found: int) -> None:
        """Copy a sequence's keys and values back into the first blocks of its table, except the num_found that were found; free the copies."""
        if num_found < len(swap_table):
            block_ids = list(block_table[num_found : len(swap_table)])
            for copies, blocks in ((self.k, self.cache.k), (self.v, self.cache.v)):
                blocks[:, block_ids] = copies[:, list(swap_table[num_found:])].to(blocks.device)
        self.free(swap_table)

    def free(self, swap_table: array) -> None:
        """Free a sequence's copies, if it has any, and empty its table."""
        self.pool.free(swap_table)
        del swap_table[:]
