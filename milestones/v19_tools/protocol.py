"""The bodies of requests and responses: OpenAI's completions and chat completions, as far as this server supports them.

A parameter that OpenAI documents either works or is refused by name. Undocumented fields are accepted,
because real clients send them. So is an explicit null, which means the default.
"""
import json
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from .bodies import MAX_PARTS, count_parts
from .errors import ApiError
from .json_schema import NOTES, close
from .params import MOST_GRAMMAR_BYTES, MOST_WORDS, SamplingParams, json_text
from .parts import Parts, Tool, arguments_of

# The most messages plus parts, or prompts, that a body may have. A body with more is refused before validation.
MAX_ITEMS = 4096
# vLLM's parameters that are not implemented here: refused, so that no client has to guess why one has no effect.
EXTENSIONS = {
    "allowed_token_ids": [[]],
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
    "media_io_kwargs": [{}],
    "mm_processor_kwargs": [{}],
    "prompt_logprobs": [],
    "repetition_detection": [],
    "return_token_ids": [False],
    "return_tokens_as_token_ids": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "structural_tag": [],
    "thinking_token_budget": [],
    "truncate_prompt_tokens": [],
    "truncation_side": [],
    "use_beam_search": [False],
    "vllm_xargs": [{}],
}
# Lists and mappings with more entries are refused before their entries are validated.
MOST_ENTRIES = 1024
Choices = Annotated[list[str], Field(min_length=1, max_length=MOST_ENTRIES, fail_fast=True)]
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


Options = Annotated[dict[str, Any], BeforeValidator(few)]  # of the chat template
ReasoningEffort = Annotated[Literal["none"] | None, Field(description="none: without a thought, if the checkpoint can do that")]


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


class Closed(Strict):
    """A part of a body in which an unknown parameter is refused: it might be a grammar, and the answer would not follow it."""

    model_config = ConfigDict(extra="forbid")


class JsonSchemaFormat(Closed):
    """A schema and its name, which is for the model's eyes in OpenAI's API, and has no effect here."""

    name: str = Field(pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=10_000)
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool | None = Field(None, description="has no effect: a schema is always obeyed")


class ResponseFormat(Closed):
    """The form of a chat's answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def check_schema(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ApiError(400, "response_format needs json_schema if, and only if, its type is json_schema", "response_format.json_schema")
        return self

    @property
    def grammar(self) -> tuple[str, Any] | None:
        """The kind of the grammar and its value, as in SamplingParams."""
        if self.type == "json_schema":
            return "json_schema", closed(self.json_schema.schema_, "response_format.json_schema.schema")
        return ("json_object", True) if self.type == "json_object" else None


class TextFormat(Closed):
    """The form of a response's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern="^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=10_000)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="has no effect: a schema is always obeyed")

    @model_validator(mode="after")
    def check_schema(self):
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ApiError(400, "text.format needs schema if, and only if, its type is json_schema", "text.format.schema")
        if self.type == "json_schema" and self.name is None:
            raise ApiError(400, "text.format needs a name if its type is json_schema", "text.format.name")
        return self

    @property
    def grammar(self) -> tuple[str, Any] | None:
        if self.type == "json_schema":
            return "json_schema", closed(self.schema_, "text.format.schema")
        return ("json_object", True) if self.type == "json_object" else None

    def answer(self) -> dict:
        """As a response repeats it."""
        return self.model_dump(by_alias=True, exclude_none=True)


def check_length(schema: Any, param: str) -> None:
    """ApiError for a schema that is too long: what reads it in Python would hold up the event loop."""
    length = len(schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False))
    if length > MOST_GRAMMAR_BYTES:
        raise ApiError(400, f"{param} has {length} characters, but at most {MOST_GRAMMAR_BYTES} bytes are allowed; shorten it", param)


def closed(schema: Any, param: str) -> Any:
    """What `close` returns for a schema; ApiError if it is too long."""
    check_length(schema, param)
    return close(schema)


def parsed(schema: Any) -> Any:
    """Return a schema that is given as a string with a JSON object; anything else, also what is no JSON, as it is."""
    with suppress(ValueError, TypeError, RecursionError):
        value = json.loads(schema)
        return value if isinstance(value, dict) else schema
    return schema


