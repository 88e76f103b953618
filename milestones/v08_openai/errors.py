"""Errors as OpenAI's clients read them: an HTTP status, and {"error": {"message", "type", "param", "code"}}."""
import json
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from .async_engine import EngineStopped, GenerationFailed, QueueFull
from .params import RequestError


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    error: ErrorDetail


ERRORS = {status: {"model": ErrorBody, "description": "An error, in OpenAI's form"} for status in ("4XX", "5XX")}


class ApiError(Exception):
    """An answer other than 200."""

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
    # ASCII only: the message may quote half a surrogate pair, which no encoding has.
    return Response(json.dumps(error.body), error.status, error.headers, "application/json")


@contextmanager
def refusals(prompt_param: str) -> Iterator[None]:
    """Let the engine's refusals of a prompt name the parameter that the prompt came from."""
    try:
        yield
    except RequestError as error:
        param = prompt_param if error.param in ("prompt", "messages") else error.param
        raise RequestError(str(error), param, error.code) from None


async def on_api_error(_request: Request, error: ApiError) -> Response:
    return error_response(error)


async def on_request_error(_request: Request, error: RequestError) -> Response:
    return error_response(ApiError(400, str(error), error.param, error.code))


async def on_queue_full(_request: Request, error: QueueFull) -> Response:
    return error_response(ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"}))


async def on_generation_failed(_request: Request, error: GenerationFailed) -> Response:
    return error_response(failure(error))


def failure(error: GenerationFailed) -> ApiError:
    """503 if another server may still do it, else 500."""
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), code="engine_stopped")
    return ApiError(500, str(error), code="generation_failed")


async def on_invalid_body(request: Request, error: RequestValidationError) -> Response:
    """Name the first parameter that is wrong."""
    errors = error.errors()
    first = errors[0]
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    in_body = first["loc"][0] == "body"
    if in_body and not (content_type.startswith("application/") and content_type.endswith(("/json", "+json"))):
        return error_response(ApiError(400, "the body is not JSON; send Content-Type: application/json", code="invalid_json"))
    if first["type"] == "json_invalid":
        return error_response(ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json"))
    # A value that may have several forms has a complaint for each. The form that fits furthest is meant, if there is one.
    alike = [each for each in errors if each["loc"][:2] == first["loc"][:2]]
    furthest = [each for each in alike if len(each["loc"]) == max(len(each["loc"]) for each in alike)]
    place = first["loc"][:2]
    while len({each["loc"][: len(place) + 1] for each in furthest}) == 1 and len(place) < len(furthest[0]["loc"]):
        place = furthest[0]["loc"][: len(place) + 1]
        alike = furthest
    param = ""
    for part in place[1:]:
        # This says which form of a value was tried.
        if isinstance(part, str) and (not part.isidentifier() or part in ("str", "int")):
            continue
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    if furthest[0]["type"] == "refused":
        name = furthest[0]["ctx"]["name"]
        param = f"{param}.{name}" if param else name
        return error_response(ApiError(400, f"{param} {furthest[0]['msg']}", param))
    complaints = dict.fromkeys(each["msg"] for each in alike)
    return error_response(ApiError(400, f"{param or 'the body'}: {', or '.join(complaints)}", param or None, "invalid_value"))


async def on_http_error(request: Request, error: HTTPException) -> Response:
    """What FastAPI and starlette refuse by themselves, in OpenAI's form."""
    if isinstance(error.__cause__, ApiError):
        return error_response(error.__cause__)
    if isinstance(error.__cause__, RecursionError):
        return await on_deep_body(request, error.__cause__)
    cause = str(error.__cause__ or error.detail).partition(";")[0]  # after it Python says what to change in this program
    messages = {
        400: f"the body cannot be read: {cause}",
        404: f"there is no {request.url.path} here",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def on_deep_body(_request: Request, _error: RecursionError) -> Response:
    return error_response(ApiError(400, "the body is nested too deeply", code="invalid_json"))


async def on_fault(_request: Request, _error: Exception) -> Response:
    return error_response(ApiError(500, "the server has a bug; its log says more"))


HANDLERS = {
    ApiError: on_api_error,
    RequestError: on_request_error,
    QueueFull: on_queue_full,
    GenerationFailed: on_generation_failed,
    RequestValidationError: on_invalid_body,
    HTTPException: on_http_error,
    RecursionError: on_deep_body,
    Exception: on_fault,
}
