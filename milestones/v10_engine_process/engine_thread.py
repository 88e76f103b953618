"""A thread for the engine's loop."""
import asyncio
import copy
import logging
import queue
import threading
from collections.abc import Callable

from .engine_loop import Abort, Add, EngineLike, EngineLoop, Stop
from .outputs import Stats

logger = logging.getLogger(__name__)


class EngineThread:
    """Runs an engine's loop in a thread of its own. Belongs to the event loop, but for `receive_soon`."""

    def __init__(self, engine: EngineLike):
        self.name = engine.name
        # A tokenizer must not be used by two threads. The engine's decodes on its thread; this copy is for others.
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        self.max_model_len = engine.max_model_len
        self.stats = engine.stats()
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.engine_loop = EngineLoop(engine, self.inbox, self.receive_soon)
        self.thread = threading.Thread(target=self.engine_loop.run, name="engine", daemon=True)

    async def start(self, receive: Callable[[tuple, Stats], None]) -> None:
        """Begin to step. The event loop that is running calls receive with each message and the engine's stats."""
        self.loop = asyncio.get_running_loop()
        self.receive = receive
        self.thread.start()

    def send(self, message: Add | Abort) -> None:
        """Leave a message, to be read before the next step."""
        self.inbox.put(message)

    async def stop(self, timeout_s: float) -> None:
        """End the thread after the step under way, but wait no longer than this."""
        self.inbox.put(Stop())
        await asyncio.to_thread(self.thread.join, timeout_s)

    def receive_soon(self, message: tuple, stats: Stats) -> None:
        """Called by the engine's thread: have the event loop call `receive`."""
        try:
            self.loop.call_soon_threadsafe(self.receive, message, stats)
        except RuntimeError:
            logger.debug("the event loop is closed")
