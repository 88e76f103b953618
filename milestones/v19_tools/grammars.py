"""What a request's text must follow: grammars are compiled once, and each request has a matcher of its own."""
import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from math import inf

import numpy as np
from transformers import PreTrainedTokenizerBase

from .automaton import SPECIAL, START, Automaton, compile_node
from .compiler import NotNow, compile_apart, compile_here, try_library
from .guidance import ESCAPES, Guidance, GuidanceGrammar, guard_node, most_properties
from .json_schema import Unsupported
from .masks import Masks, Vocabulary
from .params import RequestError, param_of
from .records import Compilation
from .text import drops_first_space, special_tokens, vocabulary_bytes

BACKENDS = ("auto", "own", "llguidance")
# The compiled grammars that are kept, and how many are compiled at a time.
MOST_GRAMMARS, MOST_BYTES, COMPILERS = 256, 64 * 2**20, 2
# How many may wait for their turn, and how long a failure is kept that may be none in a while: for calls that wait, and once one has read it.
MOST_PENDING, UNREAD_S, RETRY_S = 32, 60.0, 5.0
NUMBERS = itertools.count()


class OwnGrammar:
    """An automaton over the bytes of the text."""

    def __init__(self, automaton: Automaton, grammars: "Grammars"):
        self.automaton = automaton
        self.grammars = grammars
        self.number = next(NUMBERS)
        self.nbytes = automaton.nbytes

    def start(self, is_new_text: bool) -> "OwnMatcher":
        return OwnMatcher(self, is_new_text)


class OwnMatcher:
    """How far the text of one request is: a state of the automaton."""

    def __init__(self, grammar: OwnGrammar, is_new_text: bool):
        self.grammar = grammar
        self.state = START
        grammars = grammar.grammars
        self.vocabulary = grammars.first_vocabulary if is_new_text else grammars.vocabulary

    def mask(self) -> np.ndarray:
        """A bit for each token, [V / 8] uint8, whether it is allowed."""
        key = self.grammar.number, self.state, self.vocabulary.is_first
        return self.grammar.grammars.masks.get(key, self.make_mask)

    def make_mask(self) -> np.ndarray:
        automaton = self.grammar.automaton
        allowed = self.vocabulary.allowed(automaton, self.state)
        # The text may end only where it is whole.
        allowed[self.grammar.grammars.end_ids] = automaton.accepting[self.state]
        return np.packbits(allowed, bitorder="little")

    def advance(self, token_id: int) -> bool:
        """Read a token of the text; return whether any other may follow."""
        automaton = self.grammar.automaton
        self.state = automaton.walk(self.state, self.vocabulary.spellings[token_id])
        self.vocabulary = self.grammar.grammars.vocabulary
        return bool(automaton.table[self.state].any())


class Promise(Future):
    """A compiled grammar or an error, once it is there."""

    def __init__(self):
        super().__init__()
        self.wanted: list[Callable[[], bool]] = []  # whether the calls that asked for it still want it
        self.until = inf  # until when it is kept


