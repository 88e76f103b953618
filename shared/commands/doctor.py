"""Print what a bug report needs: versions, devices, memory, and missing packages."""
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from pathlib import Path

from shared.programs import run, take_no_arguments

REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "huggingface_hub", "jinja2", "tqdm")
OPTIONAL = {
    "triton": "kernels, interpreted on a CPU; Linux only",
    "pytest": "make test",
}


def version(package: str) -> str | None:
    """The package's installed version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory() -> str:
    """Available memory, as the operating system reports it."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return "unknown on this system"
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return f"{int(fields['MemAvailable'].split()[0]) / 2**20:.1f} GiB available"


def device_lines() -> list[str]:
    """One line for each device that PyTorch sees."""
    import torch

    if not torch.cuda.is_available():
        return ["cpu, no CUDA device"]
    lines = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        lines.append(f"cuda:{i} {torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    return lines


def interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run the kernels here; None if it can."""
    triton, numpy = version("triton"), version("numpy")
    if triton is None:
        return "Triton is not installed; it is available for Linux only"
    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton} fails with NumPy {numpy}; install numpy below 2.4, or triton 3.7"
    return None


def release(text: str) -> tuple[int, ...]:
    """The first two numbers of a version.

    >>> release("3.6.0+git1234"), release("2.10rc1")
    ((3, 6), (2, 10))
    """
    return tuple(int(re.match(r"\d+", part)[0]) for part in text.split(".")[:2])


def triton_mode() -> str:
    """How Triton kernels run on this machine."""
    import torch

    if version("triton") is None:
        return "not installed: attention uses torch"
    if interpreter_fault() and not torch.cuda.is_available():
        return interpreter_fault()
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter (TRITON_INTERPRET=1)"
    return "compiled for the GPU" if torch.cuda.is_available() else "no GPU: interpreter, in tests"


def main(argv: list[str]) -> int:
    """Print the report; 1 if a required package is missing."""
    take_no_arguments(argv, "shared.commands.doctor", __doc__)
    missing = [package for package in REQUIRED if version(package) is None]
    row("python", f"{platform.python_version()}, {sys.executable}")
    row("system", f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores")
    row("memory", free_memory())
    row("disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here")
    for package in REQUIRED:
        row(package, version(package) or "MISSING: run make setup")
    for package, purpose in OPTIONAL.items():
        row(package, version(package) or f"missing ({purpose})")
    if "torch" not in missing:
        for line in device_lines():
            row("device", line)
        row("triton runs", triton_mode())
    row("model", os.environ.get("STEPSERVE_MODEL") or "the bundled model")
    row("HF_TOKEN", "set" if os.environ.get("HF_TOKEN") else "not set (only gated models need it)")
    return 1 if missing else 0


def row(name: str, value: str) -> None:
    print(f"{name:16}{value}")


if __name__ == "__main__":
    run(main)
