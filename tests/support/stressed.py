"""What the tests of a server under stress share."""
import json
import os
import socket

import openai
import pytest

from shared.chapters import ROOT
from shared.checkpoints import POCKET, checkpoint
from shared.verify import serving as verify
from shared.verify.serving import serving, wait_until
from shared.verify.soak_server import is_idle
from tests.support.http import HTTP
from tests.support.started import Started

CHAT = [{"role": "user", "content": "What is a KV cache?"}]
LONG = {"model": "pocket", "prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="session")
def engine(chapter):
    return chapter.load().Engine(checkpoint("pocket"), max_num_seqs=16, max_model_len=512, kv_bytes=20 * 2**20)


@pytest.fixture
def tokenizer(engine):
    return engine.tokenizer


def health(server):
    return HTTP.get(f"{server.url}/health", timeout=2).json()


def client_of(server, **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **options)


def start(chapter, *flags):
    """Start the server as a user would."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if "engine_process" in chapter.capabilities:
        flags = ("--engine", verify.ENGINE, *flags)
    return Started(f"milestones.{chapter.name}", "serve", "--model", str(POCKET), *flags, cwd=ROOT, env=environment)


@pytest.fixture
def process(chapter, request):
    """A server on a free port, with the line that it prints."""
    process = start(chapter, "--port", "0", *getattr(request, "param", ()))
    lines = []
    while not (lines and lines[-1].startswith("  curl ")):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    process.curl = lines[-1]
    process.url = lines[-1].split()[1].removesuffix("/v1/completions")
    yield process
    process.close()


def raw_request(path, body):
    """The bytes of a request with this body."""
    raw = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


def hang_up(chapter, engine, path, body):
    """Send a request and close the connection once it runs; all of it must end soon."""
    with serving(chapter, engine) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.split(":")[-1]))) as connection:
            before = engine.num_steps
            connection.sendall(raw_request(path, body))
            wait_until(lambda: health(server)["running"])
        wait_until(lambda: is_idle(server), 10)
        # A complete answer would have been 400 or more.
        assert engine.num_steps - before < 300
        assert not engine.has_unfinished_requests() and not server.service.async_engine.active_generations
        assert engine.pool.num_free == engine.pool.num_blocks
