"""The checks that every HTTP request passes before its endpoint runs."""
import hmac

from .errors import ApiError, error_response
from .service import Service

MAX_BODY_BYTES = 4 * 2**20
# Paths that need no key, and that a draining server still answers.
OPEN = ("/health", "/version", "/docs", "/openapi.json")


class Gate:
    """Returns 503 for new work while the server drains, 401 without a valid key, 413 for a body that is too large."""

    def __init__(self, app, service: Service):
        self.app = app
        self.service = service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            return await self.app(scope, receive, send)
        refused = self.refusal(scope)
        if refused is not None:
            return await error_response(refused)(scope, receive, send)
        scope["api_key"] = self.key_of(dict(scope["headers"]))
        num_bytes, complete = 0, False

        async def receive_counted():
            """Call receive and count the body's bytes. A drain waits for the request only once its body is complete."""
            nonlocal num_bytes, complete
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise too_large()
            if not complete and message["type"] == "http.request" and not message.get("more_body"):
                complete = True
                self.service.num_active += 1
            return message

        try:
            await self.app(scope, receive_counted, send)
        finally:
            self.service.num_active -= complete

    def refusal(self, scope) -> ApiError | None:
        headers = dict(scope["headers"])
        cancels = scope["path"].startswith("/v1/responses/") and scope["path"].endswith("/cancel")
        if self.service.draining and scope["method"] != "GET" and not cancels:
            message = "the server is shutting down; send this elsewhere"
            return ApiError(503, message, headers={"Retry-After": "5", "Connection": "close"})
        if self.service.api_keys and self.key_of(headers) is None:
            message = "no valid API key; send Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if encoding.lower() != "identity":
            return ApiError(415, f"Content-Encoding is {encoding[:40]!r}, which is not supported; send the body uncompressed")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            return too_large()
        return None

    def key_of(self, headers: dict[bytes, bytes]) -> str | None:
        """Return the API key that the request was sent with, or None if it is missing or unknown."""
        scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        # Compare every key in constant time, so that the response time reveals nothing about a key.
        matches = [key for key in self.service.api_keys if hmac.compare_digest(sent.strip(), key.encode())]
        return matches[0] if matches else None


def too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send a smaller one", code="body_too_large")
