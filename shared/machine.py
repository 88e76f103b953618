"""What a measurement ran on: the line that stands beside every committed number.

    python -m shared.machine        # this machine, and its kind
"""
import datetime
import os
import platform
import sys
from pathlib import Path

import torch
import transformers


def cpu_name() -> str:
    """The processor's own name for itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(gpu: bool = False) -> str:
    """Processor, cores, the GPU of what was measured on one, and the versions that decide the arithmetic."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [cpu_name(), f"{cores} cores"]
    if gpu:
        parts.append(torch.cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}")
    parts.append(f"torch {torch.__version__}")
    parts.append(f"transformers {transformers.__version__}")
    return ", ".join(parts)


def kind(gpu: bool = False) -> str:
    """The kind of machine: gpu for what ran on one, otherwise the vectors that PyTorch computes with, as avx2 or avx512."""
    return "gpu" if gpu else torch.backends.cpu.get_cpu_capability().lower()


def today() -> str:
    """The date of a measurement, ISO."""
    return datetime.date.today().isoformat()


if __name__ == "__main__":
    print(machine(gpu=torch.cuda.is_available()))
    print(*[kind(), *["gpu"] * torch.cuda.is_available()], sep=", ")
    sys.exit(0)
