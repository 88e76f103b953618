"""The endpoints that generate nothing: health, and the served models."""
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from .errors import ERRORS
from .service import Service

VERSION = "0.1.0"

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Return the server's status and the engine's stats; the response is a 503 if no new requests are accepted."""
    service = request.app.state.service
    async_engine = service.async_engine
    status = "ok" if async_engine.fatal_error is None else "dead" if async_engine.died else "stopping"
    if service.draining and status == "ok":
        status = "draining"
    # Requests that the engine has not acknowledged yet are waiting too, and so are calls at the tokenizer.
    stats = async_engine.stats._replace(waiting=async_engine.metrics.num_waiting)
    numbers = stats._asdict()
    del numbers["report"], numbers["waits_for"]
    return JSONResponse({"status": status} | numbers, 200 if status == "ok" else 503)


@router.get("/version")
async def version() -> dict:
    return {"version": VERSION}


def model_card(service: Service, name: str) -> dict:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "stepserve", "max_model_len": service.async_engine.max_model_len}


@router.get("/v1/models", responses=ERRORS)
async def list_models(request: Request) -> dict:
    service = request.app.state.service
    return {"object": "list", "data": [model_card(service, name) for name in service.models]}


@router.get("/v1/models/{name:path}", responses=ERRORS)
async def retrieve_model(request: Request, name: str) -> dict:
    service = request.app.state.service
    service.check_model(name)
    return model_card(service, name)
