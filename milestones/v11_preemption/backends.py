"""The implementations of attention, and the choice between them."""
import importlib.util
import os
import sys

import torch

from .attention import attend_cached
from .batch import Backend, build_rectangles

TORCH = Backend(name="torch", build_view=build_rectangles, attend=attend_cached, warm_up=lambda *_: None)


def choose_backend(attention: str, device: torch.device) -> Backend:
    """The requested backend: torch, triton, or auto, which is triton on a GPU and torch on a CPU.

    On a CPU, Triton's kernels run in its interpreter, which is meant for tests and debugging and is slow.
    """
    if attention not in ("auto", "torch", "triton"):
        raise ValueError(f"attention must be auto, torch or triton, got {attention!r}")
    if attention == "torch" or (attention == "auto" and device.type == "cpu"):
        return TORCH
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"attention is {attention!r} on {device}, but Triton is missing; install it or use torch")
    is_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
    if device.type == "cuda" and is_interpreted:
        raise ValueError(f"attention is {attention!r} on {device}, but with TRITON_INTERPRET set, kernels run on the CPU; unset it, or use torch")
    if device.type == "cpu" and not is_interpreted:
        # Triton reads the variable only when it is imported.
        if "triton" in sys.modules:
            raise ValueError("attention is 'triton' on cpu; set TRITON_INTERPRET=1 in the environment before Python starts")
        os.environ["TRITON_INTERPRET"] = "1"
    from .kernels import TRITON

    return TRITON
