"""A process for the engine's loop.

A socket pair connects it to the server's process. The messages of `engine_loop` cross as pickled named tuples, each after its
length. The server's process imports no torch, the engine's process no HTTP.
"""
import asyncio
import atexit
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

from .engine_loop import Abort, Add, Died, EngineLike, EngineLoop, Stop
from .outputs import Stats

logger = logging.getLogger(__name__)

LENGTH = struct.Struct("!I")  # bytes of the message that follows: four bytes, the largest first
ALIVE_S = 1.0  # how often the engine's process says that it is alive
SILENCE_S = 10.0  # an engine that has said nothing for so long is hung
END_S = 1.0  # how long a process may take to end once its end of the socket is closed


# ---- from the engine's process, beside the messages of its loop


class Ready(NamedTuple):
    """The engine is made. The first message."""

    name: str
    tokenizer: object
    max_model_len: int


class NoEngine(NamedTuple):
    """The engine cannot be made, because of a ValueError with this text. The only message."""

    reason: str


class Alive(NamedTuple):
    """The process can still run Python, whatever its loop is doing."""


# ---- in the server's process


class EngineProcess:
    """Runs an engine's loop in a process of its own, which ends when this process does. Belongs to the event loop."""

    def __init__(self, make_engine: Callable[[], EngineLike]):
        """Start a process that calls make_engine, which is pickled. Call `wait_until_ready` before anything else."""
        self.socket, engine_end = socket.socketpair()
        self.process = self.start_process(engine_end, make_engine)
        # Only the engine may hold its end: then its death closes it, and is seen here.
        engine_end.close()
        self.silent_s = 0.0
        self.stopping = False

    def start_process(self, engine_end: socket.socket, make_engine: Callable[[], EngineLike]) -> multiprocessing.Process:
        """Start the engine's process, which neither Ctrl-C nor SIGTERM ends."""
        # A fork would have copies of this process's locks, without the threads that hold them, and cannot use CUDA.
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=run_engine, args=(engine_end, make_engine), name="engine", daemon=True)
        # A process inherits which signals are blocked. What arrives here meanwhile is delivered afterwards. multiprocessing's
        # own helper must be running by then, since its start would unblock them.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process.start()
            # At Python's exit multiprocessing would send SIGTERM, and wait.
            atexit.register(process.kill)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process

    def wait_until_ready(self) -> "EngineProcess":
        """This, once the engine is made; ValueError if it cannot be."""
        message, self.stats = receive_message(self.socket) or (None, None)
        if not isinstance(message, Ready):
            self.process.join()
            self.socket.close()
            raise ValueError(message.reason if message else f"{how_it_ended(self.process.exitcode)} before it was ready")
        self.name, self.tokenizer, self.max_model_len = message
        return self

    async def start(self, receive: Callable[[tuple, Stats], None]) -> None:
        """Begin to read. The event loop that is running calls receive with each message and the engine's stats."""
        self.reader, self.writer = await asyncio.open_connection(sock=self.socket)
        self.reading = asyncio.create_task(self.read(receive))
        self.watching = asyncio.create_task(self.watch())

    def send(self, message: Add | Abort | Stop) -> None:
        """Leave a message, to be read before the next step. Never waits for the engine."""
        if not self.writer.is_closing():
            self.writer.write(packed(message))

    async def stop(self, timeout_s: float) -> None:
        """End the process after the step under way, but wait no longer than this."""
        self.stopping = True
        self.send(Stop())
        await asyncio.wait([self.reading], timeout=timeout_s)
        self.watching.cancel()
        self.process.kill()
        await self.reading

    async def read(self, receive: Callable[[tuple, Stats], None]) -> None:
        """Have each message received, until the engine's end is closed; then say how the process has ended."""
        has_died, loop = False, asyncio.get_running_loop()
        try:
            while True:
                [length] = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
                message, stats = pickle.loads(await self.reader.readexactly(length))
                self.silent_s = 0.0
                has_died |= isinstance(message, Died)
                if not isinstance(message, Alive):
                    loop.call_soon(receive, message, stats)
                # What has arrived is read without a pause.
                await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:
            logger.exception("a message from the engine cannot be read")
        self.writer.close()
        # If it has ended already, this does nothing.
        self.process.kill()
        await asyncio.to_thread(self.process.join, END_S)
        atexit.unregister(self.process.kill)
        if not self.stopping and not has_died:
            hung = f"the engine's process said nothing for {SILENCE_S:.0f} s, and was killed"
            reason = hung if self.silent_s >= SILENCE_S else how_it_ended(self.process.exitcode)
            logger.error(reason)
            receive(Died(reason), Stats(running=0, waiting=0, free_blocks=0, total_blocks=0))

    async def watch(self) -> None:
        """Kill a process that has been silent for too long; `read` then says so. Time in which this process stood still does not count."""
        while self.silent_s < SILENCE_S:
            await asyncio.sleep(ALIVE_S)
            self.silent_s += ALIVE_S
        self.process.kill()


