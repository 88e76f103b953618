"""What clients send and get: OpenAI's completions and chat completions, as far as this engine computes them.

A parameter that OpenAI documents either works or is refused by name. Fields that nobody documents are let
through, because real clients send them; so is an explicit null, which means the default.
"""
import json
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .engine import StepOutput
from .sampling import SamplingParams


class ApiError(Exception):
    """An answer other than 200, in the shape that OpenAI's clients read."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# ---- requests

# What each refused parameter may be, because it then asks for nothing.
PENALTIES = {"frequency_penalty": [0, 0.0], "presence_penalty": [0, 0.0], "logit_bias": [{}]}
Text = Annotated[str, Field(min_length=1)]
# fail_fast: a million wrong items are one complaint.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]


def canonical(value: Any) -> str:
    """A value as JSON, without the nulls in it: by this true is not 1, and an explicit null is nothing."""
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if each is not None}
    return json.dumps(value, sort_keys=True)


class Strict(BaseModel):
    """A body from outside: no text for a number, no NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    # Documented by OpenAI, not computed here: the values with which each is let through all the same.
    refused: ClassVar[dict[str, list]] = {}

    @model_validator(mode="before")
    @classmethod
    def refuse(cls, data: Any) -> Any:
        """Name the first parameter that asks for what this server does not do, or is no Unicode; and drop nulls."""
        if not isinstance(data, dict):
            return data
        for name, inert in cls.refused.items():
            value = data.get(name)
            if value is not None and canonical(value) not in map(canonical, inert):
                allowed = " or ".join(["null", *map(json.dumps, inert)])
                raise ApiError(400, f"{name} is not supported here; leave it out ({allowed} is accepted)", name)
        for name in cls.model_fields.keys() & data.keys():
            try:
                json.dumps(data[name], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ApiError(400, f"{name} holds half a surrogate pair, which is no character", name) from None
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Strict):
    refused = {"include_obfuscation": [False]}

    include_usage: bool = False


class GenerationRequest(Strict):
    """What completions and chat completions have in common."""

    model: str
    n: int = Field(1, ge=1, le=128, description="answers to each prompt")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="the same seed draws the same text")
    stop: Text | Annotated[list[Text], Field(max_length=4)] = Field([], description="texts that end the answer before them")
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float = Field(1.0, ge=0, le=1, description="draw from the likeliest that reach this probability")
    user: str | None = Field(None, description="accepted; nothing here depends on it")
    # Beyond OpenAI's.
    top_k: int = Field(0, ge=0, description="not OpenAI's: draw from the k likeliest; 0: all")
    ignore_eos: bool = Field(False, description="not OpenAI's: go on after the model's end token")

    @model_validator(mode="after")
    def check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for streams; set stream to true or leave it out", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, max_tokens: int | None, **more) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            # The likeliest token is always kept; of a p of 0 it is the only one.
            top_p=max(self.top_p, 1e-12),
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            ignore_eos=self.ignore_eos,
            **more,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    refused = PENALTIES | {"suffix": [""]}

    prompt: Text | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)] = Field(
        description="a text, its tokens, or a list of either"
    )
    best_of: int | None = Field(None, ge=1, description="accepted if it equals n")
    echo: bool = Field(False, description="begin with the prompt")
    logprobs: int | None = Field(None, ge=0, le=5, description="report so many of the likeliest tokens")
    max_tokens: int | None = Field(None, ge=0, description="default: 16")

    @model_validator(mode="after")
    def check_best_of(self):
        if self.best_of not in (None, self.n):
            raise ApiError(400, f"best_of is {self.best_of} and n {self.n}: only equal ones are supported", "best_of")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


def plain_turn(role: str, content: str | list) -> dict[str, str]:
    """A developer's words are the system's, and parts are one text."""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return {"role": "system" if role == "developer" else role, "content": text}