class StructuredOutputs(Closed):
    """vLLM's parameter of the same name."""

    refused: ClassVar[dict[str, list]] = {
        "backend": [],
        "disable_fallback": [False],
        "structural_tag": [],
        "whitespace_pattern": [],
    }

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON Schema")
    json_object: bool = False
    regex: str | None = None
    choice: Choices | None = None
    grammar_: str | None = Field(None, alias="grammar", description="in llguidance's variant of Lark")
    disable_additional_properties: bool = Field(
        True, description="objects have only the members that the schema names, unless it has additionalProperties"
    )
    disable_any_whitespace: bool = Field(True, description="has no effect: there is one space after a comma and a colon")

    @cached_property
    def grammars(self) -> list[tuple[str, str, Any]]:
        """Each grammar that is given: its parameter, its kind and its value."""
        check_length(self.json_, "structured_outputs.json")
        schema = parsed(self.json_)
        if self.disable_additional_properties:
            schema = close(schema)
        given = [("json", "json_schema", schema), ("json_object", "json_object", self.json_object), ("regex", "regex", self.regex)]
        given += [("choice", "choice", self.choice), ("grammar", "grammar", self.grammar_)]
        return [(f"structured_outputs.{name}", kind, value) for name, kind, value in given if value not in (None, False)]


def bias_by_id(value: Any) -> Any:
    """Return a mapping with token ids for keys, which JSON has as strings."""
    if not isinstance(value, dict):
        return value
    if len(value) > MOST_ENTRIES:
        raise ValueError(f"has {len(value)} entries, but at most {MOST_ENTRIES} are allowed; send fewer")
    for key in value:
        if not (key.isascii() and key.isdigit() and key == str(int(key[:10]))):
            raise ValueError(f"has the key {key[:40]!r}, which is not a token id; use ids, as POST /tokenize returns them")
    return {int(key): bias for key, bias in value.items()}


class Shaped(Labels):
    """The parameters that stand between the logits and the draw."""

    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(bias_by_id)] = Field(
        {}, description="added to the logits of these token ids"
    )
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="taken from a token's logit each time that it was generated")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="taken from a token's logit once it was generated")
    # Not in OpenAI's API, but in vLLM's.
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="not OpenAI's: above 1, tokens of prompt and answer become less likely")
    min_p: float = Field(0.0, ge=0, le=1, description="not OpenAI's: the least probability, as a share of the likeliest token's")
    min_tokens: int = Field(0, ge=0, description="not OpenAI's: no token ends the answer before there are as many")
    bad_words: list[Annotated[str, Field(min_length=1)]] = Field(
        [], max_length=MOST_WORDS, description="not OpenAI's: texts whose tokens are never completed"
    )
    structured_outputs: StructuredOutputs | None = None
    regex: str | None = Field(None, description="not OpenAI's: the answer matches it as a whole")
    choice: Choices | None = Field(None, description="not OpenAI's: the answer is one of these")
    json_schema: dict[str, Any] | None = Field(None, description="not OpenAI's: as response_format")
    json_object: bool = Field(False, description="not OpenAI's: as response_format")
    grammar: str | None = Field(None, description="not OpenAI's: in llguidance's variant of Lark")

    @property
    def asked_format(self) -> tuple[str, tuple[str, Any] | None]:
        """The parameter of OpenAI's that may hold a grammar, and the grammar."""
        raise NotImplementedError

    @cached_property
    def grammars(self) -> list[tuple[str, str, Any]]:
        """Each grammar that is given: its parameter, its kind and its value."""
        name, asked = self.asked_format
        given = [(name, *asked)] if asked else []
        if self.structured_outputs:
            given += self.structured_outputs.grammars
        for kind in ("regex", "choice", "json_schema", "json_object", "grammar"):
            value = getattr(self, kind)
            if value not in (None, False):
                given.append((kind, kind, closed(value, kind) if kind == "json_schema" else value))
        return given

    @model_validator(mode="after")
    def check_grammars(self):
        given = self.grammars
        if len(given) > 1:
            names = " and ".join(name for name, _, _ in given)
            raise ApiError(400, f"{names} are given, but an answer follows only one grammar; leave the others out", given[1][0])
        return self

    @property
    def grammar_param(self) -> str | None:
        """The parameter that holds the grammar."""
        return self.grammars[0][0] if self.grammars else None

    def shape(self, parts: Parts | None = None) -> dict[str, Any]:
        """The arguments of SamplingParams. parts: what the answer may consist of besides what is said."""
        grammar = {kind: tuple(value) if kind == "choice" else value for _, kind, value in self.grammars}
        if parts is not None and (parts.form or (parts.thought and grammar)):
            grammar = {"parts": replace(parts, content=SamplingParams(**grammar).constraint)}
        return grammar | {
            "kept_special_tokens": parts.special if parts else (),
            "logit_bias": self.logit_bias or None,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_p": self.min_p,
            "min_tokens": self.min_tokens,
            "bad_words": tuple(self.bad_words),
        }


