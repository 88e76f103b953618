"""A server on a socket of this machine, in a thread of this process."""
import asyncio
import importlib
import threading
import time
from contextlib import contextmanager

import uvicorn


@contextmanager
def serving(chapter, engine, **options):
    """Serve an engine over a real socket; yields the server, with `url` and `service`."""
    process, thread = (importlib.import_module(f"milestones.{chapter.name}.{name}") for name in ("process", "engine_thread"))
    service = process.Service(thread.EngineThread(engine), "pocket", **options)
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


def wait_until(condition, seconds=20.0):
    """Poll until a condition holds; AssertionError if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
