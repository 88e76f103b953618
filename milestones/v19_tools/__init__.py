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
    """Import the engine, and with it PyTorch, only on access to `Engine`: the server process can run without them."""
    if name == "Engine":
        from .engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
