"""The engine loop in a thread of its own."""
import asyncio
import copy
import logging
import queue
import threading
from collections.abc import Callable

from .engine_loop import Abort, Add, EngineLike, EngineLoop, ResetPrefixCache, ShowBlocks, Stop
from .outputs import Stats

logger = logging.getLogger(__name__)


class EngineThread:
    """Runs the engine loop in a thread. Call all but `receive_soon` from the event loop's thread."""

    silent_s = 0.0  # nobody watches a thread

    def __init__(self, engine: EngineLike):
        self.name = engine.name
        # Two threads must not use one tokenizer. The engine decodes with its own; this copy is for the other threads.
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        self.max_model_len, self.max_request_len = engine.max_model_len, engine.max_request_len
        self.stats = engine.stats()
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.engine_loop = EngineLoop(engine, self.inbox, self.receive_soon)
        self.thread = threading.Thread(target=self.engine_loop.run, name="engine", daemon=True)

    async def start(self, receive: Callable[[tuple, Stats], None]) -> None:
        """Start the thread. The running event loop calls receive with each message and the engine's stats."""
        self.loop = asyncio.get_running_loop()
        self.receive = receive
        self.thread.start()

    def send(self, message: Add | Abort | ResetPrefixCache | ShowBlocks) -> None:
        """Queue a message, which the engine loop reads before its next step."""
        self.inbox.put(message)

    async def stop(self, timeout_s: float) -> None:
        """End the thread after its current step; wait for that at most timeout_s."""
        self.inbox.put(Stop())
        await asyncio.to_thread(self.thread.join, timeout_s)

    def receive_soon(self, message: tuple, stats: Stats) -> None:
        """Have the event loop call `receive`. Called from the engine thread."""
        try:
            self.loop.call_soon_threadsafe(self.receive, message, stats)
        except RuntimeError:
            logger.debug("the event loop is closed")
