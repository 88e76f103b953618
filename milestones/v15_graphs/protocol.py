"""The bodies of requests and responses: OpenAI's completions and chat completions, as far as this server supports them.

A parameter that OpenAI documents either works or is refused by name. Undocumented fields are accepted,
because real clients send them. So is an explicit null, which means the default.
"""
import json
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .errors import ApiError
from .params import SamplingParams

# The most messages plus parts, or prompts, that a body may have. A body with more is refused before validation.
MAX_ITEMS = 4096
# Parameters that are not implemented here, each with the values that are accepted because they change nothing.
PENALTIES = {"frequency_penalty": [0, 0.0], "presence_penalty": [0, 0.0], "logit_bias": [{}]}
# vLLM's parameters that are not implemented here: refused, so that no client has to guess why one has no effect.
EXTENSIONS = {
    "allowed_token_ids": [[]],
    "bad_words": [[]],
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
Key = Annotated[str, Field(max_length=64)]
Note = Annotated[str, Field(max_length=512)]
# fail_fast: validation stops at the first invalid item, so that a million of them give one error.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Salt = Annotated[str, Field(min_length=1, max_length=512, description="not OpenAI's: share cached prompts only with requests of the same salt")]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31, description="not OpenAI's: a smaller number runs first; needs --allow-priority")]


def is_inert(value: Any, inert: list) -> bool:
    """Return whether value is one of those with which a refused parameter changes nothing."""
    return is_small(value) and canonical(value) in map(canonical, inert)


def is_small(value: Any, depth: int = 3) -> bool:
    """Return whether value has at most 20 members or characters, at each of so many levels. A larger one takes long to compare."""
    if isinstance(value, (dict, list, str)) and len(value) > 20:
        return False
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not members or depth > 0 and all(is_small(each, depth - 1) for each in members)


def canonical(value: Any) -> str:
    """Return value as JSON without null members: then true differs from 1, and an explicit null counts as absent."""
    if isinstance(value, dict):
        value = {name: member for name, member in value.items() if member is not None}
    if isinstance(value, float):
        value += 0.0  # -0.0 is 0.0
    return json.dumps(value, sort_keys=True)


def count_items(items: list) -> int:
    """Return the number of messages plus parts, or of prompts; 0 for a long list of token ids, which validates fast."""
    if len(items) > MAX_ITEMS:
        return 0 if isinstance(items[0], int) else len(items)
    parts = (item["content"] for item in items if isinstance(item, dict) and isinstance(item.get("content"), list))
    return len(items) + sum(map(len, parts))


class Strict(BaseModel):
    """Part of a request body. Rejects strings where numbers belong, infinity and NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    # Parameters of OpenAI or vLLM that are not implemented here, each with the values that are accepted all the same.
    refused: ClassVar[dict[str, list]] = {}

    @model_validator(mode="before")
    @classmethod
    def refuse(cls, data: Any) -> Any:
        """Drop nulls; raise an error that names the first parameter that is not supported."""
        if not isinstance(data, dict):
            return data
        for name, inert in cls.refused.items():
            value = data.get(name)
            if value is not None and not is_inert(value, inert):
                allowed = " or ".join(["null", *map(json.dumps, inert)])
                raise PydanticCustomError("refused", "is not supported here; leave it out ({allowed} is accepted)", {"name": name, "allowed": allowed})
        return {name: value for name, value in data.items() if value is not None and name not in cls.refused}


class Body(Strict):
    """A whole request body. Its number of items and its encoding are checked before its parts are validated."""

    counted: ClassVar[str]  # the parameter that may have at most MAX_ITEMS items

    @model_validator(mode="before")
    @classmethod
    def check_whole(cls, data: Any) -> Any:
        """Raise ApiError for too many items, or for strings that are not valid Unicode."""
        if not isinstance(data, dict):
            return data
        items = data.get(cls.counted)
        num_items = count_items(items) if isinstance(items, list) else 0
        if num_items > MAX_ITEMS:
            raise ApiError(400, f"{cls.counted} has {num_items} items, but a body has at most {MAX_ITEMS}; send fewer", cls.counted)
        for name in cls.model_fields.keys() & data.keys():
            # Lists of token ids hold no strings, and validating them is faster than searching them.
            if isinstance(data[name], list) and data[name] and isinstance(data[name][0], (int, float, list)):
                continue
            try:
                json.dumps(data[name], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ApiError(400, f"{name} holds half a surrogate pair, not a character; remove it", name) from None
        return data


def few(value: Any) -> Any:
    """Return value; ValueError if it has more than 16 entries, before any of them is validated."""
    if isinstance(value, dict) and len(value) > 16:
        raise ValueError(f"has {len(value)} entries, but at most 16 are allowed; send fewer")
    return value


class CacheOptions(Strict):
    """Wishes for a cache, which change nothing here."""

    refused = {"comparison_response_id": [], "prewarm": [False]}

    mode: Literal["implicit", "explicit"] = "implicit"
    ttl: Literal["30m", "12h"] = "30m"


class Labels(Body):
    """Parameters that do not affect the answer, and are accepted."""

    metadata: Annotated[dict[Key, Note], BeforeValidator(few)] = {}
    prompt_cache_key: Note | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    request_id: Note | None = None
    safety_identifier: Note | None = None
    user: Note | None = None


class StreamOptions(Strict):
    refused = {"continuous_usage_stats": [False], "include_obfuscation": [False]}

    include_usage: bool = False


class GenerationRequest(Labels):
    """The parameters of a generation, except its prompt and its length."""

    model: str
    n: int = Field(1, ge=1, le=128, description="answers per prompt")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="the same seed generates the same text")
    stop: Text | Annotated[list[Text], Field(max_length=4)] = Field([], description="stop strings, left out of the answer")
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2, description="0 always takes the likeliest token")
    top_p: float = Field(1.0, ge=0, le=1, description="sample from the likeliest tokens that reach this probability")
    # Not in OpenAI's API.
    top_k: int = Field(0, ge=-1, description="not OpenAI's: sample from the k likeliest tokens; 0 or -1: from all")
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1024, fail_fast=True)] = Field(
        [], description="not OpenAI's: stop tokens, left out of the answer"
    )
    ignore_eos: bool = Field(False, description="not OpenAI's: continue past the model's end token")
    priority: Priority = 0
    cache_salt: Salt | None = None

    @model_validator(mode="after")
    def check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream to be true; set it or leave this out", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, max_tokens: int | None, **others) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            # top_p always keeps the likeliest token; a top_p of 0 keeps only that one.
            temperature=0 if self.top_p == 0 else self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p or 1.0,
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            priority=self.priority,
            **others,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    refused = PENALTIES | EXTENSIONS | {"add_special_tokens": [True], "max_completion_tokens": [], "max_output_tokens": [], "prompt_embeds": [], "suffix": [""], "top_logprobs": [0]}
    counted = "prompt"

    prompt: Text | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)] = Field(
        description="text, token ids, or a list of either"
    )
    best_of: int | None = Field(None, ge=1, description="must equal n")
    echo: bool = Field(False, description="begin the answer with the prompt")
    logprobs: int | None = Field(None, ge=0, le=5, description="report this many of the likeliest tokens per position")
    max_tokens: int | None = Field(None, ge=0, description="default: 16")

    @model_validator(mode="after")
    def check_best_of(self):
        if self.best_of not in (None, self.n):
            raise ApiError(400, f"best_of is {self.best_of} but n is {self.n}; leave best_of out", "best_of")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        is_list = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if is_list else [self.prompt]


class TextPart(Strict):
    type: Literal["text"]
    text: str


def plain_turn(role: str, content: str | list) -> dict[str, str]:
    """Return a turn as chat templates expect it: the developer role becomes system, and parts are joined."""
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    return {"role": "system" if role == "developer" else role, "content": text}


class Message(Strict):
    """A turn of a conversation. Other fields, such as a name, are passed to the chat template."""

    model_config = ConfigDict(extra="allow")
    refused = {"audio": [], "function_call": [], "refusal": [""], "tool_call_id": [], "tool_calls": [[]]}

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, Any]:
        """Return the turn as chat templates expect it, with its other fields."""
        return self.model_extra | plain_turn(self.role, self.content)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    refused = PENALTIES | EXTENSIONS | {
        "add_generation_prompt": [True],
        "add_special_tokens": [False],
        "audio": [],
        "best_of": [1],
        "chat_template": [],
        "chat_template_kwargs": [{}],
        "continue_final_message": [False],
        "documents": [[]],
        "echo": [False],
        "function_call": ["none", "auto"],
        "functions": [[]],
        "max_output_tokens": [],
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
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs logprobs to be true")
    max_completion_tokens: int | None = Field(None, ge=1, description="default: the rest of the context")
    max_tokens: int | None = Field(None, ge=1, description="older name of max_completion_tokens")
    store: bool = Field(False, description="accepted, but no chat is stored")

    @model_validator(mode="after")
    def check_pairs(self):
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; send only one of them", "max_tokens")
        return self


class TokenizeRequest(Body):
    """POST /tokenize, as in vLLM: a prompt or a conversation."""

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
    add_special_tokens: bool = Field(True, description="for a prompt; a conversation has those of its template")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def check_pairs(self):
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "send a prompt or messages, and only one of them", "prompt")
        if self.messages and "add_special_tokens" in self.model_fields_set and self.add_special_tokens:
            raise ApiError(400, "add_special_tokens is not supported for messages, whose template adds its own; leave it out", "add_special_tokens")
        return self


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    """POST /detokenize, as in vLLM."""

    counted = "tokens"

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]


class Detokenized(BaseModel):
    prompt: str


# ---- schemas of responses, which are built as dicts


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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
    """Return the Unix time in whole seconds, as in `created`."""
    return int(time.time())
