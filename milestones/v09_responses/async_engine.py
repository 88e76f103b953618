"""The event loop's side: coroutines ask for generations and read them, and never wait for a step.

Everything here belongs to the event loop's thread.
"""
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from .engine_loop import Abort, Aborted, Add, Added, Died, Failed, Refused, Stepped
from .engine_thread import EngineThread
from .outputs import Stats, StepOutput
from .params import RequestError, SamplingParams

# How long the event loop may be busy with one answer before it looks after the others.
LONGEST_TURN_S = 0.001


class QueueFull(Exception):
    """The queue has no room for a call."""


class GenerationFailed(Exception):
    """The engine gave up on a call: its step raised, or it could not be added."""


class EngineStopped(GenerationFailed):
    """The engine takes no calls any more, and has given up on those that it had."""


class Generation:
    """The outputs of one call, as they arrive."""

    def __init__(self, async_engine: "AsyncEngine", call_id: int, num_requests: int):
        self.async_engine = async_engine
        self.call_id = call_id
        self.num_unfinished = num_requests
        self.added = asyncio.get_running_loop().create_future()  # done when the engine has taken or refused the call
        # An exception, or None at the end, is the last item.
        self.outputs: asyncio.Queue[tuple[int, StepOutput] | Exception | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, StepOutput]]:
        """Each new token, with the index of its request in the call. Raises GenerationFailed."""
        begun = time.monotonic()
        while (item := await self.outputs.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            # What waits in the queue is got without a pause.
            if time.monotonic() - begun > LONGEST_TURN_S:
                await asyncio.sleep(0)
                begun = time.monotonic()

    def abort(self) -> None:
        """End the call, whose outputs nobody reads any more. If it has ended, this does nothing."""
        self.async_engine.abort(self.call_id)


async def paced(items: Iterable) -> AsyncIterator:
    """The same items, with a pause now and then in which the event loop does other things."""
    begun = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - begun > LONGEST_TURN_S:
            await asyncio.sleep(0)
            begun = time.monotonic()


class AsyncEngine:
    """An engine that many coroutines use at once."""

    def __init__(
        self,
        runner: EngineThread,
        max_waiting: int,
    ):
        self.max_waiting = max_waiting
        self.max_model_len = runner.max_model_len
        self.runner = runner
        self.stats = runner.stats  # as of the last message
        self.num_calls = 0
        self.unanswered: dict[int, int] = {}  # the number of requests of each call that the engine has not answered
        self.active_generations: dict[int, Generation] = {}  # by call
        self.fatal_error: str | None = None  # why no requests are taken any more
        self.died = False  # whether that is the engine's own fault
        self.stopped_at: float | None = None  # since when, by time.monotonic
        self.tokenizer = runner.tokenizer
        self.tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self.encoding: set[asyncio.Future] = set()  # what callers of `tokenize` wait for

    async def start(self) -> None:
        """Begin to step, for the event loop that is running."""
        self.loop = asyncio.get_running_loop()
        await self.runner.start(self.receive)

    async def stop(self) -> None:
        """Fail what runs, and stop the engine, unless its step takes longer than half a second."""
        self.fail_all(EngineStopped("the server was shut down before this request was done"))
        self.tokenizing.shutdown(wait=False, cancel_futures=True)
        await self.runner.stop(timeout_s=0.5)

    async def tokenize(self, function: Callable, *args):
        """The result of function(tokenizer, *args), computed away from the event loop. Raises QueueFull, EngineStopped."""
        if len(self.encoding) >= self.max_waiting:
            raise QueueFull(f"{len(self.encoding)} requests wait for the tokenizer, at most {self.max_waiting} may (--max-waiting); try again later")
        result = self.loop.run_in_executor(self.tokenizing, function, self.tokenizer, *args)
        self.encoding.add(result)
        try:
            return await result
        except asyncio.CancelledError:
            # When the server ends, those who are still waiting are cancelled.
            if self.fatal_error is None:
                raise
            raise EngineStopped(self.fatal_error) from None
        finally:
            self.encoding.discard(result)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, and those on their way to it."""
        return self.stats.waiting + sum(self.unanswered.values())

    def check_length(self, num_tokens: int) -> None:
        """RequestError for a prompt that cannot fit. The engine would say so too, but after a look at each token of it."""
        if num_tokens > self.max_model_len:
            message = f"prompt has {num_tokens} tokens, more than max_model_len = {self.max_model_len}; shorten it"
            raise RequestError(message, "prompt", "context_length_exceeded")

    async def generate(self, requests: list[tuple[list[int], SamplingParams]]) -> Generation:
        """Queue a call's requests, all or none: prompt ids and parameters of each.

        Raises:
            RequestError: if the engine refuses one of them.
            QueueFull: if not all of them have a place in the queue.
            EngineStopped: if the engine takes no requests any more.
        """
        if self.fatal_error is not None:
            raise EngineStopped(self.fatal_error)
        self.check_length(max(len(prompt_ids) for prompt_ids, _ in requests))
        if self.num_waiting + len(requests) > self.max_waiting:
            message = f"{self.num_waiting} requests are waiting, and this call has {len(requests)}; at most {self.max_waiting} may wait (--max-waiting)"
            raise QueueFull(f"{message}; try again later")
        self.num_calls += 1
        generation = Generation(self, self.num_calls, len(requests))
        self.unanswered[generation.call_id] = len(requests)
        self.active_generations[generation.call_id] = generation
        self.runner.send(Add(generation.call_id, requests))
        try:
            await generation.added
        # A caller that is cancelled here may have its requests in the engine already.
        except BaseException:
            generation.abort()
            raise
        return generation

    def abort(self, call_id: int) -> None:
        if self.active_generations.pop(call_id, None):
            self.runner.send(Abort(call_id))

    def receive(self, message: Added | Refused | Aborted | Stepped | Failed | Died, stats: Stats) -> None:
        self.stats = stats
        match message:
            case Added(call_id):
                del self.unanswered[call_id]
                generation = self.active_generations.get(call_id)
                # It is done already if the caller was cancelled in this very moment.
                if generation and not generation.added.done():
                    generation.added.set_result(None)
            case Refused(call_id, text, param, code):
                del self.unanswered[call_id]
                self.end(call_id, RequestError(text, param, code))
            case Aborted():
                pass  # only the stats matter
            case Stepped(outputs):
                for call_id, index, output in outputs:
                    self.deliver(call_id, index, output)
            case Failed(call_ids, reason):
                for call_id in call_ids:
                    self.unanswered.pop(call_id, None)
                    self.end(call_id, GenerationFailed(reason))
            case Died(reason):
                self.died = True
                self.unanswered.clear()
                self.fail_all(GenerationFailed(reason))

    def deliver(self, call_id: int, index: int, output: StepOutput) -> None:
        """Put a token into its generation's queue, unless the call was aborted after the step began."""
        generation = self.active_generations.get(call_id)
        if generation is None:
            return
        generation.outputs.put_nowait((index, output))
        if output.finish_reason is not None:
            generation.num_unfinished -= 1
            if generation.num_unfinished == 0:
                self.end(call_id)

    def end(self, call_id: int, error: Exception | None = None) -> None:
        """Close a generation's queue; its reader, or the caller of `generate`, gets the error."""
        generation = self.active_generations.pop(call_id, None)
        if generation is None:
            return
        generation.outputs.put_nowait(error)
        if error and not generation.added.done():
            generation.added.set_exception(error)

    def fail_all(self, error: GenerationFailed) -> None:
        """End every call with this error, and take no more."""
        self.fatal_error = str(error)
        self.stopped_at = time.monotonic()
        for result in self.encoding:
            result.cancel()
        for call_id in list(self.active_generations):
            self.runner.send(Abort(call_id))
            self.end(call_id, error)