def how_it_ended(exit_code: int | None) -> str:
    """exit_code: minus a signal's number; None if nobody knows.

    >>> how_it_ended(-9)
    "the engine's process has ended (SIGKILL)"
    """
    names = {-each.value: each.name for each in signal.Signals}
    return f"the engine's process has ended ({names.get(exit_code, f'exit code {exit_code}')})"


# ---- in the engine's process


def load_engine(model_dir: str | Path, **options) -> EngineLike:
    """Engine(model_dir, **options), warm. Unless the user has set the number of threads, it leaves a core to the server."""
    import torch

    from .engine import Engine

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    engine = Engine(model_dir, **options)
    engine.warm_up()
    return engine


def run_engine(end: socket.socket, make_engine: Callable[[], EngineLike]) -> None:
    """The process from its beginning to its end. The main thread steps."""
    channel, inbox = Channel(end), queue.SimpleQueue()
    threading.Thread(target=read_until_gone, args=(end, inbox), name="reader", daemon=True).start()
    try:
        engine = make_engine()
    except ValueError as error:
        channel.send(NoEngine(str(error)), None)
        leave(2)
    except Exception:
        logger.exception("the engine cannot be made")
        leave(1)
    channel.send(Ready(engine.name, engine.tokenizer, engine.max_model_len), engine.stats())
    threading.Thread(target=say_alive, args=(channel,), name="alive", daemon=True).start()
    EngineLoop(engine, inbox, channel.send).run()
    leave(0)


class Channel:
    """The engine's end of the socket. Any thread of its process may send."""

    def __init__(self, end: socket.socket):
        self.end = end
        self.sending = threading.Lock()

    def send(self, message: tuple, stats: Stats | None) -> None:
        """Send a message whole; wait while the server reads nothing, so that nothing piles up here."""
        try:
            with self.sending:
                self.end.sendall(packed((message, stats)))
        except OSError:
            leave(1)


def read_until_gone(end: socket.socket, inbox: queue.SimpleQueue) -> None:
    """Put what the server sends into the inbox. When the server is gone, the process ends, whatever its step is doing."""
    try:
        while (message := receive_message(end)) is not None:
            inbox.put(message)
    except Exception:
        logger.exception("a message from the server cannot be read")
    leave(1)


def say_alive(channel: Channel) -> None:
    """Send Alive every second, also during a long step."""
    while True:
        time.sleep(ALIVE_S)
        channel.send(Alive(), None)


def leave(exit_code: int) -> None:
    """End this process from any of its threads, at once."""
    os._exit(exit_code)


# ---- in both


def packed(message: tuple) -> bytes:
    """A message as it crosses: its length, and its pickle. Nobody else can write to this socket: a pickle runs code."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def receive_message(end: socket.socket) -> tuple | None:
    """The next message; None when the other side has closed its end. Waits."""
    header = receive_bytes(end, LENGTH.size)
    data = header and receive_bytes(end, *LENGTH.unpack(header))
    return data and pickle.loads(data)


def receive_bytes(end: socket.socket, num_bytes: int) -> bytes | None:
    """Exactly as many bytes; None if the other side closes its end first. One `recv` gives any piece of what was sent."""
    data = bytearray()
    try:
        while len(data) < num_bytes:
            piece = end.recv(num_bytes - len(data))
            if not piece:
                return None
            data += piece
    # So the system says it if the other side had not read all that was sent to it.
    except ConnectionError:
        return None
    return bytes(data)
