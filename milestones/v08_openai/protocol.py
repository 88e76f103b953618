"""What clients send and get: OpenAI's completions and chat completions, as far as this server knows them.

A parameter that OpenAI documents either works or is refused by name. Fields that nobody documents are let
through, because real clients send them; so is an explicit null, which means the default.
"""
import json
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .errors import ApiError
from .params import SamplingParams

# The messages of a conversation and their parts, or the prompts of a call: more are refused before they are validated.
MAX_ITEMS = 4096
# What each refused parameter may be, because it then asks for nothing.
PENALTIES = {"frequency_penalty": [0, 0.0], "presence_penalty": [0, 0.0], "logit_bias": [{}]}
# Documented by vLLM, and not computed here: a client that asks for it should not have to guess why nothing happens.
EXTENSIONS = {
    "allowed_token_ids": [[]],
    "bad_words": [[]],
    "cache_salt": [],
    "choice": [],
    "grammar": [],
    "guided_choice": [],
    "guided_decoding_backend": [],
    "guided_grammar": [],
    "guided_json": [],
    "guided_regex": [],
    "guided_whitespace_pattern": [],
    "include_reasoning": [True],
    "include_stop_str_in_output": [False],
    "kv_transfer_params": [{}],
    "length_penalty": [1, 1.0],
    "logits_processors": [[]],
    "min_p": [0, 0.0],
    "min_tokens": [0],
    "media_io_kwargs": [{}],
    "mm_processor_kwargs": [{}],
    "priority": [0],
    "prompt_logprobs": [],
    "regex": [],
    "repetition_detection": [],
    "repetition_penalty": [1, 1.0],
    "response_format": [{"type": "text"}],
    "return_token_ids": [False],
    "return_tokens_as_token_ids": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "structural_tag": [],
    "structured_outputs": [{}],
    "thinking_token_budget": [],
    "truncate_prompt_tokens": [],
    "truncation_side": [],
    "use_beam_search": [False],
    "vllm_xargs": [{}],
}
Text = Annotated[str, Field(min_length=1)]
Note = Annotated[str, Field(max_length=512)]
# fail_fast: a million wrong items are one complaint.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]


def is_inert(value: Any, inert: list) -> bool:
    """Whether a refused parameter has one of the values with which it asks for nothing."""
    # No such value is long, and a long one takes long to compare.
    if isinstance(value, (dict, list, str)) and len(value) > 20:
        return False
    return canonical(value) in map(canonical, inert)


def canonical(value: Any) -> str:
    """A value as JSON, without the nulls in it: by this true is not 1, and an explicit null is nothing."""
    if isinstance(value, dict):
        value = {name: each for name, each in value.items() if each is not None}
    if isinstance(value, float):
        value += 0.0  # -0.0 is 0.0
    return json.dumps(value, sort_keys=True)


def count_items(items: list) -> int:
    """Messages and their parts, or prompts. A long list of token ids counts as none: it is validated fast, to its first wrong item."""
    if len(items) > MAX_ITEMS:
        return 0 if isinstance(items[0], int) else len(items)
    parts = (item["content"] for item in items if isinstance(item, dict) and isinstance(item.get("content"), list))
    return len(items) + sum(map(len, parts))


class Strict(BaseModel):
    """A part of a body from outside: no text where a number belongs, and no NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    # Documented by OpenAI or vLLM, not computed here: the values with which each is let through all the same.
    refused: ClassVar[dict[str, list]] = {}

    @model_validator(mode="before")
    @classmethod
    def refuse(cls, data: Any) -> Any:
        """Name the first parameter that asks for what this server does not do; drop nulls."""
        if not isinstance(data, dict):
            return data
        for name, inert in cls.refused.items():
            value = data.get(name)
            if value is not None and not is_inert(value, inert):
                allowed = " or ".join(["null", *map(json.dumps, inert)])
                raise PydanticCustomError("refused", "is not supported here; leave it out ({allowed} is accepted)", {"name": name, "allowed": allowed})
        return {name: value for name, value in data.items() if value is not None}


class Body(Strict):
    """A whole body, checked as such before its parts are validated one by one."""

    counted: ClassVar[str]  # the parameter whose items are limited in number

    @model_validator(mode="before")
    @classmethod
    def check_whole(cls, data: Any) -> Any:
        """Refuse too many items, and texts that are not Unicode."""
        if not isinstance(data, dict):
            return data
        items = data.get(cls.counted)
        num_items = count_items(items) if isinstance(items, list) else 0
        if num_items > MAX_ITEMS:
            raise ApiError(400, f"{cls.counted} has {num_items} items, but a body has at most {MAX_ITEMS}; send fewer", cls.counted)
        for name in cls.model_fields.keys() & data.keys():
            # What is no text and holds none is validated faster than searched.
            if isinstance(data[name], list) and data[name] and isinstance(data[name][0], (int, list)):
                continue
            try:
                json.dumps(data[name], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ApiError(400, f"{name} holds half a surrogate pair, which is not a character", name) from None
        return data


def few(value: Any) -> Any:
    """ValueError for more entries than metadata may have, before each is validated."""
    if isinstance(value, dict) and len(value) > 16:
        raise ValueError(f"has {len(value)} entries, but at most 16 are allowed")
    return value


class Labels(Body):
    """What asks nothing of an answer: it is accepted, changes nothing, and is given back where OpenAI's API gives it back."""

    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Note], BeforeValidator(few)] = {}
    prompt_cache_key: Note | None = None
    prompt_cache_options: Annotated[dict[str, Note | int], BeforeValidator(few)] | None = None
    prompt_cache_retention: Note | None = None
    request_id: Note | None = None
    safety_identifier: Note | None = None
    user: Note | None = None


