"""Bodies, from bytes to Python: what is large to read is refused by its parts, which are counted first.

Python's parser makes an object of each part and cannot be interrupted: a million empty lists hold up the event loop for
most of a second. To count the parts of as many bytes takes milliseconds.
"""
import json

from fastapi import Request
from fastapi.routing import APIRoute

from .errors import ApiError

COUNTED_BYTES = 100_000  # less is read at once
MAX_PARTS = 50_000  # lists, objects and texts; twice as many as the largest conversation has
MAX_NUMBERS = 1_000_000  # a list of token ids is read fast
NO_MARKS = bytes(set(range(256)) - set(b'"[{,'))


def count_parts(body: bytes) -> tuple[int, int]:
    """How many lists, objects and texts are in JSON, and how many commas. If the texts are too many, only they are counted.

    >>> count_parts(b'{"prompt": ["[one, two]", [3, 4, 5]]}')
    (5, 3)
    """
    marks = body.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, NO_MARKS)
    num_texts = marks.count(b'"') // 2
    if num_texts > MAX_PARTS:
        return num_texts, 0
    # Every second piece is the inside of a text.
    outside = b"".join(marks.split(b'"')[::2])
    return num_texts + outside.count(b"[") + outside.count(b"{"), outside.count(b",")


class BodyRequest(Request):
    """A request whose JSON is refused if it has too many parts."""

    async def json(self):
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) > COUNTED_BYTES:
                num_parts, num_commas = count_parts(body)
                if num_parts > MAX_PARTS or num_commas > MAX_NUMBERS:
                    message = f"the body has more than {MAX_PARTS:,} lists, objects and texts, or {MAX_NUMBERS:,} numbers; send less at once"
                    raise ApiError(400, message, code="body_too_large")
            self._json = json.loads(body)
        return self._json


class BodyRoute(APIRoute):
    """A route that reads its body as BodyRequest does."""

    def get_route_handler(self):
        handle = super().get_route_handler()

        async def handle_counted(request: Request):
            return await handle(BodyRequest(request.scope, request.receive))

        return handle_counted
