"""The bodies of requests to /v1/responses."""
import json
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from .errors import ApiError
from .parts import Tool
from .protocol import EXTENSIONS, MOST_TOOLS, Choice, Closed, FunctionName, Options, Priority, Salt, Shaped, Strict, Text, TextFormat, plain_call
from .protocol import check_calls, plain_turn, result_of, tools_by_name

LOGPROBS = "message.output_text.logprobs"
# OpenAI's other values concern tools of its own, images and encrypted thoughts. They are accepted, and add nothing to an answer.
Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


class Reasoning(Strict):
    """Options for thoughts. A summary may be requested, but is never produced."""

    refused: ClassVar = {"context": ["auto"], "mode": ["standard"]}

    effort: Literal["none"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="older name of summary")


class ContentPart(Strict):
    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Strict):
    """A turn, written by the client or copied from a response's output."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)]
    type: Literal["message"] = "message"

    def plain(self) -> dict[str, str]:
        """Return the turn as chat templates expect it."""
        return plain_turn(self.role, self.content)


class ReasoningText(Strict):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Strict):
    """A thought, copied from a response's output."""

    refused: ClassVar = {"encrypted_content": [""]}

    type: Literal["reasoning"]
    id: str | None = None
    summary: Annotated[list[ReasoningText], Field(fail_fast=True)] = []
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] = []

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class CallItem(Strict):
    """A call, copied from a response's output."""

    type: Literal["function_call"]
    id: str | None = None
    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    name: FunctionName
    arguments: str = Field(description="JSON")
    status: str | None = None


class CallOutputItem(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    id: str | None = None
    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    output: str | Annotated[list[ContentPart], Field(fail_fast=True)]
    status: str | None = None


def item_tag(item: Any) -> str:
    """A tag is no name, so that no error message takes it for a parameter."""
    return f"a {item.get('type') or 'message'}" if isinstance(item, dict) else "a message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("a message")]
    | Annotated[ReasoningItem, Tag("a reasoning")]
    | Annotated[CallItem, Tag("a function_call")]
    | Annotated[CallOutputItem, Tag("a function_call_output")],
    Discriminator(item_tag, "item_type", "type must be message, reasoning, function_call or function_call_output"),
]


def plain_items(items: list[InputItem], before: list[dict]) -> list[dict]:
    """The turns of these items, as chat templates expect them. before: the turns before them.

    A thought, a message and calls that follow each other are one turn. ApiError for a result that belongs to no call.
    """
    check_calls((item.arguments for item in items if isinstance(item, CallItem)), "input")
    turns: list[dict] = []
    names = {call["id"]: call["function"]["name"] for turn in before for call in turn.get("tool_calls", ())}
    for index, item in enumerate(items):
        where = f"input[{index}]"
        match item:
            case InputMessage():
                turn = item.plain()
                # A turn that has only a thought so far.
                if turn["role"] == "assistant" and turns and turns[-1]["role"] == "assistant" and not (turns[-1]["content"] or turns[-1].get("tool_calls")):
                    turns[-1]["content"] = turn["content"]
                else:
                    turns.append(turn)
            case ReasoningItem(text=""):
                pass  # others send summaries only
            case ReasoningItem(text=text):
                turns.append({"role": "assistant", "content": "", "reasoning_content": text})
            case CallItem():
                call = plain_call(item.call_id, item.name, item.arguments, f"{where}.arguments")
                names[item.call_id] = item.name
                if not turns or turns[-1]["role"] != "assistant":
                    turns.append({"role": "assistant", "content": ""})
                turns[-1]["tool_calls"] = [*turns[-1].get("tool_calls", []), call]
            case CallOutputItem():
                turns.append(plain_turn("tool", item.output) | result_of(item.call_id, names, f"{where}.call_id"))
    return turns


