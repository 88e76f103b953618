"""OpenAI's completions and chat completions over HTTP.

The event loop owns the connections and never computes: it hands requests to the engine's thread, and turns what
comes back into answers.
"""
import asyncio
import hmac
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from .async_engine import AsyncEngine, EngineLike, Generation, QueueFull, StepFailed
from .protocol import (
    Answer,
    ApiError,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionRequest,
    ErrorBody,
    GenerationRequest,
    TokenNames,
    Usage,
    new_id,
    now,
)
from .sampling import choices
from .text import encode, encode_chat, vocabulary_bytes

MAX_BODY_BYTES = 4 * 2**20
ERRORS = {status: {"model": ErrorBody, "description": "An error, in OpenAI's body"} for status in ("4XX", "5XX")}
ANSWERS = ERRORS | {200: {"content": {"text/event-stream": {}}, "description": "A body, or a stream of events"}}


class Service:
    """What the endpoints share."""

    def __init__(
        self,
        engine: EngineLike,
        model_name: str,
        *,
        api_key: str | None = None,
        max_waiting: int = 256,
        default_max_tokens: int | None = None,
    ):
        self.engine = AsyncEngine(engine, max_waiting)
        self.names = TokenNames(vocabulary_bytes(engine.tokenizer), set(engine.tokenizer.all_special_ids))
        self.model_name = model_name
        self.api_key = api_key
        self.default_max_tokens = default_max_tokens
        self.started = now()
        # A text of more bytes has too many tokens, whatever they are (4: a tokenizer may compose characters first).
        self.max_text_bytes = 4 * engine.max_model_len * max(map(len, self.names.vocabulary))
        self.draining = False
        self.num_active = 0  # requests that are being answered

    def check_model(self, name: str) -> None:
        if name != self.model_name:
            raise ApiError(404, f"the model {name!r} is not served here; {self.model_name!r} is", "model", "model_not_found")

    def check_count(self, num_prompts: int, n: int) -> None:
        """ApiError if a call asks for more answers than may wait at once, before any is prepared."""
        asked, most = num_prompts * n, self.engine.max_waiting
        if asked > most:
            param = "prompt" if n == 1 else "n"
            raise ApiError(400, f"n x prompts is {asked}, but a call has at most {most} requests; send several", param)

    def check_size(self, texts: list[str]) -> None:
        """ValueError for a text that cannot fit, before it is tokenized."""
        longest = max((len(text.encode()) for text in texts), default=0)
        if longest > self.max_text_bytes:
            raise ValueError(f"prompt has {longest} bytes, too many for max_model_len = {self.engine.max_model_len}; shorten it")

    def max_tokens(self, asked: int | None, default: int | None, num_prompt: int) -> int:
        """What was asked for; else the default, as far as there is room for it."""
        if asked is not None:
            return asked
        room = max(1, self.engine.max_model_len - num_prompt)
        return min(each for each in (default, self.default_max_tokens, room) if each is not None)


@contextmanager
def refusals(prompt_param: str) -> Iterator[None]:
    """Turn what the engine refuses into answers that name the parameter."""
    try:
        yield
    except ValueError as error:
        named = str(error).split()[0]
        param = named if named in ("temperature", "top_p", "top_k", "seed", "stop", "logprobs", "n") else prompt_param
        code = "context_length_exceeded" if "max_model_len" in str(error) else None
        raise ApiError(400, str(error), param, code) from None


router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """How busy the engine is; 503 while the server drains, 500 if the engine has stopped."""
    service = request.app.state.service
    status, code = ("draining", 503) if service.draining else ("ok", 200)
    if service.engine.dead is not None:
        status, code = "dead", 500
    stats = service.engine.stats
    return JSONResponse(
        {
            "status": status,
            "running": stats.running,
            "waiting": service.engine.num_waiting,
            "free_blocks": stats.free_blocks,
            "total_blocks": stats.total_blocks,
        },
        status_code=code,
    )


def model_card(service: Service) -> dict:
    return {"id": service.model_name, "object": "model", "created": service.started, "owned_by": "stepserve"}


@router.get("/v1/models", responses=ERRORS)
async def list_models(request: Request) -> dict:
    return {"object": "list", "data": [model_card(request.app.state.service)]}


@router.get("/v1/models/{name:path}", responses=ERRORS)
async def retrieve_model(request: Request, name: str) -> dict:
    service = request.app.state.service
    service.check_model(name)
    return model_card(service)


# ---- completions


