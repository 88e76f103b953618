"""Create .venv with everything the tests need: what `make setup` runs. It needs only Python itself.

    python3 shared/commands/install.py         # .venv
    python3 shared/commands/install.py book    # adds what the notebooks and the site need
    python3 shared/commands/install.py here    # installs what the engines and notebooks need into this Python, as on Colab

The versions are those of constraints.txt. Without an NVIDIA GPU, PyTorch is installed from its index of CPU
builds, because the default index would add gigabytes of CUDA libraries. Set TORCH_INDEX to use another index.

Reads: pyproject.toml, constraints.txt. Writes: .venv.
"""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(argv: list[str]) -> int:
    python = VENV / "bin" / "python"
    if argv not in ([], ["book"], ["here"]):
        print(f"setup: the argument must be book, here or none, got {' '.join(argv)}", file=sys.stderr)
        return 2
    try:
        if argv == ["here"]:
            run([sys.executable, "-m", "pip", "install", "--quiet", *requirements()])
            return 0
        if argv == ["book"]:
            say("installing what the notebooks and the site need; this takes about a minute and prints nothing")
            pip(python, *requirements("book"), "--quiet")
            (VENV / ".ready-book").touch()
            say("done")
            return 0
        if not python.exists():
            say(f"creating .venv with Python {sys.version.split()[0]}")
            run([sys.executable, "-m", "venv", str(VENV)])
        index = torch_index()
        say("installing PyTorch" + (f" from {index}" if index else " from the default index"))
        pip(python, "torch", *(["--index-url", index] if index else []))
        say("installing the other packages; this takes about a minute and prints nothing")
        pip(python, *requirements("test"), "--quiet")
    except subprocess.CalledProcessError as error:
        print(f"setup: this command failed, for the reason above: {' '.join(error.cmd)}", file=sys.stderr)
        if "venv" in error.cmd:
            print("setup: on Debian and Ubuntu, install the missing package with `apt install python3-venv`", file=sys.stderr)
        return 1
    (VENV / ".ready").touch()
    say("done")
    return 0


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


def pip(python: Path, *arguments: str) -> None:
    # Not the pip script itself: its first line cannot hold a path with a space.
    flags = ["--disable-pip-version-check", "--constraint", "constraints.txt"]
    run([str(python), "-m", "pip", "install", *flags, *arguments])


def torch_index() -> str | None:
    """The index to install PyTorch from; None for the default one."""
    index = os.environ.get("TORCH_INDEX")
    if index is None and sys.platform == "linux" and not has_nvidia_gpu():
        index = CPU_INDEX
    if index and not in_reach(index):
        say(f"cannot reach {index}; using the default index instead, which may install CUDA libraries")
        return None
    return index


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi finds a GPU; the CUDA toolkit alone is not enough."""
    if not shutil.which("nvidia-smi"):
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def in_reach(index: str) -> bool:
    """Whether an index has PyTorch and responds within 5 seconds."""
    try:
        urllib.request.urlopen(index.rstrip("/") + "/torch/", timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code < 400
    except (OSError, ValueError):
        return False
    return True


def requirements(*extras: str) -> list[str]:
    """The requirements in pyproject.toml, with these extras."""
    import tomllib  # not above: an older Python, which lacks it, has to get as far as the check of its version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + [name for extra in extras for name in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        again = " ".join(["python3.12 shared/commands/install.py", *sys.argv[1:]])
        remedy = f"run this file with a later one, for example `{again}`, then `make`"
        sys.exit(f"setup: Python must be 3.11 or later, got {sys.version.split()[0]}; {remedy}")
    sys.exit(main(sys.argv[1:]))
