"""Start a chapter's server as a user does, and find all of its processes: used by benchmarks and tests.

Reads: the chapter, /proc (Linux).
"""
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import httpx

from shared.chapters import ROOT, Chapter
from shared.checkpoints import POCKET


class Served:
    """A chapter's server, started with its serve command in its own session; leaving the context kills all of its processes."""

    def __init__(self, chapter: Chapter, *flags: str, wait: bool = True):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.temporary = tempfile.TemporaryDirectory()
        command = [*chapter.command, "serve", "--model", str(POCKET), "--port", "0", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": self.temporary.name}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=self.log, start_new_session=True)
        self.pids = {"server": self.process.pid}
        if wait:
            try:
                self.wait_until_it_serves()
            except BaseException:  # SystemExit and KeyboardInterrupt, too: `__exit__` is not called for what was not entered
                self.__exit__()
                raise

    def wait_until_it_serves(self) -> None:
        while "  curl " not in self.said():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server exited before it was ready:\n{self.said()}")
            time.sleep(0.02)
        self.url = self.said().split("  curl ")[1].split()[0].removesuffix("/v1/completions")
        for pid in descendants(self.process.pid):
            if "spawn_main" in command_of(pid):
                self.pids["engine"] = pid

    def said(self) -> str:
        return Path(self.log.name).read_text(errors="replace")

    def ask(self, body: dict) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json={"model": "pocket"} | body, timeout=60)

    @contextlib.contextmanager
    def stream(self, body: dict):
        """The lines of a streamed completion, which ignores end-of-sequence tokens."""
        body = {"model": "pocket", "stream": True, "ignore_eos": True} | body
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as response:
            yield response.iter_lines()

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()
        self.temporary.cleanup()


def processes_of(served: Served) -> list[int]:
    """The ids of all processes in a server's session, its own included; zombies are left out."""
    pids = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            state, session = state_and_session(int(entry))
            if session == served.process.pid and state != "Z":
                pids.append(int(entry))
    return pids


def state_and_session(pid: int) -> tuple[str, int]:
    state, _parent, _group, session, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return state, int(session)


def descendants(pid: int) -> list[int]:
    pids = []
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split()):
            pids += [child, *descendants(child)]
    return pids


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
