"""promtool, which checks what a server's metrics look like to Prometheus: the one on the PATH, or Debian's.

    python -m shared.book.promtool      # say where it is; download it if it is missing and apt can

Debian's package `prometheus` would also start a service, so only its files are unpacked, under build/promtool.

Writes: build/promtool.
"""
import os
import shutil
import subprocess
from pathlib import Path

from shared.chapters import ROOT
from shared.programs import run, take_no_arguments

FOLDER = ROOT / "build" / "promtool"
PROGRAM = FOLDER / "usr" / "bin" / "promtool"


def find() -> Path | None:
    """promtool, downloaded if it has to be; None if there is none for this machine."""
    there = shutil.which("promtool") or (PROGRAM if PROGRAM.is_file() else None)
    if there is None and shutil.which("apt-get") and shutil.which("dpkg"):
        FOLDER.mkdir(parents=True, exist_ok=True)
        quiet = {"cwd": FOLDER, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if subprocess.run(["apt-get", "download", "prometheus"], timeout=120, **quiet).returncode == 0:
            for package in FOLDER.glob("prometheus_*.deb"):
                subprocess.run(["dpkg", "-x", package.name, "."], check=True, **quiet)
        there = PROGRAM if PROGRAM.is_file() else None
    return None if there is None else Path(there)


def put_on_path() -> str:
    """Let this process's children find promtool; a line that says which it is, or that it is missing."""
    program = find()
    if program is None:
        return "promtool is missing, so the format of metrics is checked by prometheus_client only; install Debian's package prometheus"
    os.environ["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return f"promtool is {program}"


def main(argv: list[str]) -> int:
    take_no_arguments(argv, "shared.book.promtool", __doc__)
    print(put_on_path())
    return 0 if find() else 1


if __name__ == "__main__":
    run(main)
