"""A line in the log for each HTTP request, and an id that the client and the log share."""
import json
import re
import time
import uuid

from .log import Log
from .service import Service

# A client's goes into the log as it is, so it must be short and harmless.
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
HEADER = b"x-request-id"


class AccessLog:
    """Gives each request an id, which the response's x-request-id repeats, and writes a line when it has been answered."""

    def __init__(self, app, service: Service, log: Log):
        self.app = app
        self.metrics = service.async_engine.metrics
        self.log_format = service.log_format  # text, json, or none for no lines
        self.log = log

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = dict(scope["headers"]).get(HEADER, b"")
        request_id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex.encode()
        scope["request_id"] = request_id.decode()
        began, status = time.monotonic(), 499  # nginx's number for a client that has gone
        scope["arrived"] = began

        async def send_with_id(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = message | {"headers": [*message["headers"], (HEADER, request_id)]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.write(scope, status, time.monotonic() - began)

    def write(self, scope, status: int, seconds: float) -> None:
        """Write what is known of a request; never what was asked or answered."""
        # The route's own path: a client's may be long, or hold what nobody else should read.
        path = getattr(scope.get("route"), "path", "-")
        self.metrics.add_answer(path, status)
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "request_id": scope["request_id"], "method": scope["method"][:10]}
        line |= {"path": path, "status": status, "seconds": round(seconds, 4)}
        if self.log_format != "none":
            self.log.put(json.dumps(line) if self.log_format == "json" else " ".join(map(str, line.values())))
