"""Which tokens an automaton allows: a walk over the vocabulary's bytes, for each state that a request reaches.

V vocab_size
"""
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from .automaton import DEAD, Automaton

# The masks that are kept take at most this much memory.
MASK_BYTES = 64 * 2**20


class Vocabulary:
    """The bytes of all tokens, arranged so that one step of an automaton is one operation for all of them."""

    def __init__(self, spellings: list[bytes], vocab_size: int, is_first: bool = False):
        """
        Args:
            spellings: the bytes of each token. One that has none is never allowed.
            is_first: whether these are the bytes that tokens add to a text that they begin.
        """
        self.spellings = spellings[:vocab_size]
        self.vocab_size = vocab_size
        self.is_first = is_first
        # The longest first: those that have a byte at some place are then the first so many.
        order = sorted(range(len(self.spellings)), key=lambda token_id: -len(self.spellings[token_id]))
        lengths = [len(self.spellings[token_id]) for token_id in order]
        self.token_ids = np.array(order)
        self.columns: list[np.ndarray] = []  # of each place, the bytes there, uint8
        for place in range(lengths[0]):
            self.columns.append(np.frombuffer(bytes(self.spellings[token_id][place] for token_id, length in zip(order, lengths) if length > place), np.uint8))

    def allowed(self, automaton: Automaton, state: int) -> np.ndarray:
        """For each token, [V] bool, whether its bytes lead from this state to one from which the text can become whole."""
        allowed = np.zeros(self.vocab_size, bool)
        rows = np.arange(len(self.columns[0]), dtype=np.int32)  # tokens whose bytes so far are allowed
        states = np.full(len(rows), state, np.int32)
        table, num_classes = automaton.table.reshape(-1), automaton.table.shape[1]
        for place, column in enumerate(self.columns):
            states = table[states * num_classes + automaton.classes[column[rows]]]
            alive = states != DEAD
            rows, states = rows[alive], states[alive]
            num_longer = len(self.columns[place + 1]) if place + 1 < len(self.columns) else 0
            is_longer = rows < num_longer
            allowed[self.token_ids[rows[~is_longer]]] = True
            rows, states = rows[is_longer], states[is_longer]
        return allowed


class Masks:
    """The masks of the states that were asked for last, packed to a bit a token."""

    def __init__(self, most_bytes: int = MASK_BYTES):
        self.most_bytes = most_bytes
        self.nbytes = 0
        self.kept: OrderedDict[tuple, np.ndarray] = OrderedDict()

    def get(self, key: tuple, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The mask with this key; if it is not kept, make() is called."""
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        mask = self.kept[key] = make()
        self.nbytes += mask.nbytes
        while self.nbytes > self.most_bytes and len(self.kept) > 1:
            self.nbytes -= self.kept.popitem(last=False)[1].nbytes
        return mask
