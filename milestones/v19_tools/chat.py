"""POST /v1/chat/completions"""
import json
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request

from .answers import Answer, PartedAnswer
from .async_engine import paced
from .bodies import BodyRoute
from .errors import ApiError, refusals
from .outputs import StepOutput
from .params import choices
from .parts import Call, Delta, Parts
from .protocol import ChatCompletion, ChatRequest, plain_turns, tools_to_call
from .service import Service
from .streaming import ANSWERS, Events, unless_gone, while_connected
from .tools import encode_turns, without_thought
from .writer import Writer, Written

router = APIRouter(route_class=BodyRoute)


async def tokenize_chat(service: Service, messages: list[dict], tools: list[dict] = [], options: dict = {}) -> tuple[list[int], bool | None]:
    """Return a conversation's token ids, and whether they end within a thought (None: after one).

    RequestError if the checkpoint's template refuses it, or it cannot fit.
    """
    return await service.async_engine.tokenize(encode_turns, service.family, messages, tools, options, service.check_text)


def answer_parts(service: Service, body: ChatRequest, is_open: bool | None) -> Parts:
    """What the answer to a request may consist of; ApiError if nothing can be called as it asks.

    body: a chat's, or any other that has tools in the same way. is_open: as `tokenize_chat` returns it.
    """
    family, choice, has_tools = service.family, body.choice_of_tools, bool(body.tools)
    tools = tools_to_call(body.tools_by_name, choice)
    if has_tools and family.form is None:
        message = "tools are not supported for this checkpoint, whose chat template writes calls in a form that is not known here; leave them out"
        raise ApiError(400, message, "tools")
    if has_tools and any(kind == "grammar" for _, kind, _ in body.grammars):
        raise ApiError(400, f"{body.grammar_param} cannot be combined with tools; leave one out", body.grammar_param)
    if has_tools and body.grammar_param and not family.form.marker:
        message = f"{body.grammar_param} cannot be combined with tools for this checkpoint, whose calls are JSON too, without a marker; leave one out"
        raise ApiError(400, message, body.grammar_param)
    return family.parts(
        is_open,
        form=family.form if has_tools else None,
        tools=tools,
        is_required=choice.mode == "required",
        param="tools" if has_tools else body.grammar_param or "parts",
        is_single=choice.is_single or not body.parallel_tool_calls or (has_tools and family.form.is_single),
    )


class ChatWriter(Writer):
    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    answers: list[PartedAnswer]

    def __init__(self, *args):
        super().__init__(*args)
        self.written = [[] for _ in self.answers]  # per answer, the logprobs of its tokens

    async def spell(self, tokens: list) -> list[Written]:
        """Return the tokens' logprobs if the request set logprobs. Text that was held back brings many at once."""
        if not self.body.logprobs:
            return []
        names, count = self.service.names, self.body.top_logprobs or 0
        return [Written(json.dumps(names.of_chat(token, count))) async for token in paced(tokens)]

    def logprobs(self, written: list[Written]) -> dict | None:
        return {"content": written, "refusal": None} if self.body.logprobs else None

    def push(self, answer: PartedAnswer, output: StepOutput) -> tuple[list[Delta], list]:
        pushed = answer.push_parts(output)
        if answer.finish_reason:
            self.service.async_engine.metrics.add_parts(answer.num_thought, len(answer.parts.calls))
        return pushed

    async def add(self, answer: PartedAnswer, output: StepOutput) -> None:
        _, tokens = self.push(answer, output)
        self.written[answer.index] += await self.spell(tokens)

    def usage(self) -> dict:
        details = {"reasoning_tokens": sum(answer.num_thought for answer in self.answers)}
        return super().usage() | {"completion_tokens_details": details}

    def choice(self, answer: PartedAnswer) -> dict:
        parts = answer.parts
        message = {"role": "assistant", "content": answer.said, "refusal": None}
        if parts.thought:
            message["reasoning_content"] = parts.thought
        if parts.calls:
            message["tool_calls"] = [called(call) for call in parts.calls]
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self.logprobs(self.written[answer.index]),
            "finish_reason": answer.finish_reason,
        }

    async def pieces(self) -> AsyncIterator[dict]:
        for answer in self.answers:
            yield self.piece(answer, {"role": "assistant", "content": None if answer.may_be_silent else ""})
        async for index, output in self.generation:
            answer = self.answers[index]
            deltas, tokens = self.push(answer, output)
            written = [self.delta(answer, delta) for delta in deltas] or ([{}] if tokens else [])
            logprobs = self.logprobs(await self.spell(tokens))
            for delta in written:
                yield self.piece(answer, delta, logprobs=logprobs)
                logprobs = None  # they are sent with the first
            if answer.finish_reason:
                yield self.piece(answer, {"content": ""} if answer.may_be_silent and answer.said == "" else {}, finish_reason=answer.finish_reason)

    def delta(self, answer: PartedAnswer, delta: Delta) -> dict:
        """Return a piece of a part as the client adds it to the message."""
        match delta.kind:
            case "thought":
                return {"reasoning_content": delta.text}
            case "content":
                return {"content": delta.text}
            case "call":
                begun = called(answer.parts.calls[delta.index])
                return {"tool_calls": [{"index": delta.index} | begun | {"function": {"name": delta.text, "arguments": ""}}]}
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}

    def piece(self, answer: Answer, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> dict:
        return {"index": answer.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def called(call: Call) -> dict:
    """Return a call as a message has it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWERS)
async def create_chat_completion(request: Request, body: ChatRequest):
    service = request.app.state.service
    service.check_model(body.model)
    service.check_priority(body.priority)
    service.check_count(1, body.n)
    with refusals("messages", "max_completion_tokens" if body.max_completion_tokens else "max_tokens", body.grammar_param):
        tools = [tool.plain() for tool in body.tools]
        options = without_thought(service.family, body.chat_template_kwargs, body.reasoning_effort, "reasoning_effort")
        prompt_ids, is_open = await tokenize_chat(service, plain_turns(body.messages), tools, options)
        parts = answer_parts(service, body, is_open)
        params = body.sampling_params(
            service.max_tokens(body.max_completion_tokens or body.max_tokens, None, len(prompt_ids)),
            parts=parts,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            new_text=True,
            cache_salt=service.cache_salt(request.scope["api_key"], body.cache_salt),
        )
        requests = [(prompt_ids, choice) for choice in choices(params, body.n)]
        generation = await while_connected(request, service.async_engine.generate(requests, request.scope["arrived"]))
    answers = [PartedAnswer(i, parts, service.family.new_call_id) for i in range(body.n)]
    writer = ChatWriter(service, body, generation, answers, len(prompt_ids))
    if body.stream:
        return Events(generation, writer.stream())
    return await unless_gone(request, generation, writer.whole())
