"""The server process: its application, its socket, its startup and its shutdown."""
import asyncio
import gc
import json
import logging
import multiprocessing
import os
import resource
import shlex
import socket
import sys
import time
from contextlib import asynccontextmanager, suppress
from typing import NoReturn

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import chat, completions, dev, endpoints, responses, tokenizing
from .async_engine import EngineStopped
from .errors import HANDLERS
from .gate import Gate
from .responses_store import Store
from .service import Service

ROUTERS = (
    endpoints.router,
    completions.router,
    chat.router,
    tokenizing.router,
    responses.router,
)
FAIL_S = 4.0  # how long before a drain's end unfinished requests fail: clients and the process need time to finish
LAST_WORDS_S = 1.0  # how long the server still answers requests, with an error, after its engine has stopped
GARBAGE_OBJECTS = 50_000  # allocations between runs of the garbage collector; one large body makes more than this
GOODBYE_S = 1.0  # how long connections may take to close when the server exits
READ_BYTES = 4096  # how much of a connection is parsed before the other connections get their turn


def create_app(service: Service) -> FastAPI:
    """Return the application, which starts the engine on startup and stops it on shutdown."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI):
        await service.async_engine.start()
        yield
        await service.async_engine.stop()

    app = FastAPI(
        title="stepserve",
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        redirect_slashes=False,  # a proxy's clients cannot follow to the address that this server knows
    )
    app.state.service = service
    app.state.responses = Store()
    app.add_middleware(Gate, service=service)
    app.add_middleware(HeadAsGet)
    for router in ROUTERS:
        app.include_router(router)
    if service.dev_mode:
        app.include_router(dev.router)
    return app


class HeadAsGet:
    """Answers HEAD like GET (uvicorn leaves out the body), and accepts a request target that is a whole URL."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = scope | {"method": "GET", "head": True}
        if scope["type"] == "http" and not scope["path"].startswith("/") and "://" in scope["path"]:
            scope = scope | {"path": "/" + scope["path"].partition("://")[2].partition("/")[2]}
        await self.app(scope, receive, send)


class Connection(asyncio.BufferedProtocol, H11Protocol):
    """Reads little at a time, since parsing thousands of tiny chunks at once would keep all other clients waiting.

    It is closed if no whole request comes: uvicorn's own timer begins with an answer, and ends with a first byte.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.waited_for = None  # the request at the last check

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.next_check = self.loop.call_later(self.timeout_keep_alive, self.check)

    def connection_lost(self, error: Exception | None) -> None:
        self.next_check.cancel()
        super().connection_lost(error)

    def check(self) -> None:
        """Close the connection if it has waited for the same request since the last check."""
        request = self.cycle
        is_waiting = request is None or request.response_complete or request.more_body
        if is_waiting and request is self.waited_for:
            self.transport.close()
        self.waited_for = request
        self.next_check = self.loop.call_later(self.timeout_keep_alive, self.check)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the memory that asyncio reads into."""
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))


class Server(uvicorn.Server):
    """Prints an example request when it is ready, and shuts down on a signal or when the engine has died."""

    def __init__(self, config: uvicorn.Config, service: Service):
        config.http = Connection
        super().__init__(config)
        self.service = service

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(invitation(url, self.service), file=sys.stderr, flush=True)

    def handle_exit(self, sig, frame) -> None:
        """On the first signal, drain: active requests may finish, and new ones get 503. On the second, exit at once."""
        if self.service.draining:
            # The engine process ends by itself when the server is gone, but not if it is hung.
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(1)
        self.service.draining = True
        self.fail_at = time.monotonic() + self.service.drain_seconds - FAIL_S

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end the server. uvicorn calls this ten times per second."""
        async_engine = self.service.async_engine
        if self.service.draining and async_engine.fatal_error is None and time.monotonic() > self.fail_at:
            async_engine.fail_all(EngineStopped("the server was shut down before this request was done"))
        if async_engine.fatal_error is not None and time.monotonic() - async_engine.stopped_at > LAST_WORDS_S:
            self.should_exit = True
        # What a slow client has not read yet is still in its connection's buffer.
        is_unread = any(connection.transport.get_write_buffer_size() for connection in self.server_state.connections)
        if self.service.draining and not self.service.num_active and not is_unread:
            self.should_exit = True
        return await super().on_tick(counter)


def invitation(url: str, service: Service) -> str:
    """Return an example command to copy, without the API key, since others may read the log."""
    key = ' -H "Authorization: Bearer $API_KEY"' if service.api_keys else ""
    body = shlex.quote(json.dumps({"model": service.models[0], "prompt": "Once upon a time", "max_tokens": 32}))
    return f"serving {service.models[0]}; try:\n  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {body}"


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to this address but not listening; ValueError if the address is unavailable."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except (OSError, UnicodeError) as error:
        raise unavailable(host, port, error) from None


def allow_connections() -> None:
    """Let the process open as many files, and connections are files, as the system allows; by default it may be a thousand."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Not every system accepts its own limit.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def unavailable(host: str, port: int, error: Exception) -> ValueError:
    return ValueError(f"cannot listen on {host}:{port}: {error}; choose another host or port (0 picks a free port)")


def serve(service: Service, bound: socket.socket, keep_alive_s: int) -> NoReturn:
    """Serve until a signal or the engine's death, then end the process: exit code 1 if the engine died, otherwise 0."""
    # If two servers start on one port at the same time, the second one to listen fails here.
    try:
        bound.listen()
    except OSError as error:
        raise unavailable(*bound.getsockname()[:2], error) from None
    allow_connections()
    app = create_app(service)
    app.openapi()  # build the schema now rather than on the first request for it; it is cached
    times = dict(timeout_keep_alive=keep_alive_s, timeout_graceful_shutdown=GOODBYE_S)
    config = uvicorn.Config(app, log_level="warning", ws="none", **times)
    # asyncio warns of what is written to a client that has just left, and the server learns of that a moment later.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    # A collection would scan everything loaded so far, which takes 0.1 s or more. None of it ever becomes garbage.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)
    Server(config, service).run([bound])
    # A thread may be in the middle of a step or a long text. Python's own exit would wait for it, or crash.
    sys.stderr.flush()
    os._exit(1 if service.async_engine.died else 0)
