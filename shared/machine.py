"""The machine that a measurement ran on, as committed with every result.

    python -m shared.machine        # this machine and its kind
"""
import datetime
import os
import platform
from pathlib import Path

import torch
import transformers

from shared.programs import run, take_no_arguments


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(gpu: bool = False) -> str:
    """Processor, cores, the GPU if it was used, and the versions of Python, torch and transformers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [cpu_name(), f"{cores} cores"]
    if gpu:
        parts.append(torch.cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}")
    parts.append(f"torch {torch.__version__}")
    parts.append(f"transformers {transformers.__version__}")
    return ", ".join(parts)


def kind(gpu: bool = False) -> str:
    """The kind of machine: gpu if the GPU was used, otherwise the vector instructions PyTorch uses, such as avx2 or avx512."""
    return "gpu" if gpu else torch.backends.cpu.get_cpu_capability().lower()


def today() -> str:
    """Today's date in ISO format."""
    return datetime.date.today().isoformat()


def main(argv: list[str]) -> int:
    take_no_arguments(argv, "shared.machine", __doc__)
    print(machine(gpu=torch.cuda.is_available()))
    print(*[kind(), *["gpu"] * torch.cuda.is_available()], sep=", ")
    return 0


if __name__ == "__main__":
    run(main)
