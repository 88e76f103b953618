"""From logits to a token.

R rows of logits, one per draw   V vocab_size   A rows among them that ask for something
"""
import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from .params import SamplingParams

NO_TOKEN = -1  # stands for a token where the logits are not finite numbers


def filter_logits(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Apply each row's temperature, then top-k, then top-p; what they drop becomes -inf.

    Args:
        logits: [A, V] float32; not modified.
        params: [A], temperature above 0.
    Returns:
        [A, V], to the bit what transformers' warpers give row by row; but of equal logits all are kept or none,
        where transformers' top-p keeps those that its sort happens to put last.
    Source: top-k, https://arxiv.org/abs/1805.04833; top-p, https://arxiv.org/abs/1904.09751.
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
        # The likeliest token is always kept, and so is the one that crosses p; -1 drops nothing.
        dropped_mass = column([1 - p.top_p if p.top_p < 1 else -1.0 for p in params], logits)  # [A, 1]
        drop = ordered.softmax(-1).cumsum(-1) <= dropped_mass  # [A, V]
        last_kept = ordered.gather(1, drop[:, :-1].sum(-1, keepdim=True))  # [A, 1]
        logits = logits.masked_fill(logits < last_kept, -math.inf)  # [A, V]
    return logits


def ascending(logits: Tensor) -> Tensor:
    """Each row of [A, V] from the smallest to the largest; on a CPU by numpy, whose sort uses vector instructions."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy()))
    return logits.sort().values


def column(values: list, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """One value per row, [A, 1], on like's device, with like's dtype or another."""
    return torch.tensor(values, dtype=dtype or like.dtype, device=like.device)[:, None]


def uniform(seed: int, index: int) -> float:
    """The random number that draws a request's index-th token, in [0, 1): a hash of its arguments.

    It depends on nothing else: not on the batch, nor on the device, nor on how often the token is computed.

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
        draws: [R] whose token at which position each row decides; temperature 0 takes the argmax, and so does a
            token of the prompt, which is known.
    Returns:
        [R] int64 token ids on logits' device; NO_TOKEN where a logit is NaN or +inf, or all are -inf.
    """
    token_ids = logits.argmax(-1)  # [R]
    # If a row has a NaN or +inf, argmax finds it.
    is_finite = logits.gather(1, token_ids[:, None])[:, 0].isfinite()  # [R]
    rows = [row for row, (seq, at) in enumerate(draws) if seq.params.temperature > 0 and not seq.knows(at)]
    if rows:
        drawn = [draws[row] for row in rows]
        probs = filter_logits(logits[rows], [seq.params for seq, _ in drawn]).softmax(-1)  # [A, V]
        # Summed in float64: in float32 the last of many small probabilities would be lost.
        cumulative = probs.double().cumsum(-1)  # [A, V]
        numbers = column([uniform(seq.seed, position - seq.num_prompt) for seq, position in drawn], cumulative)  # [A, 1]
        chosen = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True)  # [A, 1]
        token_ids[rows] = chosen[:, 0]
        # Divided by a low temperature, large logits may overflow.
        is_finite[rows] &= cumulative[:, -1].isfinite()
    return token_ids.where(is_finite, NO_TOKEN)


def top_logprobs(logits: Tensor, draws: list, token_ids: list[int]) -> list[dict[int, float] | None]:
    """The log-probability of each draw's token and of the likeliest ones, by token id; None for who did not ask or has none.

    They are those of the raw logits, [R, V] float32: before temperature and filters.
    """
    reported = [None] * len(draws)
    rows = [
        row for row, (seq, _) in enumerate(draws) if seq.params.logprobs is not None and token_ids[row] != NO_TOKEN
    ]
    if rows:
        logprobs = logits[rows].log_softmax(-1)  # [A, V]
        own_ids = column([token_ids[row] for row in rows], logits, torch.int64)  # [A, 1]
        chosen = logprobs.gather(1, own_ids)[:, 0].tolist()
        top = logprobs.topk(max(draws[row].seq.params.logprobs for row in rows))
        for row, own, values, ids in zip(rows, chosen, top.values.tolist(), top.indices.tolist(), strict=True):
            count = draws[row].seq.params.logprobs
            reported[row] = {token_ids[row]: own} | dict(zip(ids[:count], values[:count], strict=True))
    return reported
