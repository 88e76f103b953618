"""Errors in OpenAI's format: an HTTP status, and the body {"error": {"message", "type", "param", "code"}}."""
import json

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.responses import Response

from .async_engine import EngineStopped, GenerationFailed
from .params import RequestError


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    error: ErrorDetail


ERRORS = {status: {"model": ErrorBody, "description": "An error in OpenAI's format"} for status in ("4XX", "5XX")}


class ApiError(Exception):
    """An error response: its HTTP status, and OpenAI's message, param and code."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError) -> Response:
    # json.dumps escapes to ASCII: the message may quote half a surrogate pair, which UTF-8 cannot encode.
    return Response(json.dumps(error.body), error.status, media_type="application/json")


def forget_frames(error: Exception) -> None:
    """Forget where an error was raised. Frames hold the body and the future that holds the error: only a garbage collection would free them."""
    while error is not None:
        error.__traceback__, error = None, error.__context__


async def on_api_error(_request: Request, error: ApiError) -> Response:
    forget_frames(error)
    return error_response(error)


async def on_request_error(_request: Request, error: RequestError) -> Response:
    forget_frames(error)
    return error_response(ApiError(400, str(error), error.param, error.code))


async def on_generation_failed(_request: Request, error: GenerationFailed) -> Response:
    forget_frames(error)
    return error_response(failure(error))


def failure(error: GenerationFailed) -> ApiError:
    """Return a 503 if the engine accepts no more calls, so that clients try another server; otherwise a 500."""
    if isinstance(error, EngineStopped):
        return ApiError(503, str(error), code="engine_stopped")
    return ApiError(500, str(error), code="generation_failed")


async def on_invalid_body(_request: Request, error: RequestValidationError) -> Response:
    """Return a 400 that names the first invalid parameter."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json"))
    param = ".".join(map(str, first["loc"][1:]))
    return error_response(ApiError(400, f"{param or 'the body'}: {first['msg']}", param or None, "invalid_value"))


async def on_fault(_request: Request, _error: Exception) -> Response:
    return error_response(ApiError(500, "the server has a bug; see its log"))


HANDLERS = {
    ApiError: on_api_error,
    RequestError: on_request_error,
    GenerationFailed: on_generation_failed,
    RequestValidationError: on_invalid_body,
    Exception: on_fault,
}
