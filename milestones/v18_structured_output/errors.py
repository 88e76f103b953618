"""Errors in OpenAI's format: an HTTP status, and the body {"error": {"message", "type", "param", "code"}}."""
import json
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from .async_engine import EngineStopped, GenerationFailed, QueueFull
from .params import GRAMMARS, RequestError


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    error: ErrorDetail


ERRORS = {status: {"model": ErrorBody, "description": "An error in OpenAI's format"} for status in ("4XX", "5XX")}


class ClientGone(Exception):
    """The client has disconnected before its generation began."""


class ApiError(Exception):
    """An error response: its HTTP status, and OpenAI's message, param and code."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError) -> Response:
    # json.dumps escapes to ASCII: the message may quote half a surrogate pair, which UTF-8 cannot encode.
    return Response(json.dumps(error.body), error.status, error.headers, "application/json")


@contextmanager
def refusals(prompt_param: str, limit_param: str = "max_tokens", grammar_param: str | None = None) -> Iterator[None]:
    """Make a RequestError about the prompt, max_tokens or the grammar name the parameters that these came from."""
    try:
        yield
    except RequestError as error:
        message, param = str(error), error.param
        if param in ("prompt", "messages", "max_tokens", "min_tokens"):
            message = message.replace("max_tokens", limit_param)
            param = {"max_tokens": limit_param, "min_tokens": param}.get(param, prompt_param)
        if grammar_param is not None and param in GRAMMARS:
            param = grammar_param
        raise RequestError(message, param, error.code) from None


def forget_frames(error: Exception) -> None:
    """Forget where an error was raised. Frames hold the body and the future that holds the error: only a garbage collection would free them."""
    while error is not None:
        error.__traceback__, error = None, error.__context__


async def on_api_error(_request: Request, error: ApiError) -> Response:
    forget_frames(error)
    return error_response(error)


async def on_request_error(_request: Request, error: RequestError) -> Response:
    forget_frames(error)
    if error.code == "queue_full":
        return error_response(ApiError(429, str(error), error.param, error.code, {"Retry-After": "1"}))
    return error_response(ApiError(400, str(error), error.param, error.code))


async def on_client_gone(_request: Request, _error: ClientGone) -> Response:
    return Response(status_code=499)


async def on_queue_full(_request: Request, error: QueueFull) -> Response:
    forget_frames(error)
    return error_response(ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"}))


async def on_generation_failed(_request: Request, error: GenerationFailed) -> Response:
    forget_frames(error)
    return error_response(failure(error))


def failure(error: GenerationFailed) -> ApiError:
    """Return a 503 if the engine accepts no more calls, so that clients try another server; otherwise a 500."""
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), code="engine_stopped")
    return ApiError(500, str(error), code="generation_failed")


def is_form(part: str | int) -> bool:
    """Whether part of an error's path is Pydantic's name for the form that it tried, and not the name of a parameter."""
    return isinstance(part, str) and (not part.isidentifier() or part in ("str", "int"))


async def on_invalid_body(request: Request, error: RequestValidationError) -> Response:
    """Return a 400 that names the first invalid parameter."""
    errors = error.errors()
    first = errors[0]
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    in_body = first["loc"][0] == "body"
    if in_body and not (content_type.startswith("application/") and content_type.endswith(("/json", "+json"))):
        return error_response(ApiError(400, "the body is not JSON; send Content-Type: application/json", code="invalid_json"))
    if first["type"] == "json_invalid":
        return error_response(ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json"))
    # Pydantic has a complaint for each form that a value may take. Report the form that matched furthest, if one did.
    complaints = [complaint for complaint in errors if complaint["loc"][:2] == first["loc"][:2]]
    depth = max(len(complaint["loc"]) for complaint in complaints)
    deepest = [complaint for complaint in complaints if len(complaint["loc"]) == depth]
    path = first["loc"][:2]
    while len(path) < depth:
        parts = [complaint["loc"][len(path)] for complaint in deepest]
        # Of several wrong parameters, the first; but a value that fits none of its forms is wrong in all of them.
        if len(set(parts)) > 1 and any(map(is_form, parts)):
            break
        deepest = [complaint for complaint, part in zip(deepest, parts) if part == parts[0]]
        path, complaints = deepest[0]["loc"][: len(path) + 1], deepest
    param = ""
    for part in path[1:]:
        if is_form(part):
            continue
        name = str(part)[:64]  # a client's key may be megabytes long
        param += f"[{name}]" if isinstance(part, int) else f".{name}" if param else name
    if deepest[0]["type"] == "refused":
        name = deepest[0]["ctx"]["name"]
        param = f"{param}.{name}" if param else name
        return error_response(ApiError(400, f"{param} {deepest[0]['msg']}", param))
    messages = dict.fromkeys(complaint["msg"].removeprefix("Value error, ") for complaint in complaints)
    return error_response(ApiError(400, f"{param or 'the body'}: {', or '.join(messages)}", param or None, "invalid_value"))


async def on_http_error(request: Request, error: HTTPException) -> Response:
    """Return the errors that FastAPI and Starlette raise themselves in OpenAI's format."""
    if isinstance(error.__cause__, ApiError):
        return error_response(error.__cause__)
    if isinstance(error.__cause__, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it, but it is counted
    if isinstance(error.__cause__, RecursionError):
        return await on_deep_body(request, error.__cause__)
    cause = str(error.__cause__ or error.detail).partition(";")[0]  # the rest is Python's advice to programmers
    messages = {
        400: f"the body cannot be read: {cause}",
        404: f"this server has no endpoint {request.url.path}; /docs lists its endpoints",
        405: f"{request.url.path} does not accept {request.method}; see the Allow header",
    }
    message = messages.get(error.status_code, str(error.detail))
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def on_deep_body(_request: Request, _error: RecursionError) -> Response:
    return error_response(ApiError(400, "the body is nested too deeply; send fewer levels", code="invalid_json"))


async def on_fault(_request: Request, _error: Exception) -> Response:
    return error_response(ApiError(500, "the server has a bug; see its log"))


HANDLERS = {
    ApiError: on_api_error,
    RequestError: on_request_error,
    QueueFull: on_queue_full,
    ClientGone: on_client_gone,
    GenerationFailed: on_generation_failed,
    RequestValidationError: on_invalid_body,
    HTTPException: on_http_error,
    RecursionError: on_deep_body,
    Exception: on_fault,
}
