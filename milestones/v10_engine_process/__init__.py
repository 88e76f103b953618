"""An inference engine: prompts in, tokens and text out."""
from typing import TYPE_CHECKING

from .outputs import RequestOutput, StepOutput
from .params import RequestError, SamplingParams

if TYPE_CHECKING:
    from .engine import Engine

__all__ = [
    "Engine",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StepOutput",
]


def __getattr__(name: str):
    """Import the engine, and PyTorch with it, for those who ask for it: the server's process never does."""
    if name == "Engine":
        from .engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
