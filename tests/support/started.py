"""A command in a process of its own, without the seconds that its imports take.

A helper process imports the slow packages once, and nothing of the repository. It forks for each command, and the fork
runs it as `python -m` would. The command otherwise behaves as if a user had started it: it has its own signals, exit
code, stdout and stderr.
"""
import contextlib
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

# What a command would import, and what those packages import lazily.
SLOW = (
    *("torch", "torch._dynamo", "triton", "safetensors.torch", "tokenizers", "pydantic.v1"),
    *("transformers", "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers"),
    *("fastapi.openapi.docs", "uvicorn.protocols.http.h11_impl", "sse_starlette"),
)


class Started:
    """A running command, with the interface of subprocess.Popen. Its output must fit into a pipe."""

    def __init__(self, module: str, *arguments: str, cwd: Path, env: dict[str, str]):
        (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe()
        order = {"module": module, "arguments": arguments, "cwd": str(cwd), "env": env}
        self.pid = ask(order, out_write, err_write)
        os.close(out_write)
        os.close(err_write)
        self.stdout, self.stderr = open(out_read, errors="replace"), open(err_read, errors="replace")
        self.returncode = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else 600)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and return the rest of stdout and stderr."""
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def close(self) -> None:
        """End it in any case."""
        self.kill()
        self.wait()
        self.stdout.close()
        self.stderr.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # otherwise the id may belong to another process
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


@cache
def helper() -> socket.socket:
    """The connection to the helper, which the first command starts and which ends with this process."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-P", __file__, str(its.fileno())]
    subprocess.Popen(command, pass_fds=[its.fileno()], cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    its.close()
    return ours


def ask(order: dict, *fds: int):
    socket.send_fds(helper(), [json.dumps(order).encode() + b"\n"], fds)
    return json.loads(line_of(helper())[0])


def line_of(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The next message and the files sent with it; nothing if the other side is gone."""
    message, fds = b"", []
    while not message.endswith(b"\n"):
        part, more, _, _ = socket.recv_fds(connection, 1 << 16, 2)
        if not part:
            return b"", fds
        message, fds = message + part, fds + more
    return message, fds


# ---- in the helper


def obey(orders: socket.socket) -> tuple[dict, list[int]] | None:
    """Start commands and report how they ended, until the other side is gone. In a fork: return its order and pipes."""
    while True:
        message, fds = line_of(orders)
        if not message:
            return None
        order = json.loads(message)
        if "poll" in order:
            done, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        else:
            answer = os.fork()
            if answer == 0:
                orders.close()
                return order, fds
            for fd in fds:
                os.close(fd)
        orders.sendall(json.dumps(answer).encode() + b"\n")


def run(order: dict, fds: list[int]) -> None:
    """In the fork: run the command, and exit as it does."""
    for number, fd in enumerate(fds, 1):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.path.insert(0, order["cwd"])
    sys.argv = [order["module"], *order["arguments"]]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in SLOW:
        with contextlib.suppress(ImportError):  # Triton exists only for Linux
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    forked = obey(socket.socket(fileno=int(sys.argv[1])))
    if forked:
        run(*forked)
