"""From logits to a token.

R rows of logits, one per draw   V vocab_size   A rows among them that ask for something
"""
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    >>> SamplingParams(temperature=-1)
    Traceback (most recent call last):
    ValueError: temperature must be a number from 0 (greedy) up, got -1
    """

    max_tokens: int | None = 16  # new tokens at most; None: as many as there is room for
    temperature: float = 0.0  # 0: the likeliest token, always
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together reach this probability
    seed: int | None = None  # None: fresh for each request
    stop_token_ids: tuple[int, ...] = ()  # end the text, besides the checkpoint's own
    ignore_eos: bool = False  # go on after the checkpoint's own
    logprobs: int | None = None  # how many of the likeliest tokens to report; None: off

    def __post_init__(self):
        check_integer("max_tokens", self.max_tokens, 1, optional=True)
        check_integer("top_k", self.top_k, 0)
        check_integer("seed", self.seed, -(2**63), 2**63 - 1, optional=True)
        check_integer("logprobs", self.logprobs, 0, optional=True)
        if not isinstance(self.stop_token_ids, (tuple, list)):
            raise ValueError(f"stop_token_ids must be a tuple of token ids, got {self.stop_token_ids!r}")
        for token_id in self.stop_token_ids:
            check_integer("each of stop_token_ids", token_id, 0)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        if not is_number(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature must be a number from 0 (greedy) up, got {self.temperature!r}")
        # Logits divided by less than this may overflow float32.
        if 0 < self.temperature < 1e-30:
            raise ValueError(f"temperature {self.temperature!r} is too small to divide by; use 0 for greedy")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (off), got {self.top_p!r}")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_integer(name: str, value: object, low: int, high: int | None = None, optional: bool = False) -> None:
    """Raise ValueError unless value is an integer from low to high, or None where that is allowed."""
    if value is None and optional:
        return
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        upper = "up" if high is None else f"to {high}"
        raise ValueError(f"{name} must be an integer from {low} {upper}{' or None' * optional}, got {value!r}")


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
        rank = torch.tensor(ranks, device=logits.device)[:, None]  # [A, 1]
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


def column(values: list[float], like: Tensor) -> Tensor:
    """One value a row, [A, 1], with like's dtype and device."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def uniform(seed: int, index: int) -> float:
    """The die of a request's index-th token, in [0, 1): a hash of its arguments.

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
        draws: [R] whose token at which position each row decides; temperature 0 takes the argmax.
    Returns:
        [R] int64 token ids on logits' device.
    """
    token_ids = logits.argmax(-1)  # [R]
    rows = [row for row, (seq, _) in enumerate(draws) if seq.params.temperature > 0]
    if rows:
        asked = [draws[row] for row in rows]
        probs = filter_logits(logits[rows], [seq.params for seq, _ in asked]).softmax(-1)  # [A, V]
        # Summed in float64: in float32 the last of many small probabilities would be lost.
        reached = probs.double().cumsum(-1)  # [A, V]
        dice = column([uniform(seq.seed, position - seq.num_prompt) for seq, position in asked], reached)  # [A, 1]
        chosen = torch.searchsorted(reached, dice * reached[:, -1:], right=True)  # [A, 1]
        token_ids[rows] = chosen[:, 0]
    return token_ids


def top_logprobs(logits: Tensor, draws: list, token_ids: list[int]) -> list[dict[int, float] | None]:
    """The log-probability of each draw's token and of the likeliest ones, by token id; None for who did not ask.

    They are those of the raw logits, [R, V] float32: before temperature and filters.
    """
    found = [None] * len(draws)
    rows = [row for row, (seq, _) in enumerate(draws) if seq.params.logprobs is not None]
    if rows:
        logprobs = logits[rows].log_softmax(-1)  # [A, V]
        own_ids = torch.tensor([token_ids[row] for row in rows], device=logits.device)[:, None]  # [A, 1]
        chosen = logprobs.gather(1, own_ids)[:, 0].tolist()
        top = logprobs.topk(max(draws[row].seq.params.logprobs for row in rows))
        for row, own, values, ids in zip(rows, chosen, top.values.tolist(), top.indices.tolist(), strict=True):
            count = draws[row].seq.params.logprobs
            found[row] = {token_ids[row]: own} | dict(zip(ids[:count], values[:count], strict=True))
    return found
