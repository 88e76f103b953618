"""From logits to tokens.

R rows of logits, one per draw   V vocab_size   A rows among them to sample, or to report logprobs for
"""
import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from .batch import move
from .params import SamplingParams

NO_TOKEN = -1  # in place of a token id where the logits are not finite numbers


def filter_logits(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Apply each row's temperature, then top-k, top-p and min-p; the logits of dropped tokens become -inf.

    Args:
        logits: [A, V] float32; not modified.
        params: [A], temperature above 0.
    Returns:
        [A, V], bit for bit what transformers' warpers return for each row, except that equal logits are kept or
        dropped together, where transformers' top-p keeps those that its sort happens to put last.
    Source: top-k, https://arxiv.org/abs/1805.04833; top-p, https://arxiv.org/abs/1904.09751;
        min-p, https://arxiv.org/abs/2407.01082.
    """
    temperature = column([p.temperature for p in params], logits)  # [A, 1]
    logits = logits / temperature  # [A, V]
    if any(p.top_k for p in params):
        vocab_size = logits.shape[-1]
        ranks = [min(p.top_k or vocab_size, vocab_size) for p in params]
        ordered = logits.topk(max(ranks)).values
        rank = column(ranks, logits, torch.int64)  # [A, 1]
        last_kept = ordered.gather(1, rank - 1)  # [A, 1]
        logits = logits.masked_fill(logits < last_kept, -math.inf)  # [A, V]
    if any(p.top_p < 1 for p in params):
        ordered = ascending(logits)  # [A, V]
        # The likeliest token is always kept, and so is the one whose probability crosses p; -1 drops nothing.
        dropped_mass = column([1 - p.top_p if p.top_p < 1 else -1.0 for p in params], logits)  # [A, 1]
        drop = ordered.softmax(-1).cumsum(-1) <= dropped_mass  # [A, V]
        last_kept = ordered.gather(1, drop[:, :-1].sum(-1, keepdim=True))  # [A, 1]
        logits = logits.masked_fill(logits < last_kept, -math.inf)  # [A, V]
    if any(p.min_p for p in params):
        probs = logits.softmax(-1)  # [A, V]
        least = column([p.min_p for p in params], logits) * probs.amax(-1, keepdim=True)  # [A, 1]
        logits = logits.masked_fill(probs < least, -math.inf)  # [A, V]
    return logits


def argmax(logits: Tensor) -> Tensor:
    """The index of each row's first largest value, or of its first NaN; found by numpy on a CPU, as in `ascending`."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def ascending(logits: Tensor) -> Tensor:
    """Each row of [A, V] in ascending order; sorted by numpy on a CPU, because its sort uses vector instructions."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy()))
    return logits.sort().values


def column(values: list, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One value per row, [A, 1], on like's device, in dtype or by default in like's."""
    return move(torch.tensor(values, dtype=dtype or like.dtype), like.device)[:, None]


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) that draws a request's output token at index: a hash of the two arguments.

    It does not depend on the batch, on the device, or on how often the token is computed.

    >>> uniform(seed=7, index=0) == uniform(seed=7, index=0) != uniform(seed=7, index=1)
    True
    """
    key = seed.to_bytes(8, "little", signed=True) + index.to_bytes(8, "little")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def sample(logits: Tensor, draws: list) -> Tensor:
    """Choose the token of each draw.

    Args:
        logits: [R, V] float32; not modified.
        draws: [R] the sequence and position that each row decides; temperature 0 takes the argmax, and so does a
            position in the prompt, whose token is known.
    Returns:
        [R] int64 token ids on logits' device; NO_TOKEN where a logit is NaN or +inf, or all are -inf.
    """
    token_ids = argmax(logits)  # [R]
    # If a row has a NaN or +inf, argmax finds it.
    is_finite = logits.gather(1, token_ids[:, None])[:, 0].isfinite()  # [R]
    rows = [row for row, (seq, at) in enumerate(draws) if seq.params.temperature > 0 and not seq.knows(at)]
    if rows:
        drawn = [draws[row] for row in rows]
        # An index on the CPU would make Python wait for the GPU.
        rows = move(torch.tensor(rows), logits.device)  # [A]
        probs = filter_logits(logits[rows], [seq.params for seq, _ in drawn]).softmax(-1)  # [A, V]
        # Sum in float64: in float32, the last of many small probabilities would be lost.
        cumulative = probs.double().cumsum(-1)  # [A, V]
        numbers = column([uniform(seq.seed, position - seq.num_prompt) for seq, position in drawn], cumulative)  # [A, 1]
        chosen = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)  # [A, 1]
        token_ids[rows] = chosen[:, 0]
        # Large logits divided by a low temperature may overflow.
        is_finite[rows] &= cumulative[:, -1].isfinite()
    return token_ids.where(is_finite, NO_TOKEN)


def likeliest(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row [A, V], in descending order, and their token ids; of equal values, those with the smallest ids.

    Returns:
        [A, count] each. `topk` alone would take and order equal values in a way that depends on count.
    """
    values, ids = logprobs.topk(count)
    if not count:
        return values, ids
    last = values[:, -1:]  # [A, 1]
    if ((logprobs >= last).sum(-1) > count).any():
        # Others are as large as the last one. No two of these keys are equal.
        places = torch.arange(logprobs.shape[1], 0, -1, dtype=torch.int32, device=logprobs.device)
        keys = torch.where(logprobs > last, places + len(places), torch.where(logprobs == last, places, 0))
        ids = keys.topk(count).indices
    ids = ids.sort(-1).values
    values, order = logprobs.gather(1, ids).sort(descending=True, stable=True)
    return values, ids.gather(1, order)


def top_logprobs(logits: Tensor, draws: list, token_ids: list[int]) -> list[dict[int, float] | None]:
    """The log-probabilities of each draw's token and of the likeliest ones, by token id, or None for a draw.

    None means that its request does not set logprobs, or that it has NO_TOKEN. The log-probabilities are those of the
    raw logits, [R, V] float32, before temperature and filters.
    """
    reported = [None] * len(draws)
    rows = [
        row for row, (seq, _) in enumerate(draws) if seq.params.logprobs is not None and token_ids[row] != NO_TOKEN
    ]
    if rows:
        logprobs = logits[rows].log_softmax(-1)  # [A, V]
        own_ids = column([token_ids[row] for row in rows], logits, torch.int64)  # [A, 1]
        chosen = logprobs.gather(1, own_ids)[:, 0].tolist()
        values, ids = likeliest(logprobs, max(draws[row].seq.params.logprobs for row in rows))
        for row, own, values, ids in zip(rows, chosen, values.tolist(), ids.tolist(), strict=True):
            count = draws[row].seq.params.logprobs
            reported[row] = {token_ids[row]: own} | dict(zip(ids[:count], values[:count], strict=True))
    return reported
