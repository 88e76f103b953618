"""POST /v1/chat/completions"""
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request

from .answers import Answer
from .errors import refusals
from .params import choices
from .protocol import ChatChoice, ChatChunk, ChatCompletion, ChatLogprobs, ChatMessage, ChatRequest, ChunkChoice
from .service import Service
from .streaming import ANSWERS, Events, unless_gone
from .text import encode_chat
from .writer import Writer

router = APIRouter()


async def tokenize_chat(service: Service, messages: list[dict]) -> list[int]:
    """The tokens of a conversation; RequestError if the checkpoint's template refuses it, or it cannot fit."""
    service.check_size(["".join(message["content"] for message in messages)])
    return await service.async_engine.tokenize(encode_chat, messages)


class ChatWriter(Writer):
    id_prefix, chunk_model = "chatcmpl-", ChatChunk

    def logprobs(self, tokens: list) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return ChatLogprobs(content=self.service.names.of_chat(tokens, self.body.top_logprobs or 0))

    async def whole(self) -> ChatCompletion:
        logprobs = await self.collect()
        chat_choices = [
            ChatChoice(
                index=answer.index,
                message=ChatMessage(content=answer.text),
                logprobs=self.logprobs(tokens),
                finish_reason=answer.finish_reason,
            )
            for answer, tokens in zip(self.answers, logprobs, strict=True)
        ]
        return ChatCompletion(**self.head, choices=chat_choices, usage=self.usage())

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


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ANSWERS)
async def create_chat_completion(request: Request, body: ChatRequest):
    service = request.app.state.service
    service.check_model(body.model)
    service.check_count(1, body.n)
    with refusals("messages"):
        prompt_ids = await tokenize_chat(service, [message.plain() for message in body.messages])
        params = body.sampling_params(
            service.max_tokens(body.max_completion_tokens or body.max_tokens, None, len(prompt_ids)),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            new_text=True,
        )
        generation = await service.async_engine.generate([(prompt_ids, choice) for choice in choices(params, body.n)])
    answers = [Answer(i) for i in range(body.n)]
    writer = ChatWriter(service, body, generation, answers, len(prompt_ids))
    if body.stream:
        return Events(generation, writer.stream())
    return await unless_gone(request, generation, writer.whole())
