"""Endpoints for development, which a server has only with --dev-mode."""
from fastapi import APIRouter, Request

from .errors import ERRORS

router = APIRouter()


@router.post("/reset_prefix_cache", responses=ERRORS)
async def reset_prefix_cache(request: Request) -> dict:
    """Let no later request find prompts that were computed so far, as in vLLM."""
    request.app.state.service.async_engine.reset_prefix_cache()
    return {}