class StreamOptions(Strict):
    refused = {"continuous_usage_stats": [False], "include_obfuscation": [False]}

    include_usage: bool = False


class GenerationRequest(Labels):
    """What is asked of the model, whatever the prompt."""

    model: str
    n: int = Field(1, ge=1, le=128, description="answers to each prompt")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="the same seed draws the same text")
    stop: Text | Annotated[list[Text], Field(max_length=4)] = Field([], description="texts that end the answer before them")
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float = Field(1.0, ge=0, le=1, description="draw from the likeliest tokens that reach this probability")
    # Beyond OpenAI's.
    top_k: int = Field(0, ge=-1, description="not OpenAI's: draw from the k likeliest; 0 or -1: all")
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1024, fail_fast=True)] = Field(
        [], description="not OpenAI's: tokens that end the answer, and are not part of it"
    )
    ignore_eos: bool = Field(False, description="not OpenAI's: go on after the model's end token")

    @model_validator(mode="after")
    def check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for streams; set stream to true or leave it out", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, max_tokens: int | None, **others) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            # The likeliest token is always kept; with a p of 0 it is the only one.
            temperature=0 if self.top_p == 0 else self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p or 1.0,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            **others,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    refused = PENALTIES | EXTENSIONS | {"add_special_tokens": [True], "prompt_embeds": [], "suffix": [""]}
    counted = "prompt"

    prompt: Text | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)] = Field(
        description="a text, its tokens, or a list of either"
    )
    best_of: int | None = Field(None, ge=1, description="accepted if it equals n")
    echo: bool = Field(False, description="begin with the prompt")
    logprobs: int | None = Field(None, ge=0, le=5, description="report this many of the likeliest tokens")
    max_tokens: int | None = Field(None, ge=0, description="default: 16")

    @model_validator(mode="after")
    def check_best_of(self):
        if self.best_of not in (None, self.n):
            raise ApiError(400, f"best_of is {self.best_of} and n {self.n}: only equal ones are supported", "best_of")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        is_list = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if is_list else [self.prompt]


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
    refused = {"audio": [], "function_call": [], "refusal": [""], "tool_call_id": [], "tool_calls": [[]]}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, Any]:
        """As templates know it, which have no developer and no parts."""
        return self.model_extra | plain_turn(self.role, self.content)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    refused = PENALTIES | EXTENSIONS | {
        "add_generation_prompt": [True],
        "add_special_tokens": [False],
        "audio": [],
        "chat_template": [],
        "chat_template_kwargs": [{}],
        "continue_final_message": [False],
        "documents": [[]],
        "echo": [False],
        "function_call": ["none", "auto"],
        "functions": [[]],
        "modalities": [["text"]],
        "moderation": [],
        "parallel_tool_calls": [True, False],
        "prediction": [],
        "reasoning_effort": ["none"],
        "service_tier": ["auto", "default"],
        "tool_choice": ["none", "auto"],
        "tools": [[]],
        "verbosity": ["medium"],
        "web_search_options": [],
    }
    counted = "messages"

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs logprobs")
    max_completion_tokens: int | None = Field(None, ge=1, description="default: what the context has room for")
    max_tokens: int | None = Field(None, ge=1, description="the older name of max_completion_tokens")
    store: bool = Field(False, description="accepted; no chat is stored")

    @model_validator(mode="after")
    def check_pairs(self):
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        return self


class TokenizeRequest(Body):
    """POST /tokenize, as vLLM has it: of a prompt, or of a conversation."""

    refused = {
        "add_generation_prompt": [True],
        "chat_template": [],
        "chat_template_kwargs": [{}],
        "continue_final_message": [False],
        "media_io_kwargs": [{}],
        "mm_processor_kwargs": [{}],
        "tools": [[]],
    }
    counted = "messages"

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = Field(True, description="of a prompt; a conversation has those of its template")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def check_pairs(self):
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "prompt and messages: give one of them", "prompt")
        if self.messages and "add_special_tokens" in self.model_fields_set and self.add_special_tokens:
            raise ApiError(400, "add_special_tokens is not supported for messages, which have those of their template; leave it out", "add_special_tokens")
        return self


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """POST /detokenize, as vLLM has it."""

    counted = "tokens"

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]


class Detokenized(BaseModel):
    prompt: str


# ---- what the documentation says of answers, which are written as dicts


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


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970, as `created` has them."""
    return int(time.time())
