"""A server on a socket of this machine, in a thread of this process, and an engine that tests can steer."""
import asyncio
import importlib
import threading
import time
from contextlib import contextmanager

import uvicorn


@contextmanager
def serving(chapter, engine, **options):
    """Serve an engine over a real socket; yields the server, with `url` and `service`."""
    server_module = importlib.import_module(f"milestones.{chapter.name}.server")
    drain_seconds = options.pop("drain_seconds", 5)
    service = server_module.Service(engine, "pocket", **options)
    # The chapter's own socket: asyncio sends at once (TCP_NODELAY) only where the protocol is named, as it is there.
    with server_module.bind("127.0.0.1", 0) as listener:
        config = uvicorn.Config(server_module.create_app(service), log_level="critical", timeout_graceful_shutdown=1)
        server = server_module.Server(config, service, drain_seconds)
        server.url = "http://127.0.0.1:%d" % listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        try:
            yield server
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not stop"


def wait_until(condition, seconds=20.0):
    """Poll until a condition holds; AssertionError if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


class FakeEngine:
    """Says the prompt back, a token a step, to as many requests as there are places; holds while `gate` is closed."""

    def __init__(self, chapter, tokenizer, places=2):
        module = importlib.import_module(f"milestones.{chapter.name}.engine")
        self.StepOutput, self.Stats = module.StepOutput, module.Stats
        self.tokenizer, self.places, self.max_model_len = tokenizer, places, 1000
        self.requests, self.num_requests, self.aborted = {}, 0, []
        self.gate = threading.Event()
        self.gate.set()
        self.fault = None

    def add_request(self, prompt, params):
        if 13 in prompt:
            raise ValueError("prompt has the token 13, which this engine refuses")
        self.num_requests += 1
        self.requests[self.num_requests] = [list(prompt), params.max_tokens]
        return self.num_requests

    def abort_request(self, request_id):
        self.aborted.append(request_id)
        return self.requests.pop(request_id, None) is not None

    def has_unfinished_requests(self):
        return bool(self.requests)

    def running(self):
        return list(self.requests)[: self.places]

    def step(self):
        self.gate.wait()
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault
        outputs = []
        for request_id in self.running():
            said = self.requests[request_id]
            token_id = said[0].pop(0)
            said[1] -= 1
            ended = not said[0] or not said[1]
            text = self.tokenizer.decode([token_id])
            outputs.append(self.StepOutput(request_id, token_id, text, None, "length" if ended else None))
            if ended:
                del self.requests[request_id]
        return outputs

    def fail_step(self):
        failed = self.running()
        for request_id in failed:
            del self.requests[request_id]
        return failed

    def stats(self):
        running = len(self.running())
        return self.Stats(running, len(self.requests) - running, self.places - running, self.places)
