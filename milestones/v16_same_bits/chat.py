"""POST /v1/chat/completions"""
import json
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request

from .answers import Answer
from .async_engine import paced
from .bodies import BodyRoute
from .errors import refusals
from .outputs import StepOutput
from .params import choices
from .protocol import ChatCompletion, ChatRequest
from .service import Service
from .streaming import ANSWERS, Events, unless_gone
from .text import encode_chat
from .writer import Writer, Written

router = APIRouter(route_class=BodyRoute)


async def tokenize_chat(service: Service, messages: list[dict]) -> list[int]:
    """Return a conversation's token ids; RequestError if the checkpoint's template refuses it, or it cannot fit."""
    return await service.async_engine.tokenize(encode_chat, messages, service.check_text)


class ChatWriter(Writer):
    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

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

    async def add(self, answer: Answer, output: StepOutput) -> None:
        _, tokens = answer.push(output)
        self.written[answer.index] += await self.spell(tokens)

    def choice(self, answer: Answer) -> dict:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self.logprobs(self.written[answer.index]),
            "finish_reason": answer.finish_reason,
        }

    async def pieces(self) -> AsyncIterator[dict]:
        for answer in self.answers:
            yield self.piece(answer, {"role": "assistant", "content": ""})
        async for index, output in self.generation:
            answer = self.answers[index]
            text, tokens = answer.push(output)
            if text or tokens:
                yield self.piece(answer, {"content": text}, logprobs=self.logprobs(await self.spell(tokens)))
            if answer.finish_reason:
                yield self.piece(answer, {}, finish_reason=answer.finish_reason)

    def piece(self, answer: Answer, delta: dict, logprobs: dict | None = None, finish_reason: str | None = None) -> dict:
        return {"index": answer.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWERS)
async def create_chat_completion(request: Request, body: ChatRequest):
    service = request.app.state.service
    service.check_model(body.model)
    service.check_priority(body.priority)
    service.check_count(1, body.n)
    with refusals("messages", "max_completion_tokens" if body.max_completion_tokens else "max_tokens"):
        prompt_ids = await tokenize_chat(service, [message.plain() for message in body.messages])
        params = body.sampling_params(
            service.max_tokens(body.max_completion_tokens or body.max_tokens, None, len(prompt_ids)),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            new_text=True,
            cache_salt=service.cache_salt(request.scope["api_key"], body.cache_salt),
        )
        generation = await service.async_engine.generate([(prompt_ids, choice) for choice in choices(params, body.n)])
    answers = [Answer(i) for i in range(body.n)]
    writer = ChatWriter(service, body, generation, answers, len(prompt_ids))
    if body.stream:
        return Events(generation, writer.stream())
    return await unless_gone(request, generation, writer.whole())
