"""The engine's side of the server: the engine loop, and the messages between it and the event loop's side.

Only the thread that runs the engine loop may use the engine. Messages are named tuples of plain data, so neither side
holds an object that the other one changes.
"""
import logging
import queue
from collections.abc import Callable
from typing import NamedTuple, Protocol

from .outputs import Stats, StepOutput
from .params import RequestError, SamplingParams

logger = logging.getLogger(__name__)

NOT_FINITE = "the model's logits for this request were not finite numbers; its weights may not fit the engine's dtype"


class EngineLike(Protocol):
    """What the server needs from an engine. Once the engine loop runs, only its thread calls the methods."""

    name: str
    tokenizer: object
    max_model_len: int
    max_request_len: int

    def add_request(self, prompt: list[int], params: SamplingParams) -> int: ...
    def abort_request(self, request_id: int) -> bool: ...
    def has_unfinished_requests(self) -> bool: ...
    def step(self) -> list[StepOutput]: ...
    def fail_step(self) -> list[int]: ...
    def reset_prefix_cache(self) -> None: ...
    def close(self) -> None: ...
    def stats(self) -> Stats: ...


# ---- to the engine's side


class Add(NamedTuple):
    """Queue all requests of a call, or none. The reply is Added, Refused or Failed."""

    call_id: int
    requests: list[tuple[list[int], SamplingParams]]


class Abort(NamedTuple):
    """Abort a call's unfinished requests. The reply is Aborted."""

    call_id: int


class ResetPrefixCache(NamedTuple):
    """Let no request find blocks that were computed so far. There is no reply."""


class Stop(NamedTuple):
    """End the engine loop. There is no reply."""


# ---- from the engine's side


class Added(NamedTuple):
    """All requests of a call are queued."""

    call_id: int


class Refused(NamedTuple):
    """None of a call's requests is queued, because adding one raised RequestError with these arguments."""

    call_id: int
    message: str
    param: str
    code: str


class Aborted(NamedTuple):
    """The engine has no request of this call left."""

    call_id: int


class Stepped(NamedTuple):
    """Tokens of one step, each with its call id and its request's index in that call."""

    outputs: list[tuple[int, int, StepOutput]]


class Failed(NamedTuple):
    """These calls have failed, and none of their requests is left."""

    call_ids: list[int]
    reason: str


class Died(NamedTuple):
    """The engine loop has died. No message follows."""

    reason: str


class EngineLoop:
    """Steps an engine and handles messages between steps. Once `run` is called, only its thread may use this object."""

    def __init__(
        self,
        engine: EngineLike,
        inbox: queue.SimpleQueue,
        send: Callable[[tuple, Stats], None],
    ):
        """Messages are read from inbox; send gets each message to the event loop's side, with the engine's stats."""
        self.engine = engine
        self.inbox = inbox
        self.send = send
        # For each unfinished request, by id: the id of its call, and its index in that call.
        self.owners: dict[int, tuple[int, int]] = {}

    def run(self) -> None:
        try:
            while self.read_messages():
                if self.engine.has_unfinished_requests():
                    self.step()
        # A panic of a library in Rust is no Exception.
        except BaseException as error:
            logger.exception("the engine has died")
            self.post(Died(f"the engine has stopped: {error!r}"))
        finally:
            self.engine.close()

    def read_messages(self) -> bool:
        """Handle all queued messages; wait for one first if no request is unfinished. Return False after Stop."""
        wait = not self.engine.has_unfinished_requests()
        while True:
            try:
                message = self.inbox.get(block=wait)
            except queue.Empty:
                return True
            match message:
                case Add(call_id, requests):
                    self.add(call_id, requests)
                case Abort(call_id):
                    self.remove(call_id)
                    self.post(Aborted(call_id))
                case ResetPrefixCache():
                    self.engine.reset_prefix_cache()
                case Stop():
                    return False
            wait = False

    def add(self, call_id: int, requests: list[tuple[list[int], SamplingParams]]) -> None:
        try:
            for index, (prompt_ids, params) in enumerate(requests):
                request_id = self.engine.add_request(prompt_ids, params)
                self.owners[request_id] = call_id, index
        except RequestError as error:
            self.remove(call_id)
            self.post(Refused(call_id, str(error), error.param, error.code))
        except Exception as error:
            logger.exception("a request could not be added")
            self.remove(call_id)
            self.post(Failed([call_id], f"the engine could not take this request: {error!r}"))
        else:
            self.post(Added(call_id))

    def remove(self, call_id: int) -> None:
        """Abort a call's unfinished requests."""
        request_ids = [request_id for request_id, (owner, _) in self.owners.items() if owner == call_id]
        for request_id in request_ids:
            del self.owners[request_id]
            self.engine.abort_request(request_id)

    def step(self) -> None:
        """Take one step and post its tokens. If it raises, the calls that took part fail and the others continue."""
        try:
            outputs = self.engine.step()
        except Exception as error:
            logger.exception("a step failed")
            request_ids = self.engine.fail_step()
            # If no request took part, none can be failed, and the next step would raise too.
            if not request_ids:
                raise
            call_ids = {self.owners[request_id][0] for request_id in request_ids}
            self.fail_calls(call_ids, f"the step that computed this request failed: {error!r}")
        else:
            self.fail_calls({self.owners[output.request_id][0] for output in outputs if output.finish_reason == "error"}, NOT_FINITE)
            outputs = [output for output in outputs if output.request_id in self.owners]
            # Receiving a message blocks the event loop, and a prompt has many logprobs, so outputs with them go alone.
            together = [output for output in outputs if output.prompt_logprobs is None]
            alone = [[output] for output in outputs if output.prompt_logprobs is not None]
            for group in [together, *alone]:
                self.post(Stepped([(*self.owners[output.request_id], output) for output in group]))
            for output in outputs:
                if output.finish_reason is not None:
                    del self.owners[output.request_id]

    def fail_calls(self, call_ids: set[int], reason: str) -> None:
        """Abort the unfinished requests of these calls, and post that the calls have failed."""
        for call_id in call_ids:
            self.remove(call_id)
        if call_ids:
            self.post(Failed(sorted(call_ids), reason))

    def post(self, message: Added | Refused | Aborted | Stepped | Failed | Died) -> None:
        self.send(message, self.engine.stats())