class StreamOptions(Strict):
    refused = {"continuous_usage_stats": [False], "include_obfuscation": [False]}

    include_usage: bool = False


class GenerationRequest(Shaped):
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
    response_format: ResponseFormat | None = None

    @property
    def asked_format(self) -> tuple[str, tuple[str, Any] | None]:
        return "response_format", self.response_format and self.response_format.grammar

    @model_validator(mode="after")
    def check_stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream to be true; set it or leave this out", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, max_tokens: int | None, parts: Parts | None = None, **others) -> SamplingParams:
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
            **self.shape(parts),
            **others,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    refused = EXTENSIONS | {"add_special_tokens": [True], "max_completion_tokens": [], "max_output_tokens": [], "prompt_embeds": [], "suffix": [""], "top_logprobs": [0]}
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


FunctionName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
MOST_TOOLS = 128


class Function(Strict):
    """A function that may be called. Other fields are passed to the chat template."""

    model_config = ConfigDict(extra="allow")

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON Schema of its arguments; without it, it has none")
    strict: bool | None = Field(None, description="refuse a schema that cannot be obeyed exactly; otherwise, any object may be the arguments then")


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class Named(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: Named


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)]


class AllowedToolsChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class Choice(NamedTuple):
    """What tool_choice says."""

    mode: str  # none, auto or required
    names: frozenset[str] | None = None  # of the functions that may be called; None: all
    is_single: bool = False  # exactly one call


def tools_to_call(tools: dict[str, Tool], choice: Choice, param: str = "tool_choice") -> tuple[Tool, ...]:
    """The tools that may be called; ApiError if the choice has a name that is not among them."""
    if choice.mode != "auto" and choice.mode != "none" and not tools:
        raise ApiError(400, f"{param} demands a call, but there are no tools; send tools, or leave {param} out", param)
    for name in sorted(choice.names or ()):
        if name not in tools:
            known = ", ".join(map(repr, tools)) or "none"
            raise ApiError(400, f"{param} names the function {name!r}, which is not among the tools; these are {known}", param)
    if choice.mode == "none":
        return ()
    return tuple(tool for name, tool in tools.items() if choice.names is None or name in choice.names)


def tools_by_name(functions: list[tuple[str, Any, bool | None, str]]) -> dict[str, Tool]:
    """The tools of a request, each given by its name, its schema, whether it is strict, and where.

    ApiError for a name that occurs twice, or arguments that are no object.
    """
    tools: dict[str, Tool] = {}
    for name, schema, strict, param in functions:
        if name in tools:
            raise ApiError(400, f"{param} has the name {name!r}, as an earlier one; rename one of them", param)
        if (schema or {}).get("type", "object") != "object":
            raise ApiError(400, f"{param}.parameters must be a schema of objects, since arguments have names; its type must be object", f"{param}.parameters")
        check_length(schema, f"{param}.parameters")
        tools[name] = Tool(name, json_text(closed_arguments(schema), f"{param}.parameters"), bool(strict), f"{param}.parameters")
    return tools


def closed_arguments(schema: dict | None) -> dict:
    """The schema of a function's arguments, whose objects have only the members that they name; without any, exactly {}."""
    schema = schema or {}
    more = set(schema) - NOTES - {"type", "properties", "required", "additionalProperties"}
    if not (more or schema.get("properties") or schema.get("required") or schema.get("additionalProperties", False) is not False):
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return close({"type": "object"} | schema if "properties" in schema else schema)


class CalledFunction(Strict):
    name: FunctionName
    arguments: str = Field(description="JSON")


