"""The engine loop in a process of its own.

A socket pair connects it to the server process. The messages of `engine_loop` are sent as pickled named tuples, each
after its length. The server process imports no torch; the engine process imports nothing for HTTP.
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

from .engine_loop import Abort, Add, Died, EngineLike, EngineLoop, ResetPrefixCache, ShowBlocks, Stop
from .log import Log, log_to
from .outputs import Stats

logger = logging.getLogger(__name__)

LENGTH = struct.Struct("!I")  # the length in bytes of the message that follows, big-endian
ALIVE_S = 1.0  # the interval at which the engine process sends Alive
SILENCE_S = 10.0  # an engine process that sends nothing for this long is hung
END_S = 1.0  # how long the engine process may take to end once its end of the socket is closed


# ---- from the engine process, in addition to the engine loop's messages


class Ready(NamedTuple):
    """The engine has been created. The first message."""

    name: str
    tokenizer: object
    max_model_len: int
    max_request_len: int


class NoEngine(NamedTuple):
    """Creating the engine raised a ValueError or an OSError with this text. The only message."""

    reason: str


class Alive(NamedTuple):
    """The process can still run Python, whatever the engine loop is doing."""


# ---- in the server process


class EngineProcess:
    """Runs the engine loop in a child process, which ends when this one does. Call it from the event loop's thread."""

    def __init__(self, make_engine: Callable[[], EngineLike]):
        """Start a process that calls make_engine, which must be picklable. Call `wait_until_ready` next."""
        fill_standard_files()
        self.socket, engine_end = socket.socketpair()
        self.process = self.start_process(engine_end, make_engine)
        # Only the engine process may hold its end, so that its death closes the connection and is noticed here.
        engine_end.close()
        self.silent_s = 0.0
        self.stopping = False

    def start_process(self, engine_end: socket.socket, make_engine: Callable[[], EngineLike]) -> multiprocessing.Process:
        """Start and return the engine process, which neither Ctrl-C nor SIGTERM ends."""
        # A fork cannot use CUDA, and would copy this process's locks without the threads that hold them.
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=run_process, args=(engine_end, make_engine), name="engine", daemon=True)
        # A child inherits the set of blocked signals. A signal that arrives here meanwhile is delivered afterward.
        # multiprocessing's resource tracker must already be running, because starting it would unblock them.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process.start()
            # At exit, multiprocessing would send SIGTERM, which is blocked, and wait.
            atexit.register(process.kill)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process

    def wait_until_ready(self) -> "EngineProcess":
        """Block until the engine has been created, and return self; ValueError if it cannot be."""
        message, self.stats = receive_message(self.socket) or (None, None)
        if not isinstance(message, Ready):
            self.process.join()
            self.socket.close()
            raise ValueError(message.reason if message else f"{how_it_ended(self.process.exitcode)} before it was ready")
        self.name, self.tokenizer, self.max_model_len, self.max_request_len = message
        return self

    async def start(self, receive: Callable[[tuple, Stats], None]) -> None:
        """Start reading. The running event loop calls receive with each message and the engine's stats."""
        self.reader, self.writer = await asyncio.open_connection(sock=self.socket)
        self.reading = asyncio.create_task(self.read(receive))
        self.watching = asyncio.create_task(self.watch())

    def send(self, message: Add | Abort | ResetPrefixCache | ShowBlocks | Stop) -> None:
        """Send a message, which the engine loop reads before its next step. Never waits for the engine."""
        if not self.writer.is_closing():
            self.writer.write(packed(message))

    async def stop(self, timeout_s: float) -> None:
        """End the process after its current step, or kill it after timeout_s."""
        self.stopping = True
        self.send(Stop())
        await asyncio.wait([self.reading], timeout=timeout_s)
        self.watching.cancel()
        self.process.kill()
        # A process that waits in a driver ends only later.
        await asyncio.wait([self.reading], timeout=END_S)

    async def read(self, receive: Callable[[tuple, Stats], None]) -> None:
        """Deliver messages until the engine's end closes. Then kill the process; report an unexpected exit as Died."""
        has_died, loop = False, asyncio.get_running_loop()
        try:
            while True:
                [length] = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
                message, stats = pickle.loads(await self.reader.readexactly(length))
                self.silent_s = 0.0
                has_died |= isinstance(message, Died)
                if not isinstance(message, Alive):
                    loop.call_soon(receive, message, stats)
                # While data is buffered, readexactly does not let other tasks run.
                await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except Exception:
            logger.exception("a message from the engine cannot be read")
        self.writer.close()
        # Does nothing if the process has already ended.
        self.process.kill()
        await asyncio.to_thread(self.process.join, END_S)
        atexit.unregister(self.process.kill)
        if not self.stopping and not has_died:
            hung = f"the engine's process said nothing for {SILENCE_S:.0f} s, and was killed"
            reason = hung if self.silent_s >= SILENCE_S else how_it_ended(self.process.exitcode)
            logger.error(reason)
            receive(Died(reason), Stats(running=0, waiting=0, free_blocks=0, total_blocks=0))

    async def watch(self) -> None:
        """Kill the process after SILENCE_S without a message, not counting time in which this process was suspended."""
        while self.silent_s < SILENCE_S:
            await asyncio.sleep(ALIVE_S)
            self.silent_s += ALIVE_S
        self.process.kill()
        # A process that waits in a driver ends only later, and until then the socket stays open.
        await asyncio.sleep(END_S)
        self.reader.feed_eof()


