"""The event loop's side of the engine: coroutines start generations and read them, and never block on a step.

Call everything here from the event loop's thread.
"""
import asyncio
import base64
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from .engine_loop import Abort, Aborted, Add, Added, Blocks, Died, Failed, Refused, ResetPrefixCache, ShowBlocks, Stepped
from .engine_process import EngineProcess
from .engine_thread import EngineThread
from .metrics import Goal, Metrics
from .outputs import Stats, StepOutput
from .params import RequestError, SamplingParams

# How long one answer may occupy the event loop before other tasks get a turn.
LONGEST_TURN_S = 0.001
# How long the dashboard waits for the engine.
SHOW_S = 0.1


class QueueFull(Exception):
    """Too many requests are waiting already to accept this call."""


class GenerationFailed(Exception):
    """The engine failed a call: its step raised, its logits were not finite, or it could not be added."""


class EngineStopped(GenerationFailed):
    """The engine accepts no more calls, and has failed the unfinished ones."""


class Generation:
    """One call's outputs, as they arrive."""

    def __init__(self, async_engine: "AsyncEngine", call_id: int, num_requests: int):
        self.async_engine = async_engine
        self.call_id = call_id
        self.num_unfinished = num_requests
        self.added = asyncio.get_running_loop().create_future()  # done once the engine has accepted or refused the call
        # The last item is None, or an exception if the call failed.
        self.outputs: asyncio.Queue[tuple[int, StepOutput] | Exception | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, StepOutput]]:
        """Yield each new token, with the index of its request in the call. Raises GenerationFailed."""
        begun = time.monotonic()
        while (item := await self.outputs.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            # While the queue has items, get() does not let other tasks run.
            if time.monotonic() - begun > LONGEST_TURN_S:
                await asyncio.sleep(0)
                begun = time.monotonic()

    def abort(self) -> None:
        """Abort the call's unfinished requests, if it has any. Nobody reads its outputs any more."""
        self.async_engine.unread.discard(self)
        self.async_engine.abort(self.call_id)


async def paced(items: Iterable) -> AsyncIterator:
    """Yield the items, and let other tasks run whenever LONGEST_TURN_S has passed."""
    begun = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - begun > LONGEST_TURN_S:
            await asyncio.sleep(0)
            begun = time.monotonic()


class AsyncEngine:
    """An engine that many coroutines can use at once."""

    def __init__(
        self,
        runner: EngineThread | EngineProcess,
        max_waiting: int,
        goal: Goal = Goal(),
    ):
        self.metrics = Metrics(goal)
        self.max_waiting = max_waiting
        self.max_model_len, self.max_request_len = runner.max_model_len, runner.max_request_len
        self.runner = runner
        self.stats = runner.stats  # as of the last message
        self.metrics.stats = runner.stats
        self.num_calls = 0
        self.unanswered: dict[int, int] = {}  # by call id: requests that the engine has not acknowledged
        self.metrics.unanswered = self.unanswered
        self.active_generations: dict[int, Generation] = {}  # by call id
        self.unread: weakref.WeakSet[Generation] = weakref.WeakSet()  # all that a client may still read
        self.metrics.unread = self.unread
        self.fatal_error: str | None = None  # why no more calls are accepted
        self.died = False  # whether the engine died, rather than being shut down
        self.stopped_at: float | None = None  # the time.monotonic() of fatal_error
        self.tokenizer = runner.tokenizer
        self.tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self.asked_for_blocks = False
        self.blocks_shown = asyncio.Event()
        self.encoding: set[asyncio.Future] = set()  # the results that callers of `tokenize` wait for
        self.metrics.encoding = self.encoding

    async def start(self) -> None:
        """Start the engine. Its messages are delivered to the running event loop."""
        self.loop = asyncio.get_running_loop()
        await self.runner.start(self.receive)

    async def stop(self) -> None:
        """Fail all unfinished calls and stop the engine; wait at most half a second for its current step."""
        self.fail_all(EngineStopped("the server was shut down before this request was done"))
        self.tokenizing.shutdown(wait=False, cancel_futures=True)
        await self.runner.stop(timeout_s=0.5)

    async def tokenize(self, function: Callable, *args):
        """Return function(tokenizer, *args), computed in the tokenizer's thread. Raises EngineStopped, QueueFull."""
        if len(self.encoding) >= self.max_waiting:
            raise QueueFull(f"{len(self.encoding)} requests are waiting for the tokenizer; at most {self.max_waiting} may wait (--max-waiting); try again later")
        result = self.loop.run_in_executor(self.tokenizing, function, self.tokenizer, *args)
        self.encoding.add(result)
        try:
            return await result
        except asyncio.CancelledError:
            # A server that stops cancels what is still waiting for the tokenizer.
            if self.fatal_error is None:
                raise
            raise EngineStopped(self.fatal_error) from None
        finally:
            self.encoding.discard(result)

    @property
    def num_waiting(self) -> int:
        """The number of requests in the engine's queue or on their way to it."""
        return self.stats.waiting + sum(self.unanswered.values())

    def check_length(self, num_tokens: int) -> None:
        """Raise RequestError for a prompt that cannot fit. The engine would too, but only after reading every token."""
        if num_tokens > self.max_model_len:
            message = f"prompt has {num_tokens} tokens, more than max_model_len = {self.max_model_len}; shorten it"
            raise RequestError(message, "prompt", "context_length_exceeded")

    async def generate(self, requests: list[tuple[list[int], SamplingParams]], arrived: float | None = None) -> Generation:
        """Queue a call's requests, all or none. Each is a pair: prompt ids and parameters.

        arrived: when the server began to receive the call, in seconds of time.monotonic(); by default, when the engine has it.

        Raises:
            RequestError: if the engine refuses one of them.
            QueueFull: if the queue has no room for all of them.
            GenerationFailed: if the engine cannot add them; EngineStopped if it accepts no more calls.
        """
        if self.fatal_error is not None:
            raise EngineStopped(self.fatal_error)
        self.check_length(max(len(prompt_ids) for prompt_ids, _ in requests))
        if self.num_waiting + len(requests) > self.max_waiting:
            message = f"{self.num_waiting} requests are waiting, and this call has {len(requests)}; at most {self.max_waiting} may wait (--max-waiting)"
            raise QueueFull(f"{message}; try again later")
        self.num_calls += 1
        generation = Generation(self, self.num_calls, len(requests))
        # Before the call is counted: what cannot be sent is never answered.
        self.runner.send(Add(generation.call_id, requests, arrived))
        self.unanswered[generation.call_id] = len(requests)
        self.active_generations[generation.call_id] = generation
        self.unread.add(generation)
        try:
            await generation.added
        # If the caller is cancelled here, the engine may already have its requests.
        except BaseException:
            generation.abort()
            raise
        return generation

    def abort(self, call_id: int) -> None:
        if self.active_generations.pop(call_id, None):
            self.runner.send(Abort(call_id))

    def reset_prefix_cache(self) -> None:
        """Let no request that is queued after this call find blocks that were computed before it. Raises EngineStopped."""
        if self.fatal_error is not None:
            raise EngineStopped(self.fatal_error)
        self.runner.send(ResetPrefixCache())

    async def show_blocks(self) -> None:
        """Ask for the state of each block, and wait SHOW_S for it. After a longer step, the next caller sees it."""
        if self.fatal_error is None and not self.asked_for_blocks:
            self.asked_for_blocks = True
            self.blocks_shown.clear()
            self.runner.send(ShowBlocks())
        with suppress(TimeoutError):
            await asyncio.wait_for(self.blocks_shown.wait(), SHOW_S)

    def receive(self, message: Added | Refused | Aborted | Stepped | Blocks | Failed | Died, stats: Stats) -> None:
        self.stats = stats._replace(report=None)
        if not isinstance(message, Died):
            self.metrics.stats = self.stats
        if stats.report is not None:
            self.metrics.add(stats.report)
        match message:
            case Blocks(states):
                self.asked_for_blocks = False
                self.blocks_shown.set()
                self.metrics.blocks = base64.b64encode(states).decode()
            case Added(call_id):
                del self.unanswered[call_id]
                generation = self.active_generations.get(call_id)
                # The future is already done if the caller has just been cancelled.
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
                self.metrics.end(sum(generation.num_unfinished for generation in self.active_generations.values()))
                self.unanswered.clear()
                self.fail_all(GenerationFailed(reason))

    def deliver(self, call_id: int, index: int, output: StepOutput) -> None:
        """Put a token into its generation's queue, unless the call has been aborted since the step began."""
        generation = self.active_generations.get(call_id)
        if generation is None:
            return
        generation.outputs.put_nowait((index, output))
        if output.finish_reason is not None:
            generation.num_unfinished -= 1
            if generation.num_unfinished == 0:
                self.end(call_id)

    def end(self, call_id: int, error: Exception | None = None) -> None:
        """Close a generation's queue. An error is raised in its reader, or in `generate` if that is still waiting."""
        generation = self.active_generations.pop(call_id, None)
        if generation is None:
            return
        generation.outputs.put_nowait(error)
        if error and not generation.added.done():
            generation.added.set_exception(error)

    def fail_all(self, error: GenerationFailed) -> None:
        """Fail every unfinished call with this error, and accept no more."""
        self.fatal_error = str(error)
        self.stopped_at = time.monotonic()
        for result in self.encoding:
            result.cancel()
        for call_id in list(self.active_generations):
            self.runner.send(Abort(call_id))
            self.end(call_id, error)