class Message(Strict):
    """A turn of a conversation; what else it holds, a name say, is the template's business."""

    model_config = ConfigDict(extra="allow")
    refused = dict.fromkeys(("tool_calls", "function_call", "audio", "refusal", "tool_call_id"), [])

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, Any]:
        """As templates know it, which have no developer and no parts."""
        return self.model_extra | plain_turn(self.role, self.content)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    refused = PENALTIES | {
        "audio": [],
        "function_call": ["none"],
        "functions": [[]],
        "metadata": [{}],
        "modalities": [["text"]],
        "moderation": [],
        "parallel_tool_calls": [True, False],
        "prediction": [],
        "prompt_cache_options": [{}],
        "prompt_cache_retention": ["in_memory"],
        "reasoning_effort": ["none"],
        "response_format": [{"type": "text"}],
        "service_tier": ["auto", "default"],
        "store": [False],
        "tool_choice": ["none", "auto"],
        "tools": [[]],
        "verbosity": ["medium"],
        "web_search_options": [],
    }

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs logprobs")
    max_completion_tokens: int | None = Field(None, ge=1, description="default: what the context has room for")
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    safety_identifier: str | None = Field(None, description="accepted; nothing here depends on it")
    prompt_cache_key: str | None = Field(None, description="accepted; nothing here depends on it")

    @model_validator(mode="after")
    def check_pairs(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        return self


# ---- answers

class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None

    def followed_by(self, piece: "CompletionChoice") -> "CompletionChoice":
        """Two pieces of an answer as one."""
        text = self.text + piece.text
        logprobs = self.logprobs and CompletionLogprobs(
            **{name: values + getattr(piece.logprobs, name) for name, values in self.logprobs}
        )
        return CompletionChoice(index=self.index, text=text, logprobs=logprobs, finish_reason=piece.finish_reason)


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob] = []
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(BaseModel):
    index: int
    delta: dict[str, str]
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    return int(time.time())


# ---- from tokens to answers

class Answer:
    """What one request has said so far."""

    def __init__(self, index: int, keep: bool = True):
        self.index = index
        self.keep = keep  # False: the tokens that are computed are not wanted
        self.text = ""
        self.num_tokens = 0
        self.finish_reason = None
        self.prompt_logprobs = None
        self.pending: list[tuple[int, dict[int, float]]] = []  # logprobs of tokens whose text is not certain yet

    def push(self, output: StepOutput) -> tuple[str, list[tuple[int, dict[int, float]]]]:
        """Take a token; return the text that became certain, and the logprobs of the tokens it came from.

        A token that is not in the text, because it ended it or belongs to a stop string, has none.
        """
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.finish_reason = output.finish_reason
        if not self.keep:
            self.finish_reason = "length"
            return "", []
        self.num_tokens += 1
        is_end_token = isinstance(output.stop_reason, int)
        if output.logprobs is not None and not is_end_token:
            self.pending.append((output.token_id, output.logprobs))
        # What waits becomes text later, or belongs to the stop string that was found.
        waits = output.finish_reason is None or isinstance(output.stop_reason, str)
        if waits and not output.text:
            return "", []
        self.text += output.text
        ready, self.pending = self.pending, []
        return output.text, ready


class TokenNames:
    """How tokens are written in answers."""

    def __init__(self, vocabulary: list[bytes], special_ids: set[int]):
        self.vocabulary = vocabulary
        self.special_ids = special_ids  # no part of any text

    def bytes_of(self, token_id: int) -> bytes:
        """Nothing, for a token that the model has and the tokenizer has not."""
        return self.vocabulary[token_id] if token_id < len(self.vocabulary) else b""

    def text_of(self, token_id: int) -> str:
        """The token as text; as bytes:\\xe2, as OpenAI's completions have it, if it is a part of a character."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def of_completion(self, tokens: list, offset: int) -> CompletionLogprobs:
        """Logprobs as completions have them; tokens are (token_id, logprobs or None), offset is where their text begins."""
        found = CompletionLogprobs()
        raw = b""
        for token_id, logprobs in tokens:
            found.tokens.append(self.text_of(token_id))
            found.token_logprobs.append(None if logprobs is None else finite(logprobs[token_id]))
            top = None if logprobs is None else {self.text_of(each): finite(value) for each, value in logprobs.items()}
            found.top_logprobs.append(top)
            found.text_offset.append(offset + len(raw.decode(errors="ignore")))
            raw += b"" if token_id in self.special_ids else self.bytes_of(token_id)
        return found

    def of_chat(self, tokens: list, count: int) -> list[TokenLogprob]:
        """Logprobs as chat has them, with the count likeliest tokens of each place."""
        return [
            TokenLogprob(
                **self.entry(token_id, logprobs[token_id]),
                top_logprobs=[
                    TopLogprob(**self.entry(each, logprob))
                    for each, logprob in sorted(logprobs.items(), key=lambda item: -item[1])[:count]
                ],
            )
            for token_id, logprobs in tokens
        ]

    def entry(self, token_id: int, logprob: float) -> dict:
        raw = self.bytes_of(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is next to impossible."""
    return max(logprob, -9999.0)
