"""A server on a socket of this machine, in a thread of this process.

Its engine is an object of this process too, so that a test can hold it, break it and look into it. Where the chapter's
engine has a process of its own, it runs here in a thread behind the chapter's own socket pair: every message is pickled,
crosses, and is read again. With ENGINE = "thread" it runs as in the chapters before that.
"""
import asyncio
import importlib
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress

ENGINE = "process"

import uvicorn


@contextmanager
def serving(chapter, engine, **options):
    """Serve an engine over a real socket; yields the server, with `url` and `service`."""
    process = importlib.import_module(f"milestones.{chapter.name}.process")
    service = process.Service(runner_of(chapter, engine), "pocket", **options)
    # The chapter's own socket: asyncio sends at once (TCP_NODELAY) only where the protocol is named, as it is there.
    with process.bind("127.0.0.1", 0) as listener:
        config = uvicorn.Config(process.create_app(service), log_level="critical", timeout_graceful_shutdown=1)
        server = process.Server(config, service)
        server.url = "http://127.0.0.1:%d" % listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        try:
            yield server
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not stop"


def runner_of(chapter, engine):
    """What runs an engine for a chapter's server."""
    if "engine_process" not in chapter.capabilities or ENGINE == "thread":
        return importlib.import_module(f"milestones.{chapter.name}.engine_thread").EngineThread(engine)
    module = importlib.import_module(f"milestones.{chapter.name}.engine_process")
    # Here a thread that would end its process ends itself.
    module.leave = sys.exit

    class Runner(module.EngineProcess):
        """The chapter's own, but for what it starts."""

        def start_process(self, engine_end, make_engine):
            return ThreadInstead(module.run_engine, engine_end.dup(), make_engine)

    return Runner(lambda: engine).wait_until_ready()


class ThreadInstead(threading.Thread):
    """What a server needs of its engine's process, by a thread."""

    exitcode = 0

    def __init__(self, run_engine, end, make_engine):
        super().__init__(name="engine", daemon=True)
        self.run_engine, self.end, self.make_engine = run_engine, end, make_engine
        self.ended = threading.Event()
        self.start()

    def run(self):
        try:
            self.run_engine(self.end, self.make_engine)
        finally:
            self.kill()

    def kill(self):
        """Close its end, as the system does for a process that has ended; the thread ends when it finds out."""
        self.ended.set()
        with suppress(OSError):
            self.end.shutdown(socket.SHUT_RDWR)

    def join(self, timeout=None):
        self.ended.wait(timeout)


def wait_until(condition, seconds=20.0):
    """Poll until a condition holds; AssertionError if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