@router.post("/v1/completions", response_model=Completion, responses=ANSWERS)
async def create_completion(request: Request, body: CompletionRequest):
    service = request.app.state.service
    service.check_model(body.model)
    prompt = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    with refusals("prompt"):
        given = prompt if several else [prompt]
        service.check_count(len(given), body.n)
        service.check_size([each for each in given if isinstance(each, str)])
        prompts = await service.engine.tokenize(tokenize_prompts, given, body.echo)
        requests, answers = [], []
        for ids, _ in prompts:
            # An engine gives every request a token; one that wants none has it thrown away.
            asked = 1 if body.max_tokens == 0 else body.max_tokens
            params = body.sampling_params(
                service.max_tokens(asked, 16, len(ids)),
                logprobs=body.logprobs,
                prompt_logprobs=body.echo and body.logprobs is not None,
            )
            requests += [(ids, choice) for choice in choices(params, body.n)]
            answers += [Answer(len(answers) + i, keep=body.max_tokens != 0) for i in range(body.n)]
        generation = await service.engine.generate(requests)
    each_prompt = [prompt for prompt in prompts for _ in range(body.n)]
    num_prompt = sum(len(ids) for ids, _ in prompts)
    writer = CompletionWriter(service, body, generation, answers, num_prompt, prompts=each_prompt)
    if body.stream:
        return Events(generation, writer.stream())
    return await unless_gone(request, generation, writer.whole())


def tokenize_prompts(tokenizer, prompts: list, echo: bool) -> list[tuple[list[int], str]]:
    """Each prompt's tokens, and its text if it is wanted."""
    found = []
    for prompt in prompts:
        ids = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special_tokens=True) if echo else ""
        found.append((ids, text))
    return found


class Writer:
    """Turns the tokens of one call into its answers, whole or in chunks."""

    id_prefix: str
    chunk_model: type

    def __init__(self, service: Service, body: GenerationRequest, generation: Generation, answers: list, num_prompt: int):
        self.service, self.body, self.generation = service, body, generation
        self.answers, self.num_prompt = answers, num_prompt
        self.head = {"id": new_id(self.id_prefix), "created": now(), "model": body.model}

    def usage(self) -> Usage:
        num_tokens = sum(answer.num_tokens for answer in self.answers)
        total = self.num_prompt + num_tokens
        return Usage(prompt_tokens=self.num_prompt, completion_tokens=num_tokens, total_tokens=total)

    async def collect(self) -> list[list]:
        """Hear every answer to its end; the logprobs of the tokens of each."""
        found = [[] for _ in self.answers]
        async for index, output in self.generation:
            found[index] += self.answers[index].push(output)[1]
        return found

    async def stream(self) -> AsyncIterator[str]:
        async for piece in self.pieces():
            yield self.chunk([piece])
        if self.body.include_usage:
            yield self.chunk([], self.usage())
        yield "[DONE]"

    def chunk(self, pieces: list, total: Usage | None = None) -> str:
        exclude = None if self.body.include_usage else {"usage"}
        return event(self.chunk_model(**self.head, choices=pieces, usage=total).model_dump(exclude=exclude))


class CompletionWriter(Writer):
    id_prefix, chunk_model = "cmpl-", Completion

    def __init__(self, *args, prompts: list[tuple[list[int], str]]):
        super().__init__(*args)
        self.prompts = prompts  # of each answer, its tokens and its text
        self.started: set[int] = set()

    def piece(self, answer: Answer, text: str, tokens: list) -> CompletionChoice:
        """The next part of an answer; the first one begins with the prompt if that is wanted."""
        offset = len(answer.text) - len(text)
        ids, prompt = self.prompts[answer.index]
        if self.body.echo:
            offset += len(prompt)
            if answer.index not in self.started:
                text = prompt + text
                offset = 0
                if answer.prompt_logprobs is not None:
                    tokens = [*zip(ids, answer.prompt_logprobs, strict=True), *tokens]
        self.started.add(answer.index)
        logprobs = None if self.body.logprobs is None else self.service.names.of_completion(tokens, offset)
        return CompletionChoice(index=answer.index, text=text, logprobs=logprobs, finish_reason=answer.finish_reason)

    async def whole(self) -> Completion:
        found = await self.collect()
        made = [self.piece(answer, answer.text, tokens) for answer, tokens in zip(self.answers, found, strict=True)]
        return Completion(**self.head, choices=made, usage=self.usage())

    async def pieces(self) -> AsyncIterator[CompletionChoice]:
        async for index, output in self.generation:
            answer = self.answers[index]
            text, tokens = answer.push(output)
            if text or tokens or answer.finish_reason or (self.body.echo and index not in self.started):
                yield self.piece(answer, text, tokens)


