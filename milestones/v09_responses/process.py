"""The server's process: its application, its socket, its beginning and its end."""
import gc
import json
import os
import shlex
import socket
import sys
import time
from contextlib import asynccontextmanager
from typing import NoReturn
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI

from . import chat, completions, endpoints, responses, tokenizing
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
FAIL_S = 4.0  # how long before the end of a drain what still runs is failed: clients and process need time to end
LAST_WORDS_S = 1.0  # how long a server that takes no requests any more says so
GARBAGE_OBJECTS = 50_000  # objects that are allocated before the collector runs; one large body has more
GOODBYE_S = 1.0  # how long connections may then take to close


def create_app(service: Service) -> FastAPI:
    """The application; the engine steps while it runs."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI):
        await service.async_engine.start()
        yield
        await service.async_engine.stop()

    app = FastAPI(
        title="stepserve",
        lifespan=lifespan,
        exception_handlers=HANDLERS,
    )
    app.state.service = service
    app.state.responses = Store()
    app.add_middleware(Gate, service=service)
    app.add_middleware(HeadAsGet)
    for router in ROUTERS:
        app.include_router(router)
    return app


class HeadAsGet:
    """What GET answers, HEAD does; uvicorn leaves out the body. A target may be a whole URL."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = scope | {"method": "GET"}
        if scope["type"] == "http" and "://" in scope["path"].partition("?")[0]:
            scope = scope | {"path": urlsplit(scope["path"]).path or "/"}
        await self.app(scope, receive, send)


class Server(uvicorn.Server):
    """Prints a command that works, and ends by a signal or when the engine has died."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(invitation(url, self.service), file=sys.stderr, flush=True)

    def handle_exit(self, sig, frame) -> None:
        """On the first signal begin to drain: what runs may end, new requests get 503. On the second one, end at once."""
        if self.service.draining:
            os._exit(1)
        self.service.draining = True
        self.fail_at = time.monotonic() + self.service.drain_seconds - FAIL_S

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        async_engine = self.service.async_engine
        if self.service.draining and async_engine.fatal_error is None and time.monotonic() > self.fail_at:
            async_engine.fail_all(EngineStopped("the server was shut down before this request was done"))
        if async_engine.fatal_error is not None and time.monotonic() - async_engine.stopped_at > LAST_WORDS_S:
            self.should_exit = True
        if self.service.draining and not self.service.num_active:
            self.should_exit = True
        return await super().on_tick(counter)


def invitation(url: str, service: Service) -> str:
    """A command line to copy; the key is left to those who know it, since logs are read by others."""
    key = ' -H "Authorization: Bearer $API_KEY"' if service.api_keys else ""
    body = shlex.quote(json.dumps({"model": service.models[0], "prompt": "Once upon a time", "max_tokens": 32}))
    return f"serving {service.models[0]}; try:\n  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {body}"


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address, on which nobody can connect before the server listens; ValueError if it is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except (OSError, UnicodeError) as error:
        raise unavailable(host, port, error) from None


def unavailable(host: str, port: int, error: Exception) -> ValueError:
    return ValueError(f"{host}:{port} cannot be listened on: {error}; give another host or port (0: a free one)")


def serve(service: Service, bound: socket.socket, keep_alive_s: int) -> NoReturn:
    """Run until a signal ends the server or its engine has died, and end the process: 0, or 1 if it died."""
    app = create_app(service)
    app.openapi()  # it is made when it is first asked for, and kept
    times = dict(timeout_keep_alive=keep_alive_s, timeout_graceful_shutdown=GOODBYE_S)
    config = uvicorn.Config(app, log_level="warning", ws="none", **times)
    # A search for garbage would look at all that was loaded, for a tenth of a second or more. None of it ever is garbage.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)
    try:
        Server(config, service).run([bound])
    # Of two servers that began together with one port, one listened first.
    except OSError as error:
        raise unavailable(*bound.getsockname()[:2], error) from None
    # A thread may be inside a step or a long text. Python's own exit would wait for it, or crash on it.
    sys.stderr.flush()
    os._exit(1 if service.async_engine.died else 0)
