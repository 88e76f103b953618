"""What a measurement ran on: the line that stands beside every committed number."""
import datetime
import os
import platform
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


def today() -> str:
    """The date of a measurement, ISO."""
    return datetime.date.today().isoformat()
