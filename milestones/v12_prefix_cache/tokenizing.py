"""POST /tokenize and /detokenize, as in vLLM."""
from fastapi import APIRouter, Request
from transformers import PreTrainedTokenizerBase

from .bodies import BodyRoute
from .chat import tokenize_chat
from .errors import ERRORS, ApiError, refusals
from .protocol import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from .text import encode

router = APIRouter(route_class=BodyRoute)


@router.post("/tokenize", response_model=Tokenized, responses=ERRORS)
async def tokenize(request: Request, body: TokenizeRequest):
    service = request.app.state.service
    service.check_model(body.model or service.models[0])
    if body.messages is not None:
        with refusals("messages"):
            token_ids = await tokenize_chat(service, [message.plain() for message in body.messages])
    else:
        service.check_text(body.prompt)
        token_ids = await service.async_engine.tokenize(encode_text, body.prompt, body.add_special_tokens)
    limit = service.async_engine.max_model_len
    if body.return_token_strs and len(token_ids) > limit:
        message = f"return_token_strs is for at most max_model_len = {limit} tokens, but there are {len(token_ids)}; leave it out"
        raise ApiError(400, message, "return_token_strs")
    return Tokenized(
        count=len(token_ids),
        max_model_len=limit,
        tokens=token_ids,
        token_strs=await service.async_engine.tokenize(spell, token_ids) if body.return_token_strs else None,
    )


@router.post("/detokenize", response_model=Detokenized, responses=ERRORS)
async def detokenize(request: Request, body: DetokenizeRequest):
    service = request.app.state.service
    service.check_model(body.model or service.models[0])
    num_tokens, limit = len(body.tokens), service.async_engine.max_model_len
    if num_tokens > limit:
        message = f"tokens has {num_tokens} items, more than max_model_len = {limit}; send fewer"
        raise ApiError(400, message, "tokens", "context_length_exceeded")
    num_known = len(service.names.vocabulary)
    if max(body.tokens, default=0) >= num_known:
        raise ApiError(400, f"tokens must be ids from 0 to {num_known - 1}, got {max(body.tokens)}", "tokens", "invalid_value")
    return Detokenized(prompt=await service.async_engine.tokenize(decode, body.tokens))


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    """Return what `encode` does, or the ids without BOS and other special tokens."""
    return encode(tokenizer, text) if add_special_tokens else tokenizer(text, add_special_tokens=False).input_ids


def spell(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[str]:
    """Return each token as the vocabulary spells it."""
    return tokenizer.convert_ids_to_tokens(token_ids)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """Return the text, special tokens included."""
    return tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
