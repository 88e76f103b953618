"""An experiment: does a sequence get the same bits alone and whole as in pieces and in company?

N tokens of a pass   E hidden_size   V vocab_size
"""
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .batch import Backend, build_batch
from .cache import KVCache
from .config import ModelConfig
from .model import CausalLM

# The tokens that the sequence under test feeds in each pass: together more than a tile or a split has keys, in any kernel.
PIECES = (1, 1, 2, 3, 5, 11, 13, 17, 100, 130, 33, 7, 1)
# The tokens that each of the others feeds in the same pass.
COMPANY = ((), (1,), (1,) * 5, (1,) * 11, (20, 7), (3,), (), (18, 2), (200, 1), (1, 31, 1), (40,), (1, 150), ())
# Beginning and end of the rows for which the head is computed, to be compared with all of them at once.
HEAD_ROWS = ((0, 1), (3, 5), (1, 8), (2, 16), (0, 32), (32, 33), (0, 100))


@dataclass
class Fed:
    """What a batch reads of a sequence."""

    token_ids: list[int]
    block_table: list[int]
    num_computed: int = 0
    num_scheduled: int = 0

    @property
    def new_ids(self) -> list[int]:
        """The tokens to feed in this pass."""
        return self.token_ids[self.num_computed : self.num_computed + self.num_scheduled]

    @property
    def first_draw(self) -> int:
        """Past the end: no token is drawn."""
        return len(self.token_ids) + 1


def is_exact(model: CausalLM, config: ModelConfig, backend: Backend, block_size: int) -> bool:
    """Whether one decoder layer and the head compute the same bits for a sequence fed whole and alone, and fed in PIECES in COMPANY."""
    numbers = random.Random(0)
    length = sum(PIECES)
    num_others = max(map(len, COMPANY))
    lengths = [length, length] + [sum(counts[i] for counts in COMPANY if i < len(counts)) for i in range(num_others)]
    sizes = [-(-each // block_size) for each in lengths]
    weight = model.model.embed_tokens.weight
    cache = KVCache(replace(config, num_layers=1), sum(sizes), block_size, weight.device, weight.dtype)
    free = random.Random(1).sample(range(sum(sizes)), sum(sizes))
    alone, tested, *others = (
        Fed(numbers.choices(range(config.vocab_size), k=length), [free.pop() for _ in range(size)])
        for length, size in zip(lengths, sizes, strict=True)
    )
    tested.token_ids = alone.token_ids

    whole = feed(model, cache, backend, [(alone, length)])[0]  # [N, E]
    pieces = []
    for count, counts in zip(PIECES, COMPANY, strict=True):
        fed = [*zip(others, counts), (tested, count)]
        place = numbers.randrange(len(fed))
        fed[place], fed[-1] = fed[-1], fed[place]
        pieces.append(feed(model, cache, backend, fed)[place])
    return is_same(whole, torch.cat(pieces)) and is_head_exact(model, whole)


def feed(model: CausalLM, cache: KVCache, backend: Backend, fed: list[tuple[Fed, int]]) -> list[Tensor]:
    """Feed each sequence its next tokens; their hidden states [tokens, E] after one layer and the norm, by sequence."""
    for seq, count in fed:
        seq.num_scheduled = count
    batch = build_batch([seq for seq, _ in fed], cache, backend).to(cache.k.device)
    decoder = model.model
    hidden = decoder.embed_tokens(batch.token_ids)
    hidden = decoder.layers[0](hidden, *decoder.rotary_emb(batch.positions, hidden.dtype), batch)
    for seq, count in fed:
        seq.num_computed += count
    return list(decoder.norm(hidden, batch).split([count for _, count in fed]))


def is_head_exact(model: CausalLM, hidden: Tensor) -> bool:
    """Whether the log-probabilities of a row do not depend on the rows beside it."""
    rows = model.compute_logits(hidden[: max(end for _, end in HEAD_ROWS)]).log_softmax(-1)
    return all(is_same(rows[start:end], model.compute_logits(hidden[start:end]).log_softmax(-1)) for start, end in HEAD_ROWS)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits; unlike ==, this tells 0 from -0, and NaN equals itself.

    >>> is_same(torch.tensor([0.0]), torch.tensor([-0.0]))
    False
    """
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
