"""What stands between the model's logits and the draw: what a request adds to them, takes from them, and forbids.

R rows of logits, one per draw   V vocab_size   A rows among them that change   K tokens of those rows that change
"""
import math
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from .batch import Draw, move
from .sampling import column
from .sequence import Sequence


def adjust(logits: Tensor, draws: list[Draw]) -> Tensor:
    """The logits from which each draw's token is chosen, [R, V] float32; the given ones are not modified.

    In the order of transformers: bias, penalties, forbidden tokens, grammars. A row of a token that is known stays as it is.
    """
    rows = {row: seq for row, (seq, position) in enumerate(draws) if seq.adjusts_logits and not seq.knows(position)}
    if not rows:
        return logits
    logits = logits.clone()
    add_bias(logits, rows)
    penalize(logits, rows)
    forbid(logits, rows)
    mask(logits, rows)
    return logits


def places(pairs: list[tuple[int, list[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and token ids [K] as an index of logits, for pairs of a row and its token ids."""
    rows = np.repeat([row for row, _ in pairs], [len(ids) for _, ids in pairs])
    ids = np.fromiter(chain.from_iterable(ids for _, ids in pairs), np.int64, len(rows))
    return move(torch.from_numpy(rows), device), move(torch.from_numpy(ids), device)


def spread(values: list, pairs: list[tuple[int, list[int]]], like: Tensor) -> Tensor:
    """One value per pair, repeated for each of its token ids, [K]."""
    repeated = np.repeat(np.array(values, np.float32), [len(ids) for _, ids in pairs])
    return move(torch.from_numpy(repeated), like.device)


def add_bias(logits: Tensor, rows: dict[int, Sequence]) -> None:
    """Add logit_bias to the logits of its tokens."""
    biased = {row: seq.params.logit_bias for row, seq in rows.items() if seq.params.logit_bias}
    if biased:
        index = places([(row, list(bias)) for row, bias in biased.items()], logits.device)
        values = list(chain.from_iterable(bias.values() for bias in biased.values()))
        logits[index] += column(values, logits)[:, 0]


def penalize(logits: Tensor, rows: dict[int, Sequence]) -> None:
    """Make tokens that are there already less likely: repetition_penalty, then frequency_penalty and presence_penalty.

    Source: repetition, https://arxiv.org/abs/1909.05858, for tokens of prompt and output; frequency and presence, OpenAI's
    API reference, for tokens of the output.
    """
    penalized = {row: seq for row, seq in rows.items() if seq.params.penalizes}
    if not penalized:
        return
    for seq in penalized.values():
        seq.history.read(seq.token_ids, seq.num_prompt)
    pairs = [(row, seq.history.token_ids) for row, seq in penalized.items()]
    index = places(pairs, logits.device)
    counts = np.fromiter(chain.from_iterable(seq.history.counts for seq in penalized.values()), np.float32)
    counts = move(torch.from_numpy(counts), logits.device)  # [K]
    params = [seq.params for seq in penalized.values()]
    repetition, frequency, presence = (
        spread(values, pairs, logits)
        for values in zip(*((each.repetition_penalty, each.frequency_penalty, each.presence_penalty) for each in params))
    )
    values = logits[index]  # [K]
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= frequency * counts
    values -= presence * (counts > 0)
    logits[index] = values


def forbid(logits: Tensor, rows: dict[int, Sequence]) -> None:
    """Set to -inf the tokens that would end a text before min_tokens, or complete one of its bad_words."""
    pairs = [(row, [token_id for token_id in forbidden_ids(seq) if token_id < logits.shape[1]]) for row, seq in rows.items()]
    if any(ids for _, ids in pairs):
        logits[places(pairs, logits.device)] = -math.inf


def forbidden_ids(seq: Sequence) -> Iterator[int]:
    if seq.num_output < seq.params.min_tokens:
        yield from seq.stop_ids
    for *before, last in seq.bad_words:
        if not before or seq.token_ids[-len(before) :] == before:
            yield last


def mask(logits: Tensor, rows: dict[int, Sequence]) -> None:
    """Set to -inf the tokens that a row's grammar does not allow."""
    masked = [row for row, seq in rows.items() if seq.matcher is not None]
    if not masked:
        return
    bits = np.stack([rows[row].matcher.mask() for row in masked])  # a bit for each token, in bytes
    allowed = unpack(bits, logits.device)[:, : logits.shape[1]]  # [A, V]
    index = move(torch.tensor(masked), logits.device)
    logits[index] = logits[index].masked_fill_(~allowed, -math.inf)


def unpack(bits: np.ndarray, device: torch.device) -> Tensor:
    """The bits of each byte, the lowest first, as booleans on device; a GPU unpacks them itself, after an eighth of the copying."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits, axis=1, bitorder="little")).bool()
    bits = move(torch.from_numpy(bits), device)
    return (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1).flatten(1).bool()
