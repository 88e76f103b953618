"""POST /v1/completions"""
import json
from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple

from fastapi import APIRouter, Request
from transformers import PreTrainedTokenizerBase

from .answers import Answer
from .async_engine import paced
from .bodies import BodyRoute
from .names import TokenNames, finite
from .outputs import StepOutput
from .params import choices
from .protocol import Completion, CompletionRequest
from .service import Service
from .streaming import ANSWERS, Events, unless_gone
from .text import encode, token_starts
from .writer import Writer, Written

router = APIRouter(route_class=BodyRoute)


class Prompt(NamedTuple):
    token_ids: list[int]
    text: str  # empty for token ids that are not echoed
    offsets: list[int]  # the character of text at which each token begins; empty unless echoed with logprobs


def encode_prompts(tokenizer: PreTrainedTokenizerBase, body: CompletionRequest, service: Service) -> list[Prompt]:
    """Tokenize the prompts, with what echo needs of their texts and offsets. RequestError if one cannot fit."""
    wants_offsets = body.echo and body.logprobs is not None
    encoded = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            service.check_text(prompt)
        token_ids = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
        service.async_engine.check_length(len(token_ids))
        if isinstance(prompt, str):
            text, offsets = prompt, token_starts(tokenizer, prompt) if wants_offsets else []
        else:
            text = tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False) if body.echo else ""
            offsets = service.names.offsets(prompt) if wants_offsets else []
        encoded.append(Prompt(token_ids, text, offsets))
    return encoded


class CompletionLogprobs:
    """Logprobs in completions' format: four lists with an entry per token."""

    def __init__(self):
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[Written] = []
        self.text_offset: list[int] = []

    async def add(self, names: TokenNames, tokens: Iterable) -> None:
        """Append tokens, each given by its offset in the text, its id, and its logprobs or None."""
        async for offset, token_id, logprobs in paced(tokens):
            self.tokens.append(names.text_of(token_id))
            self.token_logprobs.append(None if logprobs is None else finite(logprobs[token_id]))
            tops = None if logprobs is None else names.by_text(token_id, logprobs)
            self.top_logprobs.append(Written(json.dumps(tops)))
            self.text_offset.append(offset)

    def write(self) -> dict:
        return {
            "tokens": Written(json.dumps(self.tokens)),
            "token_logprobs": Written(json.dumps(self.token_logprobs)),
            "top_logprobs": self.top_logprobs,
            "text_offset": Written(json.dumps(self.text_offset)),
        }


class CompletionWriter(Writer):
    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, *args, prompts: list[Prompt]):
        """prompts: the prompt of each answer."""
        super().__init__(*args)
        self.prompts = prompts
        self.begun: set[int] = set()  # indices of the answers that have had their first piece
        self.written = [CompletionLogprobs() for _ in self.answers]

    async def next_piece(self, answer: Answer, output: StepOutput, logprobs: CompletionLogprobs) -> str:
        """Return the text that an output adds to an answer, and add its logprobs; with echo, the prompt comes first."""
        text, tokens = answer.push(output)
        names, prompt = self.service.names, self.prompts[answer.index]
        if self.body.echo:
            tokens = [(len(prompt.text) + offset, *token) for offset, *token in tokens]
            if answer.index not in self.begun:
                text = prompt.text + text
                if answer.prompt_logprobs is not None:
                    await logprobs.add(names, zip(prompt.offsets, prompt.token_ids, answer.prompt_logprobs, strict=True))
        self.begun.add(answer.index)
        await logprobs.add(names, tokens)
        return text

    async def add(self, answer: Answer, output: StepOutput) -> None:
        await self.next_piece(answer, output, self.written[answer.index])

    def choice(self, answer: Answer) -> dict:
        text = self.prompts[answer.index].text + answer.text if self.body.echo else answer.text
        return self.piece(answer, text, self.written[answer.index])

    def piece(self, answer: Answer, text: str, logprobs: CompletionLogprobs) -> dict:
        written = None if self.body.logprobs is None else logprobs.write()
        return {"index": answer.index, "text": text, "logprobs": written, "finish_reason": answer.finish_reason}

    async def pieces(self) -> AsyncIterator[dict]:
        async for index, output in self.generation:
            answer, logprobs = self.answers[index], CompletionLogprobs()
            is_first = index not in self.begun
            text = await self.next_piece(answer, output, logprobs)
            if text or logprobs.tokens or answer.finish_reason or (self.body.echo and is_first):
                yield self.piece(answer, text, logprobs)


@router.post("/v1/completions", response_model=Completion, responses=ANSWERS)
async def create_completion(request: Request, body: CompletionRequest):
    service = request.app.state.service
    service.check_model(body.model)
    service.check_priority(body.priority)
    service.check_count(len(body.prompts), body.n)
    prompts = await service.async_engine.tokenize(encode_prompts, body, service)
    requests = []
    for prompt in prompts:
        params = body.sampling_params(
            service.max_tokens(body.max_tokens, 16, len(prompt.token_ids)),
            logprobs=body.logprobs,
            prompt_logprobs=body.echo and body.logprobs is not None,
        )
        requests += [(prompt.token_ids, choice) for choice in choices(params, body.n)]
    generation = await service.async_engine.generate(requests)
    writer = CompletionWriter(
        service,
        body,
        generation,
        [Answer(i, wants_tokens=body.max_tokens != 0) for i in range(len(requests))],
        sum(len(prompt.token_ids) for prompt in prompts),
        prompts=[prompt for prompt in prompts for _ in range(body.n)],
    )
    if body.stream:
        return Events(generation, writer.stream())
    return await unless_gone(request, generation, writer.whole())