class Grammars:
    """Compiles grammars, and keeps those that were used last. Any thread may call this."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        end_ids: tuple[int, ...],
        backend: str,
        record: Callable[[Compilation], None],
    ):
        """record is called after each compilation. ValueError if the backend is unknown or not installed."""
        if backend not in BACKENDS:
            raise ValueError(f"grammar_backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.end_ids = [token_id for token_id in end_ids if token_id < vocab_size]
        self.backend = backend
        self.masks = Masks()
        self.kept: OrderedDict[tuple, Promise] = OrderedDict()
        self.lock = threading.RLock()
        self.compilers = ThreadPoolExecutor(COMPILERS, thread_name_prefix="grammar")
        self.record = record
        if backend == "llguidance":
            self.guidance

    @cached_property
    def spellings(self) -> list[bytes]:
        """The bytes of each token; those of a special token say so. Another token with the byte that says it can be part of no text."""
        special = set(special_tokens(self.tokenizer))
        return [
            SPECIAL + raw if token_id in special else b"" if SPECIAL in raw else raw
            for token_id, raw in enumerate(vocabulary_bytes(self.tokenizer))
        ]

    @cached_property
    def drops_space(self) -> bool:
        return drops_first_space(self.tokenizer, self.spellings)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.spellings, self.vocab_size)

    @cached_property
    def first_vocabulary(self) -> Vocabulary:
        """What tokens add to a text that they begin."""
        if not self.drops_space:
            return self.vocabulary
        return Vocabulary([raw.removeprefix(b" ") for raw in self.spellings], self.vocab_size, is_first=True)

    @cached_property
    def guidance(self) -> Guidance:
        return Guidance(self.tokenizer, self.vocab_size, tuple(self.end_ids), self.drops_space)

    @cached_property
    def guard(self) -> OwnGrammar:
        """What all JSON from llguidance must match."""
        return OwnGrammar(compile_here("regex", ESCAPES), self)

    def tokenizer_json(self) -> tuple[str, int]:
        return self.tokenizer.backend_tokenizer.to_str(), self.guidance.num_ids

    def compile_by_library(self, kind: str, source, compile_own: Callable) -> GuidanceGrammar:
        text, param = self.guidance.text(kind, source), param_of(kind, source)
        if compile_own is compile_apart:
            try_library(text, param, self.tokenizer_json)
        grammar = self.guidance.compile(text, param, most_properties(kind, source))
        if kind == "parts":
            return grammar._replace(guard=OwnGrammar(compile_node(guard_node(source)), self))
        return grammar._replace(guard=self.guard) if kind in ("json_schema", "json_object") else grammar

    def warm_up(self) -> None:
        """Arrange the vocabulary, which takes a second for a large one."""
        self.vocabulary, self.first_vocabulary

    def get(self, constraint: tuple):
        """The compiled grammar of a constraint, which is its kind and its source; compiles it if it is not kept.

        RequestError if it is refused.
        """
        with self.lock:
            future, is_new = self.kept.get(constraint), False
            # What exceeded the limits of a process of its own would have none here: only `prepare` has it compiled again.
            if not (future and future.done() and isinstance(future.exception(), NotNow)):
                future, is_new = self.find(constraint)
        if is_new:
            self.compile(future, constraint, compile_here)
        if error := future.exception():
            if future.until < float("inf"):
                future.until = min(future.until, time.monotonic() + RETRY_S)
            # Each raise adds its frames to a traceback, which would keep every prompt that the error has refused.
            raise error.with_traceback(None)
        return future.result()

    def prepare(self, constraints: list[tuple], call: Callable[[], None], is_wanted: Callable[[], bool] = lambda: True) -> bool:
        """Whether all of these are compiled, or refused. If not, that is done in other threads, and then call() is called.

        A grammar that nobody wants any more, when its turn comes, is not compiled.
        """
        with self.lock:
            found = [self.find(constraint) for constraint in dict.fromkeys(constraints)]

            def count(_future: Future) -> None:
                with self.lock:
                    remaining[0] -= 1
                    is_last = not remaining[0]
                if is_last:
                    call()

            num_pending = sum(not future.done() for future in self.kept.values())
            for constraint, (future, is_new) in zip(dict.fromkeys(constraints), found):
                if not future.done():
                    future.wanted.append(is_wanted)
                if is_new and num_pending > MOST_PENDING:
                    message = f"{param_of(*constraint)} would wait for {MOST_PENDING} other grammars to be compiled; try again later"
                    self.end(future, NotNow(message, param_of(*constraint), "queue_full"))
                    future.until = 0.0  # the next call may find fewer
                    self.forget_oldest()
                elif is_new:
                    try:
                        self.compilers.submit(self.compile, future, constraint, compile_apart)
                    except RuntimeError as error:  # there are too many threads
                        self.end(future, error)
            # A call whose grammar was just refused must find that, and not ask anew.
            pending = [future for future, _ in found if not future.done()]
            remaining = [len(pending)]
        for future in pending:
            future.add_done_callback(count)
        return not pending

    def find(self, constraint: tuple) -> tuple[Promise, bool]:
        """The future of a constraint's grammar, and whether it is new, so that the caller must have it compiled."""
        future = self.kept.get(constraint)
        if future is not None and not (future.done() and time.monotonic() > future.until):
            self.kept.move_to_end(constraint)
            return future, False
        future = self.kept[constraint] = Promise()
        return future, True

    def end(self, future: Promise, error: BaseException) -> None:
        """Give a future an error. What may be other in a while is kept only until it has been read; a call reads it after a step, which may be long."""
        if isinstance(error, NotNow) or not isinstance(error, RequestError):
            future.until = time.monotonic() + UNREAD_S
        # A panic of the library is no Exception.
        future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def compile(self, future: Promise, constraint: tuple, compile_own: Callable) -> None:
        began = time.monotonic()
        backend = "none"
        with self.lock:
            if future.wanted and not any(is_wanted() for is_wanted in future.wanted):
                del self.kept[constraint]
                self.end(future, NotNow(f"{param_of(*constraint)} was not compiled, as nobody waited for it any more", param_of(*constraint)))
                return
        try:
            backend, grammar = self.compile_by(constraint, compile_own)
            future.set_result(grammar)
        except BaseException as error:
            self.end(future, error)
            if isinstance(error, KeyboardInterrupt):  # of a caller that compiles in its own thread
                future.until = 0.0
                raise
        self.record(Compilation(backend, time.monotonic() - began))
        with self.lock:
            future.wanted.clear()
            self.forget_oldest()

    def compile_by(self, constraint: tuple, compile_own: Callable) -> tuple[str, object]:
        """The backend that can follow a grammar, and the compiled grammar."""
        kind, source = constraint
        if self.backend == "llguidance":
            return "llguidance", self.compile_by_library(kind, source, compile_own)
        try:
            return "own", OwnGrammar(compile_own(kind, source), self)
        except (Unsupported, NotNow) as error:
            # A long schema may be too large for an automaton. The library walks it.
            if self.backend == "own" or isinstance(error, NotNow) and kind not in ("json_schema", "parts"):
                raise
            try:
                return "llguidance", self.compile_by_library(kind, source, compile_own)
            except NotNow:
                raise
            except (RequestError, ValueError) as other:
                raise RequestError(f"{error}. By llguidance: {other}", error.param) from None

    def forget_oldest(self) -> None:
        """Keep no more than MOST_GRAMMARS and MOST_BYTES, and in any case the newest and those that are not done."""
        done = [(key, future) for key, future in self.kept.items() if future.done()]
        num_done = len(done)
        nbytes = sum(0 if future.exception() else future.result().nbytes for _, future in done)
        for key, future in done[:-1]:
            if num_done <= MOST_GRAMMARS and nbytes <= MOST_BYTES:
                break
            num_done -= 1
            nbytes -= 0 if future.exception() else future.result().nbytes
            del self.kept[key]
