"""POST /v1/completions"""
from collections.abc import AsyncIterator
from typing import NamedTuple

from fastapi import APIRouter, Request
from transformers import PreTrainedTokenizerBase

from .answers import Answer
from .names import TokenNames
from .params import choices
from .protocol import Completion, CompletionChoice, CompletionRequest
from .streaming import ANSWERS, Events, unless_gone
from .text import encode, token_starts
from .writer import Writer

router = APIRouter()


class Prompt(NamedTuple):
    token_ids: list[int]
    text: str  # empty if nobody wants it
    offsets: list[int]  # at which character of it each token begins; empty if nobody wants it


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str] | list[list[int]], echo: bool, names: TokenNames | None
) -> list[Prompt]:
    """Tokens of texts; texts of tokens only if they are echoed, and offsets if names are given."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            token_ids, text = encode(tokenizer, prompt), prompt
            offsets = token_starts(tokenizer, prompt) if echo and names else []
        else:
            token_ids, text = prompt, tokenizer.decode(prompt, skip_special_tokens=True) if echo else ""
            offsets = names.offsets(prompt) if echo and names else []
        encoded.append(Prompt(token_ids, text, offsets))
    return encoded


class CompletionWriter(Writer):
    id_prefix, chunk_model = "cmpl-", Completion

    def __init__(self, *args, prompts: list[Prompt]):
        """prompts: the one of each answer."""
        super().__init__(*args)
        self.prompts = prompts
        self.begun: set[int] = set()  # answers of which a piece was written

    def piece(self, answer: Answer, text: str, tokens: list) -> CompletionChoice:
        """The next part of an answer; the first one begins with the prompt if that is wanted."""
        names, prompt = self.service.names, self.prompts[answer.index]
        if self.body.echo:
            tokens = [(len(prompt.text) + offset, *token) for offset, *token in tokens]
            if answer.index not in self.begun:
                text = prompt.text + text
                if answer.prompt_logprobs is not None:
                    tokens = [*zip(prompt.offsets, prompt.token_ids, answer.prompt_logprobs, strict=True), *tokens]
        self.begun.add(answer.index)
        logprobs = None if self.body.logprobs is None else names.of_completion(tokens)
        return CompletionChoice(index=answer.index, text=text, logprobs=logprobs, finish_reason=answer.finish_reason)

    async def whole(self) -> Completion:
        logprobs = await self.collect()
        pieces = [self.piece(answer, answer.text, tokens) for answer, tokens in zip(self.answers, logprobs, strict=True)]
        return Completion(**self.head, choices=pieces, usage=self.usage())

    async def pieces(self) -> AsyncIterator[CompletionChoice]:
        async for index, output in self.generation:
            answer = self.answers[index]
            text, tokens = answer.push(output)
            if text or tokens or answer.finish_reason or (self.body.echo and index not in self.begun):
                yield self.piece(answer, text, tokens)


@router.post("/v1/completions", response_model=Completion, responses=ANSWERS)
async def create_completion(request: Request, body: CompletionRequest):
    service = request.app.state.service
    service.check_model(body.model)
    service.check_count(len(body.prompts), body.n)
    service.check_size([prompt for prompt in body.prompts if isinstance(prompt, str)])
    names = None if body.logprobs is None else service.names
    prompts = await service.async_engine.tokenize(encode_prompts, body.prompts, body.echo, names)
    # The engine gives every request a token; a request that wants none has it thrown away.
    max_tokens = 1 if body.max_tokens == 0 else body.max_tokens
    requests = []
    for prompt in prompts:
        params = body.sampling_params(
            service.max_tokens(max_tokens, 16, len(prompt.token_ids)),
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
