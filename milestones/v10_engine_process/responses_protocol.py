"""The bodies of requests to /v1/responses."""
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .errors import ApiError
from .protocol import EXTENSIONS, PENALTIES, Labels, Strict, Text, plain_turn

PLAIN, MEDIUM = {"format": {"type": "text"}}, {"verbosity": "medium"}


LOGPROBS = "message.output_text.logprobs"
# OpenAI's other values concern tools, images and reasoning. They are accepted, and add nothing to an answer.
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
    """Options for reasoning, which is not implemented. A summary may be requested, but is never produced."""

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


class ResponseRequest(Labels):
    """POST /v1/responses"""

    refused: ClassVar = PENALTIES | EXTENSIONS | {
        "access_programs": [],
        "background_options": [],
        "chat_template": [],
        "chat_template_kwargs": [{}],
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
        "parallel_tool_calls": [True, False],
        "prompt": [],
        "previous_input_messages": [[]],
        "reasoning_effort": ["none"],
        "seed": [],
        "service_tier": ["auto", "default"],
        "stop": [[]],
        "stop_token_ids": [[]],
        "stream_options": [{}, {"include_obfuscation": False}],
        "text": [{}, PLAIN, MEDIUM, PLAIN | MEDIUM],
        "tool_choice": ["none", "auto"],
        "tools": [[]],
        "top_k": [0, -1],
        "truncation": ["disabled"],
        "verbosity": ["medium"],
    }
    counted: ClassVar = "input"

    model: str
    input: Text | Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
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

    @model_validator(mode="after")
    def check_pairs(self):
        if self.background and (self.stream or not self.store):
            raise ApiError(400, "background needs store to be true and stream to be false", "background")
        if self.top_logprobs and not self.wants_logprobs:
            raise ApiError(400, "top_logprobs needs message.output_text.logprobs in include", "top_logprobs")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in self.include
