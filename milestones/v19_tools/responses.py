"""OpenAI's Responses API, which can store its answers: create, continue, retrieve and cancel a response."""
import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from .bodies import BodyRoute
from .chat import answer_parts, tokenize_chat
from .errors import ERRORS, ApiError, refusals
from .params import SamplingParams
from .responses_protocol import InputMessage, ResponseRequest, plain_items
from .responses_store import Run, Store
from .streaming import ANSWERS, Events, unless_gone, while_connected
from .tools import without_thought
from .writer import to_json

# OpenAI's parameters for retrieving a response that are not implemented here.
NOT_RETRIEVED = ("include", "include[]", "include_obfuscation", "starting_after")

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/responses", responses=ANSWERS)
async def create_response(request: Request, body: ResponseRequest):
    service, store = request.app.state.service, request.app.state.responses
    api_key = request.scope["api_key"]
    service.check_model(body.model)
    service.check_priority(body.priority)
    messages = earlier_turns(store, api_key, body.previous_response_id)
    turns = body.input if isinstance(body.input, list) else [InputMessage(role="user", content=body.input)]
    messages += plain_items(turns, messages)
    instructions = [{"role": "system", "content": body.instructions}] if body.instructions else []
    with refusals("input", "max_output_tokens", body.grammar_param):
        tools = [tool.plain() for tool in body.tools]
        options = without_thought(service.family, body.chat_template_kwargs, body.reasoning.effort, "reasoning.effort")
        prompt_ids, is_open = await tokenize_chat(service, instructions + messages, tools, options)
        parts = answer_parts(service, body, is_open)
        params = SamplingParams(
            max_tokens=service.max_tokens(body.max_output_tokens, None, len(prompt_ids)),
            temperature=0 if body.top_p == 0 else body.temperature,
            top_p=body.top_p or 1.0,
            logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
            new_text=True,
            priority=body.priority,
            cache_salt=service.cache_salt(api_key, body.cache_salt),
            **body.shape(parts),
        )
        run = Run(service, api_key, body, messages, len(prompt_ids), parts)
        to_json(run.describe())  # what is nested too deeply to be written is refused before it is generated
        run.generation = await while_connected(request, service.async_engine.generate([(prompt_ids, params)], request.scope["arrived"]))
    if body.store and (body.background or body.stream):
        store.add(run)
    if body.background:
        # Counted like a request being answered, so that a drain waits for it.
        service.num_active += 1
        run.task = asyncio.create_task(run.in_background())
        return run.answer_now()
    if body.stream:
        return Events(run, run.stream())
    answer = await unless_gone(request, run, run.whole())
    # Only now: a client that hangs up before has never learned its id.
    if body.store and run.status in ("completed", "incomplete"):
        store.add(run)
    return answer


def earlier_turns(store: Store, api_key: str | None, response_id: str | None) -> list[dict]:
    """Return the conversation up to and including a response, [] for none; ApiError if it cannot be continued."""
    if response_id is None:
        return []
    run = store.find(response_id, api_key)
    if run is not None and not run.ended:
        message = f"previous_response_id {response_id[:200]!r} is {run.status}; wait until it has finished"
        raise ApiError(400, message, "previous_response_id", "previous_response_not_ended")
    if run is None or run.status not in ("completed", "incomplete"):
        why = "is not known here" if run is None else f"is {run.status}"
        message = f"previous_response_id {response_id[:200]!r} {why}; send the whole conversation as input"
        raise ApiError(400, message, "previous_response_id", "previous_response_not_found")
    return [*run.messages, run.turn()]


@router.get("/v1/responses/{response_id}", responses=ERRORS)
async def retrieve_response(request: Request, response_id: str, stream: bool = False) -> Response:
    if stream:
        raise ApiError(400, "a stored response is not streamed again; leave stream out", "stream")
    for name in NOT_RETRIEVED:
        if name in request.query_params:
            raise ApiError(400, f"{name} is not supported here; leave it out", name)
    run = request.app.state.responses.get(response_id, request.scope["api_key"])
    if run.ended and "head" not in request.scope:
        run.fetched.set()
    return run.answer_now()


@router.post("/v1/responses/{response_id}/cancel", responses=ERRORS)
async def cancel_response(request: Request, response_id: str) -> Response:
    run = request.app.state.responses.get(response_id, request.scope["api_key"])
    if not run.body.background:
        raise ApiError(400, "only a response that was created with background can be cancelled", "response_id")
    run.cancel()
    run.fetched.set()
    return run.answer_now()
