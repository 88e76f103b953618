"""The engine behind a thread of its own, and queues between it and the event loop.

Two worlds meet here. The engine's thread steps, and waits for nobody; the event loop answers sockets, and must
never wait for a step. Calls go to the thread through a queue of functions, which it runs between two steps;
outputs come back through `call_soon_threadsafe`, once a step. Neither touches what is the other's.
"""
import asyncio
import copy
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from .engine import Stats, StepOutput
from .sampling import SamplingParams

logger = logging.getLogger(__name__)


class EngineLike(Protocol):
    """All that a server needs of an engine; only the engine's thread calls it."""

    tokenizer: object
    max_model_len: int

    def add_request(self, prompt: list[int], params: SamplingParams) -> int: ...
    def abort_request(self, request_id: int) -> bool: ...
    def has_unfinished_requests(self) -> bool: ...
    def step(self) -> list[StepOutput]: ...
    def fail_step(self) -> list[int]: ...
    def stats(self) -> Stats: ...


class QueueFull(Exception):
    """As many requests wait as may."""


class StepFailed(Exception):
    """The step that worked on this request raised."""


class Generation:
    """The requests of one call, and the queue on which their outputs arrive. Belongs to the event loop."""

    def __init__(self, engine: "AsyncEngine", num_requests: int):
        self.engine = engine
        self.num_requests = num_requests
        self.num_running = num_requests
        self.outputs: asyncio.Queue = asyncio.Queue()
        self.added = engine.loop.create_future()
        self.request_ids: list[int] = []  # belongs to the engine's thread

    async def __aiter__(self) -> AsyncIterator[tuple[int, StepOutput]]:
        """Each new token with the index of its request; StepFailed if a step raised."""
        num_unfinished = self.num_requests
        while num_unfinished:
            item = await self.outputs.get()
            if isinstance(item, Exception):
                raise item
            index, output = item
            num_unfinished -= output.finish_reason is not None
            yield index, output

    def abort(self) -> None:
        """End what still runs; nothing happens if all have ended."""
        self.engine.abort(self)