class ResponseTool(Strict):
    """A function that may be called. Other fields are passed to the chat template."""

    model_config = ConfigDict(extra="allow")
    refused: ClassVar = {"allowed_callers": [["direct"]], "async": [False], "defer_loading": [False], "output_schema": []}

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="refuse a schema that cannot be obeyed exactly; otherwise, any object may be the arguments then")

    @model_validator(mode="after")
    def check_numbers(self):
        """The response shows the tool, and JSON has neither NaN nor infinity, which Python's parser takes."""
        for name, value in self.model_dump().items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError as error:
                raise PydanticCustomError("refused", "must be JSON: {reason}", {"name": name, "reason": str(error)}) from None
        return self

    def plain(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        return {"type": "function", "function": self.model_dump(exclude_none=True, exclude={"type", "strict"})}


class NamedFunction(Strict):
    type: Literal["function"]
    name: FunctionName


class AllowedFunctions(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MOST_TOOLS, fail_fast=True)]


class TextOptions(Closed):
    refused: ClassVar = {"verbosity": ["medium"]}

    format: TextFormat = TextFormat(type="text")


class ResponseRequest(Shaped):
    """POST /v1/responses"""

    refused: ClassVar = EXTENSIONS | {
        "access_programs": [],
        "background_options": [],
        "chat_template": [],
        "context_management": [[]],
        "enable_response_messages": [False],
        "ignore_eos": [False],
        "conversation": [],
        "image": [],
        "logprobs": [False],
        "max_completion_tokens": [],
        "max_tokens": [],
        "max_tool_calls": [],
        "moderation": [],
        "n": [1],
        "prompt": [],
        "previous_input_messages": [[]],
        "reasoning_effort": ["none"],
        "seed": [],
        "service_tier": ["auto", "default"],
        "stop": [[]],
        "stop_token_ids": [[]],
        "stream_options": [{}, {"include_obfuscation": False}],
        "response_format": [{"type": "text"}],
        "top_k": [0, -1],
        "truncation": ["disabled"],
        "verbosity": ["medium"],
    }
    counted: ClassVar = "input"

    model: str
    input: Text | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    instructions: str | None = Field(None, description="a system message before the conversation, for this response only")
    previous_response_id: str | None = Field(None, description="continue the conversation after this response")
    store: bool = Field(True, description="store the response for GET and previous_response_id")
    background: bool = Field(False, description="return at once; poll the result with GET. Needs store, and no stream")
    stream: bool = False
    max_output_tokens: int | None = Field(None, ge=1, description="default: the rest of the context")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    include: Annotated[list[Includable], Field(fail_fast=True)] = []
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs message.output_text.logprobs in include")
    reasoning: Reasoning = Reasoning()
    text: TextOptions = TextOptions()
    tools: Annotated[list[ResponseTool], Field(max_length=MOST_TOOLS, fail_fast=True)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions = "auto"
    parallel_tool_calls: bool = Field(True, description="false: at most one call")
    chat_template_kwargs: Options = {}
    priority: Priority = 0
    cache_salt: Salt | None = None

    @model_validator(mode="after")
    def check_pairs(self):
        if self.background and (self.stream or not self.store):
            raise ApiError(400, "background needs store to be true and stream to be false", "background")
        if self.top_logprobs and not self.wants_logprobs:
            raise ApiError(400, "top_logprobs needs message.output_text.logprobs in include", "top_logprobs")
        return self

    @property
    def asked_format(self) -> tuple[str, tuple | None]:
        return "text.format", self.text.format.grammar

    @cached_property
    def tools_by_name(self) -> dict[str, Tool]:
        return tools_by_name([(each.name, each.parameters, each.strict, f"tools[{i}]") for i, each in enumerate(self.tools)])

    @property
    def choice_of_tools(self) -> Choice:
        match self.tool_choice:
            case str(mode):
                return Choice(mode)
            case NamedFunction(name=name):
                return Choice("required", frozenset([name]), is_single=True)
            case AllowedFunctions(mode=mode, tools=tools):
                return Choice(mode, frozenset(each.name for each in tools))

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in self.include
