"""An inference engine: prompts in, tokens and text out."""
from .engine import Engine
from .outputs import RequestOutput, StepOutput
from .params import RequestError, SamplingParams

__all__ = [
    "Engine",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StepOutput",
]