class AsyncEngine:
    """An engine that many coroutines use at once.

    The methods from `start` to `deliver` run on the event loop, those from `run` to `post` on the engine's thread.
    """

    def __init__(self, engine: EngineLike, max_waiting: int):
        self.engine = engine
        self.max_waiting = max_waiting
        self.max_model_len = engine.max_model_len
        # Tokenizing has a thread and a tokenizer of its own: the engine's decodes while this one encodes.
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        self.tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        self.stats = engine.stats()
        self.num_calling = 0  # requests that the thread has not taken yet
        self.live: set[Generation] = set()
        self.encoding: set[asyncio.Future] = set()
        self.over: Exception | None = None  # why there will be no more answers
        self.dead: Exception | None = None
        # Whose an output is. Belongs to the engine's thread.
        self.owners: dict[int, tuple[Generation, int]] = {}
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to step; outputs go to the event loop that is running now."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    async def stop(self) -> None:
        """End the thread after the step that is under way, if that ends soon; what has not ended is failed."""
        self.fail_all(StepFailed("the server was shut down before this request was done"))
        self.calls.put(None)
        self.tokenizing.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.thread.join, 0.5)

    @property
    def num_waiting(self) -> int:
        return self.stats.waiting + self.num_calling

    async def tokenize(self, function: Callable, *args):
        """Run a function of the tokenizer away from the event loop."""
        result = self.loop.run_in_executor(self.tokenizing, function, self.tokenizer, *args)
        self.encoding.add(result)
        try:
            return await result
        except asyncio.CancelledError:
            if self.over is None:
                raise
            raise self.over from None
        finally:
            self.encoding.discard(result)

    async def generate(self, requests: list[tuple[list[int], SamplingParams]]) -> Generation:
        """Queue all of the requests, or none.

        Raises:
            QueueFull: if not all of them have a place in the queue.
            StepFailed: if there will be no more answers.
            ValueError: if the engine refuses one.
        """
        if self.over is not None:
            raise self.over
        longest = max(len(prompt_ids) for prompt_ids, _ in requests)
        if longest > self.max_model_len:
            raise ValueError(f"prompt has {longest} tokens, more than max_model_len = {self.max_model_len}; shorten it")
        if self.num_waiting + len(requests) > self.max_waiting:
            raise QueueFull(f"{self.num_waiting} requests are waiting, at most {self.max_waiting} may; try again later")
        generation = Generation(self, len(requests))
        self.num_calling += len(requests)
        self.live.add(generation)
        self.calls.put(lambda: self.add(generation, requests))
        try:
            await generation.added
        # If the caller is cancelled while it waits, the requests may be in already.
        except BaseException:
            generation.abort()
            raise
        return generation

    def abort(self, generation: Generation) -> None:
        if generation in self.live:
            self.live.remove(generation)
            self.calls.put(lambda: self.remove(generation))

    def fail_all(self, error: Exception) -> None:
        """End every request with an error, those that wait for the tokenizer too."""
        self.over = error
        for result in self.encoding:
            result.cancel()
        for generation in list(self.live):
            generation.abort()
            generation.outputs.put_nowait(error)
            if not generation.added.done():
                generation.added.set_exception(error)

    def die(self, error: Exception) -> None:
        self.dead = error
        self.fail_all(StepFailed(f"the engine has stopped: {error!r}"))

    def acknowledge(self, generation: Generation, error: Exception | None, stats) -> None:
        """The thread has queued a call's requests, or the engine has refused one."""
        self.stats = stats
        self.num_calling -= generation.num_requests
        # It is done already if the caller is gone.
        if not generation.added.done():
            generation.added.set_exception(error) if error else generation.added.set_result(None)

    def deliver(self, items: list[tuple[Generation, object]], stats) -> None:
        """What a step gave, to those who wait for it."""
        self.stats = stats
        for generation, item in items:
            generation.outputs.put_nowait(item)
            failed = isinstance(item, Exception)
            generation.num_running -= not failed and item[1].finish_reason is not None
            if failed or not generation.num_running:
                self.live.discard(generation)

    def run(self) -> None:
        try:
            while self.take_calls():
                if self.engine.has_unfinished_requests():
                    self.step()
        # Whatever it is: those who wait must hear of it.
        except Exception as error:
            logger.exception("the engine's thread has ended")
            self.post(self.die, error)

    def take_calls(self) -> bool:
        """Run what was called for, and wait for it if there is nothing else to do; False at the end."""
        wait = not self.engine.has_unfinished_requests()
        while True:
            try:
                call = self.calls.get(block=wait)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()
            wait = False

    def add(self, generation: Generation, requests: list) -> None:
        error = None
        try:
            for index, (prompt_ids, params) in enumerate(requests):
                request_id = self.engine.add_request(prompt_ids, params)
                generation.request_ids.append(request_id)
                self.owners[request_id] = generation, index
        except Exception as refused:
            self.remove(generation)
            error = refused
        self.post(self.acknowledge, generation, error, self.engine.stats())

    def remove(self, generation: Generation) -> None:
        for request_id in generation.request_ids:
            if self.owners.pop(request_id, None):
                self.engine.abort_request(request_id)
        self.post(self.deliver, [], self.engine.stats())

    def step(self) -> None:
        """One step, and its outputs to their owners; if it raises, the requests in it fail and the rest go on."""
        items = []
        try:
            for output in self.engine.step():
                generation, index = self.owners[output.request_id]
                items.append((generation, (index, output)))
                if output.finish_reason:
                    del self.owners[output.request_id]
        except Exception as error:
            logger.exception("a step failed")
            failed_ids = self.engine.fail_step()
            # Then the next step would raise as well.
            if not failed_ids:
                raise
            failed = {self.owners[request_id][0] for request_id in failed_ids if request_id in self.owners}
            items = [(each, StepFailed(f"the step that computed this request failed: {error!r}")) for each in failed]
            for generation in failed:
                self.remove(generation)
        self.post(self.deliver, items, self.engine.stats())

    def post(self, function: Callable, *args) -> None:
        """Have the event loop call a function; nothing happens if it has ended."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            logger.debug("the event loop is closed")