# ---- chat


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWERS)
async def create_chat_completion(request: Request, body: ChatRequest):
    service = request.app.state.service
    service.check_model(body.model)
    service.check_count(1, body.n)
    with refusals("messages"):
        ids = await tokenize_chat(service, [message.plain() for message in body.messages])
        asked = body.max_completion_tokens or body.max_tokens
        params = body.sampling_params(
            service.max_tokens(asked, None, len(ids)),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        generation = await service.engine.generate([(ids, choice) for choice in choices(params, body.n)])
    writer = ChatWriter(service, body, generation, [Answer(i) for i in range(body.n)], len(ids))
    if body.stream:
        return Events(generation, writer.stream())
    return await unless_gone(request, generation, writer.whole())


async def tokenize_chat(service: Service, messages: list[dict], param: str = "messages") -> list[int]:
    """The tokens of a conversation; ApiError if the checkpoint's template refuses it, ValueError if it cannot fit."""
    service.check_size(["".join(message["content"] for message in messages)])
    try:
        return await service.engine.tokenize(encode_chat, messages)
    except ValueError as error:
        raise ApiError(400, str(error), param) from None


class ChatWriter(Writer):
    id_prefix, chunk_model = "chatcmpl-", ChatChunk

    def logprobs(self, tokens: list) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return ChatLogprobs(content=self.service.names.of_chat(tokens, self.body.top_logprobs or 0))

    async def whole(self) -> ChatCompletion:
        found = await self.collect()
        made = [
            ChatChoice(
                index=answer.index,
                message=ChatMessage(content=answer.text),
                logprobs=self.logprobs(tokens),
                finish_reason=answer.finish_reason,
            )
            for answer, tokens in zip(self.answers, found, strict=True)
        ]
        return ChatCompletion(**self.head, choices=made, usage=self.usage())

    async def pieces(self) -> AsyncIterator[ChunkChoice]:
        for answer in self.answers:
            yield ChunkChoice(index=answer.index, delta={"role": "assistant", "content": ""})
        async for index, output in self.generation:
            answer = self.answers[index]
            text, tokens = answer.push(output)
            if text or tokens:
                yield ChunkChoice(index=index, delta={"content": text}, logprobs=self.logprobs(tokens))
            if answer.finish_reason:
                yield ChunkChoice(index=index, delta={}, finish_reason=answer.finish_reason)


def event(data: dict) -> str:
    """ASCII alone, since some clients take U+2028 and its like for the end of a line."""
    return json.dumps(data)


# ---- how answers travel


class Events(EventSourceResponse):
    """A stream of server-sent events. However it ends, by its end, a fault or a client that hangs up, so does its work."""

    def __init__(self, generation: Generation, events: AsyncIterator):
        super().__init__(with_faults(events), sep="\n")
        self.generation = generation

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.abort()


async def with_faults(events: AsyncIterator) -> AsyncIterator:
    """The events; if the engine fails under them, one that says so is the last."""
    try:
        async for each in events:
            yield each
    except StepFailed as error:
        yield event({"error": ApiError(500, str(error)).body["error"] | {"code": 500}})


async def unless_gone(request: Request, generation: Generation, work: Coroutine):
    """The result of work; if the client hangs up before, the work is given up."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=499)
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        generation.abort()


async def disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Gate:
    """What every request to /v1 passes: 503 for new work while the server drains, 401 without the key, 413 if it is too large."""

    def __init__(self, app, service: Service):
        self.app = app
        self.service = service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        refused = self.refusal(scope["method"], headers)
        if refused is not None:
            return await error_response(refused)(scope, receive, send)
        num_bytes, complete = 0, False

        async def receive_counted():
            """As receive; a request whose body has not arrived yet is none that a draining server waits for."""
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

    def refusal(self, method: str, headers: dict[bytes, bytes]) -> ApiError | None:
        # What was computed may still be fetched.
        if self.service.draining and method != "GET":
            return ApiError(503, "the server is shutting down; send this elsewhere", Retry_After="5", Connection="close")
        key = self.service.api_key
        if key is not None and not hmac.compare_digest(headers.get(b"authorization", b""), f"Bearer {key}".encode()):
            return ApiError(401, "no valid API key; send Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            return too_large()
        return None


def too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less", code="body_too_large")


def error_response(error: ApiError) -> Response:
    # ASCII alone: the message may quote what no encoding has, half a surrogate pair.
    return Response(json.dumps(error.body), error.status, error.headers, "application/json")


async def on_api_error(_request: Request, error: ApiError) -> Response:
    return error_response(error)


async def on_queue_full(_request: Request, error: QueueFull) -> Response:
    return error_response(ApiError(429, str(error), code="queue_full", Retry_After="1"))


async def on_step_failed(_request: Request, error: StepFailed) -> Response:
    return error_response(ApiError(500, str(error), code="step_failed"))


async def on_invalid_body(request: Request, error: RequestValidationError) -> Response:
    """Name the first parameter that is wrong."""
    found = error.errors()
    first = found[0]
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not content_type.endswith(("/json", "+json")):
        return error_response(ApiError(400, "the body is not JSON; send Content-Type: application/json", code="invalid_json"))
    if first["type"] == "json_invalid":
        return error_response(ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json"))
    param = ""
    for part in first["loc"][1:]:
        # What follows says which form of a value was tried.
        if isinstance(part, str) and (not part.isidentifier() or part in ("str", "int")):
            break
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    # A value that may have several forms has a complaint for each.
    complaints = dict.fromkeys(each["msg"] for each in found if each["loc"][:2] == first["loc"][:2])
    return error_response(ApiError(400, f"{param or 'the body'}: {', or '.join(complaints)}", param or None, "invalid_value"))


async def on_http_error(request: Request, error: HTTPException) -> Response:
    if isinstance(error.__cause__, ApiError):
        return error_response(error.__cause__)
    if isinstance(error.__cause__, RecursionError):
        return await on_deep_body(request, error.__cause__)
    cause = str(error.__cause__ or error.detail).partition(";")[0]  # behind it Python says what to change in this program
    says = {
        400: f"the body cannot be read: {cause}",
        404: f"there is no {request.url.path} here",
        405: f"{request.url.path} does not take {request.method}",
    }
    answer = ApiError(error.status_code, says.get(error.status_code, str(error.detail)))
    answer.headers = dict(error.headers or {})
    return error_response(answer)


async def on_deep_body(_request: Request, _error: RecursionError) -> Response:
    return error_response(ApiError(400, "the body is nested too deeply", code="invalid_json"))


async def on_fault(_request: Request, _error: Exception) -> Response:
    return error_response(ApiError(500, "the server has a bug; its log says more"))


def create_app(service: Service) -> FastAPI:
    """The application, whose engine runs while it does."""
    from .responses import router as responses_router

    @asynccontextmanager
    async def lifespan(_app: FastAPI):
        service.engine.start()
        yield
        await service.engine.stop()

    app = FastAPI(title="stepserve", lifespan=lifespan)
    app.state.service = service
    app.include_router(router)
    app.include_router(responses_router)
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(QueueFull, on_queue_full)
    app.add_exception_handler(StepFailed, on_step_failed)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RecursionError, on_deep_body)
    app.add_exception_handler(Exception, on_fault)
    return app


# ---- the process


class Server(uvicorn.Server):
    """One that drains: after SIGTERM running requests may end, new ones get 503; a second one ends it at once.

    Four seconds before the time is up, what still runs is failed: to say so takes time, and so does the end of a process.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float):
        super().__init__(config)
        self.service = service
        self.drain_seconds = drain_seconds
        self.draining_since = None
        self.gave_up = False

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(invitation(url, self.service), file=sys.stderr, flush=True)

    def handle_exit(self, sig, frame) -> None:
        if self.service.draining:
            os._exit(1)
        self.service.draining = True
        self.draining_since = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        if self.draining_since is not None:
            left = self.draining_since + self.drain_seconds - time.monotonic()
            if not self.service.num_active:
                self.should_exit = True
            elif left < min(4, 0.65 * self.drain_seconds) and not self.gave_up:
                self.gave_up = True
                self.service.engine.fail_all(StepFailed("the server was shut down before this request was done"))
            elif left < min(3, 0.5 * self.drain_seconds):
                self.should_exit = True
        return await super().on_tick(counter)


def invitation(url: str, service: Service) -> str:
    """A line that works when it is pasted; the key is left to who knows it, since logs are read by others."""
    key = ' -H "Authorization: Bearer $API_KEY"' if service.api_key else ""
    body = shlex.quote(json.dumps({"model": service.model_name, "prompt": "Once upon a time", "max_tokens": 32}))
    return f"serving {service.model_name}; try:\n  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {body}"


def bind(host: str, port: int) -> socket.socket:
    """A socket with this address; ValueError if it cannot be had. Nobody can connect before the server listens."""
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


def serve(service: Service, bound: socket.socket, drain_seconds: float) -> int:
    """Run until a signal says otherwise; the exit code."""
    goodbye = min(1, 0.1 * drain_seconds)
    config = uvicorn.Config(create_app(service), log_level="warning", timeout_graceful_shutdown=goodbye)
    try:
        Server(config, service, drain_seconds).run([bound])
    # Two that began together both had the port; one of them listened first.
    except OSError as error:
        raise unavailable(*bound.getsockname()[:2], error) from None
    # A step under way cannot be interrupted, and Python's own end would crash on it.
    if service.engine.thread.is_alive():
        sys.stderr.flush()
        os._exit(0)
    return 0
