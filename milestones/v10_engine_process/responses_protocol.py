"""What clients send to /v1/responses."""
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .errors import ApiError
from .protocol import Body, Strict, Text, plain_turn

Key, Note = Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]
PLAIN, MEDIUM = {"format": {"type": "text"}}, {"verbosity": "medium"}


class ContentPart(Strict):
    type: Literal["input_text", "output_text"]
    text: str


class InputMessage(Strict):
    """A turn, written by the client or copied from a response's output."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)]
    type: Literal["message"] = "message"

    def plain(self) -> dict[str, str]:
        """As templates know it."""
        return plain_turn(self.role, self.content)


class ResponseRequest(Body):
    """POST /v1/responses"""

    refused: ClassVar = {
        "access_programs": [],
        "background_options": [],
        "context_management": [[]],
        "conversation": [],
        "image": [],
        "max_tool_calls": [],
        "moderation": [],
        "parallel_tool_calls": [True, False],
        "prompt": [],
        "prompt_cache_options": [{}],
        "prompt_cache_retention": ["in_memory"],
        "reasoning": [{}, {"effort": "none"}],
        "service_tier": ["auto", "default"],
        "stream_options": [{}, {"include_obfuscation": False}],
        "text": [{}, PLAIN, MEDIUM, PLAIN | MEDIUM],
        "tool_choice": ["none", "auto"],
        "tools": [[]],
        "truncation": ["disabled"],
    }
    counted: ClassVar = "input"

    model: str
    input: Text | Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
    instructions: str | None = Field(None, description="a system message before the conversation; not remembered")
    previous_response_id: str | None = Field(None, description="go on from this response")
    store: bool = Field(True, description="remember the response, for GET and previous_response_id")
    background: bool = Field(False, description="answer at once; ask for the result with GET. Needs store, and no stream")
    stream: bool = False
    max_output_tokens: int | None = Field(None, ge=1, description="default: what the context has room for")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(fail_fast=True)] = []
    top_logprobs: int | None = Field(None, ge=0, le=20, description="needs message.output_text.logprobs in include")
    metadata: Annotated[dict[Key, Note], Field(max_length=16)] = {}
    user: Note | None = Field(None, description="accepted; nothing here depends on it")
    safety_identifier: Note | None = Field(None, description="accepted; nothing here depends on it")
    prompt_cache_key: Note | None = Field(None, description="accepted; nothing here depends on it")

    @model_validator(mode="after")
    def check_pairs(self):
        if self.background and (self.stream or not self.store):
            raise ApiError(400, "background needs store to be true and stream to be false", "background")
        if self.top_logprobs and not self.include:
            raise ApiError(400, "top_logprobs needs message.output_text.logprobs in include", "top_logprobs")
        return self