def fill_standard_files() -> None:
    """Open /dev/null as stdin, stdout or stderr if they are closed: a socket with their number would get what is printed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def how_it_ended(exit_code: int | None) -> str:
    """Describe an exit code, which is minus a signal's number if a signal ended the process, and None if unknown.

    >>> how_it_ended(-9)
    "the engine's process has ended (SIGKILL)"
    """
    names = {-number.value: number.name for number in signal.Signals}
    return f"the engine's process has ended ({names.get(exit_code, f'exit code {exit_code}')})"


# ---- in the engine process


def load_engine(model_dir: str | Path, **options) -> EngineLike:
    """Return Engine(model_dir, **options), warmed up. Leaves one core to the server, unless OMP_NUM_THREADS is set."""
    import torch

    from .engine import Engine

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    engine = Engine(model_dir, **options)
    engine.warm_up()
    return engine


def run_process(end: socket.socket, make_engine: Callable[[], EngineLike]) -> None:
    """Let nothing in the engine process wait for its log's reader, not even a step that fails, and run it."""
    log_to(Log())
    run_engine(end, make_engine)


def run_engine(end: socket.socket, make_engine: Callable[[], EngineLike]) -> None:
    """Run the engine process, with the engine loop in its main thread. Does not return."""
    # A compiler that Triton starts would keep it open.
    end.set_inheritable(False)
    channel, inbox = Channel(end), queue.SimpleQueue()
    threading.Thread(target=read_until_gone, args=(end, inbox), name="reader", daemon=True).start()
    try:
        engine = make_engine()
    except (ValueError, OSError) as error:
        channel.send(NoEngine(str(error)), None)
        leave(2)
    except Exception:
        logger.exception("the engine cannot be created")
        leave(1)
    channel.send(Ready(engine.name, engine.tokenizer, engine.max_model_len, engine.max_request_len), engine.stats())
    threading.Thread(target=say_alive, args=(channel,), name="alive", daemon=True).start()
    EngineLoop(engine, inbox, channel.send).run()
    # If the server wrote to a socket that is closed, it could not read the last messages any more.
    channel.sending.acquire()  # for good: an Alive that cannot be sent would end the process
    end.shutdown(socket.SHUT_WR)
    time.sleep(END_S)
    leave(0)


class Channel:
    """The engine's end of the socket. Any thread of the engine process may send."""

    def __init__(self, end: socket.socket):
        self.end = end
        self.sending = threading.Lock()

    def send(self, message: tuple, stats: Stats | None) -> None:
        """Send one whole message. Blocks while the server does not read, so that messages do not pile up here."""
        try:
            with self.sending:
                self.end.sendall(packed((message, stats)))
        except OSError:
            leave(1)


def read_until_gone(end: socket.socket, inbox: queue.SimpleQueue) -> None:
    """Put the server's messages into the inbox. Ends the process when the server is gone, even during a step."""
    try:
        while (message := receive_message(end)) is not None:
            inbox.put(message)
    except Exception:
        logger.exception("a message from the server cannot be read")
    leave(1)


def say_alive(channel: Channel) -> None:
    """Send Alive every ALIVE_S, even during a long step."""
    while True:
        time.sleep(ALIVE_S)
        channel.send(Alive(), None)


def leave(exit_code: int) -> None:
    """End this process, even during a step, once its log is printed or takes too long. Any of its threads may call this."""
    # Not logging.shutdown, which would also flush stderr, and wait for the thread that prints.
    for handler in logging.getLogger().handlers:
        handler.close()
    os._exit(exit_code)


# ---- in both processes


def packed(message: tuple) -> bytes:
    """Return a message's length and pickle. Unpickling can run code, but nothing else can write to the socket."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def receive_message(end: socket.socket) -> tuple | None:
    """Block until the next message and return it; None if the other side has closed its end."""
    header = receive_bytes(end, LENGTH.size)
    data = header and receive_bytes(end, *LENGTH.unpack(header))
    return data and pickle.loads(data)


def receive_bytes(end: socket.socket, num_bytes: int) -> bytes | None:
    """Return exactly num_bytes; None if the other side closes its end first. One `recv` may return any part of them."""
    data = bytearray()
    try:
        while len(data) < num_bytes:
            piece = end.recv(num_bytes - len(data))
            if not piece:
                return None
            data += piece
    # The system reports a close this way if the other side had not read all that was sent to it.
    except ConnectionError:
        return None
    return bytes(data)
