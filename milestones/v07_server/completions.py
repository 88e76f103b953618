"""POST /v1/completions"""
from fastapi import APIRouter, Request

from .protocol import Completion, CompletionRequest
from .streaming import ANSWERS, Events, unless_gone
from .text import encode
from .writer import Writer

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=ANSWERS)
async def create_completion(request: Request, body: CompletionRequest):
    service = request.app.state.service
    service.check_model(body.model)
    prompt_ids = await service.async_engine.tokenize(encode, body.prompt)
    params = body.sampling_params(body.max_tokens)
    generation = await service.async_engine.generate([(prompt_ids, params)])
    writer = Writer(body, generation, len(prompt_ids))
    if body.stream:
        return Events(generation, writer.stream())
    return await unless_gone(request, generation, writer.whole())