class ToolCall(Strict):
    """A call of an earlier answer."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


def check_calls(calls_arguments: Iterable[str], param: str) -> None:
    """Raise ApiError if the arguments of all calls together have too many parts. In a body, whose parts are counted, each is one string."""
    num_parts = 0
    for arguments in calls_arguments:
        num_parts += sum(count_parts(arguments.encode(errors="replace")))
        if num_parts > MAX_PARTS:
            raise ApiError(400, f"the calls in {param} have more than {MAX_PARTS:,} values in their arguments; leave some out", param)


def plain_call(call_id: str, name: str, arguments: str, param: str) -> dict[str, Any]:
    """A call as chat templates expect it; ApiError if its arguments are no JSON object."""
    try:
        plain = arguments_of(arguments)
    except RecursionError:
        raise ApiError(400, f"{param} is nested too deeply; send fewer levels", param) from None
    except ValueError as error:
        raise ApiError(400, f"{param} must be a JSON object: {str(error).partition(';')[0]}; if the answer was cut off, leave the call out", param) from None
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": plain}}


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
    refused = {"audio": [], "function_call": [], "refusal": [""]}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS, fail_fast=True)] = []
    tool_call_id: str | None = Field(None, description="of the call whose result this is")

    @model_validator(mode="after")
    def check_role(self):
        missing = "is missing; a message with the role {role} needs it"
        misplaced = "is not for a message with the role {role}; leave it out"
        # An answer that was cut off may have no part at all.
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("refused", missing, {"name": "content", "role": self.role})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("refused", misplaced, {"name": "tool_calls", "role": self.role})
        if self.tool_call_id is None and self.role == "tool":
            raise PydanticCustomError("refused", missing, {"name": "tool_call_id", "role": self.role})
        if self.tool_call_id is not None and self.role != "tool":
            raise PydanticCustomError("refused", misplaced, {"name": "tool_call_id", "role": self.role})
        return self

    def plain(self) -> dict[str, Any]:
        """Return the turn as chat templates expect it, with its other fields."""
        return self.model_extra | plain_turn(self.role, self.content or "")


def plain_turns(messages: list[Message]) -> list[dict[str, Any]]:
    """A conversation as chat templates expect it; ApiError for a result that belongs to no call."""
    check_calls((call.function.arguments for message in messages for call in message.tool_calls), "messages")
    turns, names = [], {}
    for index, message in enumerate(messages):
        turn = message.plain()
        if message.tool_calls:
            where = f"messages[{index}].tool_calls"
            turn["tool_calls"] = [
                plain_call(call.id, call.function.name, call.function.arguments, f"{where}[{number}].function.arguments")
                for number, call in enumerate(message.tool_calls)
            ]
            names |= {call.id: call.function.name for call in message.tool_calls}
        if message.role == "tool":
            turn |= result_of(message.tool_call_id, names, f"messages[{index}].tool_call_id")
        turns.append(turn)
    return turns


def result_of(call_id: str, names: dict[str, str], param: str) -> dict[str, str]:
    """The fields that say to which call a result belongs. names: of the functions called so far, by the id of the call."""
    if call_id not in names:
        raise ApiError(400, f"{param} is {call_id[:200]!r}, but no call before it has this id; send the answer with the call, too", param)
    return {"tool_call_id": call_id, "name": names[call_id]}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    refused = EXTENSIONS | {
        "add_generation_prompt": [True],
        "add_special_tokens": [False],
        "audio": [],
        "best_of": [1],
        "chat_template": [],
        "continue_final_message": [False],
        "documents": [[]],
        "echo": [False],
        "function_call": ["none", "auto"],
        "functions": [[]],
        "max_output_tokens": [],
        "modalities": [["text"]],
        "moderation": [],
        "prediction": [],
        "service_tier": ["auto", "default"],
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
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS, fail_fast=True)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice = "auto"
    parallel_tool_calls: bool = Field(True, description="false: at most one call")
    chat_template_kwargs: Options = {}
    reasoning_effort: ReasoningEffort = None

    @model_validator(mode="after")
    def check_pairs(self):
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ApiError(400, "max_tokens and max_completion_tokens differ; send only one of them", "max_tokens")
        return self

    @cached_property
    def tools_by_name(self) -> dict[str, Tool]:
        functions = [each.function for each in self.tools]
        return tools_by_name([(each.name, each.parameters, each.strict, f"tools[{i}].function") for i, each in enumerate(functions)])

    @property
    def choice_of_tools(self) -> Choice:
        match self.tool_choice:
            case str(mode):
                return Choice(mode)
            case NamedTool(function=function):
                return Choice("required", frozenset([function.name]), is_single=True)
            case AllowedToolsChoice(allowed_tools=allowed):
                return Choice(allowed.mode, frozenset(each.function.name for each in allowed.tools))


class TokenizeRequest(Body):
    """POST /tokenize, as in vLLM: a prompt or a conversation."""

    refused = {
        "add_generation_prompt": [True],
        "chat_template": [],
        "continue_final_message": [False],
        "media_io_kwargs": [{}],
        "mm_processor_kwargs": [{}],
    }
    counted = "messages"

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool = Field(True, description="for a prompt; a conversation has those of its template")
    return_token_strs: bool = False
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS, fail_fast=True)] = []
    chat_template_kwargs: Options = {}
    reasoning_effort: ReasoningEffort = None

    @model_validator(mode="after")
    def check_pairs(self):
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "send a prompt or messages, and only one of them", "prompt")
        for name in ("tools", "chat_template_kwargs", "reasoning_effort"):
            if self.prompt is not None and getattr(self, name):
                raise ApiError(400, f"{name} needs messages, not a prompt; leave it out", name)
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


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None


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
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


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
