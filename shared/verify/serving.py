"""Serve a chapter in a thread of this process, on a real socket.

The engine is an object in this process too, so a test can pause it, break it and inspect it. In chapters with an engine
process, the engine runs in a thread at the other end of the chapter's socket pair, so every message is still pickled and
sent. With ENGINE = "thread", it runs in the server's process, as in the chapters before that.
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
    """Serve an engine over a real socket; yields the server, with its `url` and `service`."""
    process = importlib.import_module(f"milestones.{chapter.name}.process")
    service = process.Service(runner_of(chapter, engine), "pocket", **options)
    # The chapter's own socket: asyncio sets TCP_NODELAY only if the socket names its protocol, as this one does.
    with process.bind("127.0.0.1", 0) as listener:
        config = uvicorn.Config(process.create_app(service), log_config=None, log_level="critical", timeout_graceful_shutdown=1)
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
            assert not thread.is_alive(), "the server has not stopped after 20 s"
            # The process would close its log last of all.
            if log := getattr(config.app.state, "log", None):
                log.close()


def runner_of(chapter, engine):
    """The chapter's runner for its engine: an EngineThread, or an EngineProcess whose process is a thread."""
    if "engine_process" not in chapter.capabilities or ENGINE == "thread":
        return importlib.import_module(f"milestones.{chapter.name}.engine_thread").EngineThread(engine)
    module = importlib.import_module(f"milestones.{chapter.name}.engine_process")
    # Where the engine's process would exit, only its thread ends.
    module.leave = sys.exit

    class Runner(module.EngineProcess):
        """The chapter's own, except that it starts a thread instead of a process."""

        def start_process(self, engine_end, make_engine):
            return ThreadInstead(module.run_engine, engine_end.dup(), make_engine)

    return Runner(lambda: engine).wait_until_ready()


class ThreadInstead(threading.Thread):
    """A thread with the interface that a server uses of its engine's process."""

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
        """Close its end of the socket pair, as the system does when a process exits; the thread ends when it notices."""
        self.ended.set()
        with suppress(OSError):
            self.end.shutdown(socket.SHUT_RDWR)

    def join(self, timeout=None):
        self.ended.wait(timeout)


def wait_until(condition, seconds=20.0):
    """Poll until a condition holds; AssertionError if it does not hold in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds:g} s"
        time.sleep(0.005)
