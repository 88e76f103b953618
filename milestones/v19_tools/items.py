"""The items of a response's output, and the events of its stream."""
from collections.abc import Iterator

from .answers import PartedAnswer
from .parts import Delta
from .protocol import new_id
from .writer import Written

Event = tuple[str, dict]  # its name and its fields


class Item:
    """A thought, a message or a call, as much of it as there is."""

    def __init__(self, kind: str, index: int, answer: PartedAnswer, number: int = 0):
        """kind: thought, content or call. index: of the item in the output. number: of the call in the answer."""
        self.kind = kind
        self.index = index
        self.answer = answer
        self.number = number
        self.id = new_id({"thought": "rs_", "content": "msg_", "call": "fc_"}[kind])
        self.status = "in_progress"
        self.text = ""
        self.logprobs: list[Written] = []  # those of each token of a message, if requested

    def part(self) -> dict:
        """The content of a thought or a message."""
        if self.kind == "thought":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def describe(self, content: list | None = None) -> dict:
        """The item in its current state. content: what to show instead of its content."""
        content = [self.part()] if content is None else content
        head = {"id": self.id, "status": self.status}
        match self.kind:
            case "thought":
                return head | {"type": "reasoning", "summary": [], "content": content}
            case "content":
                return head | {"type": "message", "role": "assistant", "content": content}
        call = self.answer.parts.calls[self.number]
        return head | {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": self.text}

    def place(self) -> dict:
        place = {"item_id": self.id, "output_index": self.index}
        return place if self.kind == "call" else place | {"content_index": 0}

    def begin(self) -> Iterator[Event]:
        yield "output_item.added", {"output_index": self.index, "item": self.describe(content=[])}
        if self.kind != "call":
            yield "content_part.added", self.place() | {"part": self.part()}

    def add(self, text: str, logprobs: list[Written]) -> Iterator[Event]:
        self.text += text
        match self.kind:
            case "thought":
                yield "reasoning_text.delta", self.place() | {"delta": text}
            case "content":
                self.logprobs += logprobs
                yield "output_text.delta", self.place() | {"delta": text, "logprobs": logprobs}
            case "call":
                yield "function_call_arguments.delta", self.place() | {"delta": text}

    def end(self, status: str) -> Iterator[Event]:
        self.status = status
        match self.kind:
            case "thought":
                yield "reasoning_text.done", self.place() | {"text": self.text}
            case "content":
                yield "output_text.done", self.place() | {"text": self.text, "logprobs": self.logprobs}
            case "call":
                yield "function_call_arguments.done", self.place() | {"name": self.describe()["name"], "arguments": self.text}
        if self.kind != "call":
            yield "content_part.done", self.place() | {"part": self.part()}
        yield "output_item.done", {"output_index": self.index, "item": self.describe()}


class Items:
    """All items of one answer, the last of which may still grow."""

    def __init__(self, answer: PartedAnswer):
        self.answer = answer
        self.items: list[Item] = []

    def describe(self, status: str) -> list[dict]:
        """The output of a response with this status. An item that grew no further is incomplete."""
        described = [item.describe() for item in self.items]
        if described and status not in ("in_progress", "queued") and described[-1]["status"] == "in_progress":
            described[-1]["status"] = "incomplete"
        return described

    def add(self, deltas: list[Delta], logprobs: list[Written]) -> Iterator[Event]:
        """The events of what a token adds. A token's logprobs go with the first piece of a message that it adds to."""
        for delta in deltas:
            kind = "call" if delta.kind == "arguments" else delta.kind
            if not self.items or self.items[-1].kind != kind or delta.kind == "call":
                yield from self.close("completed")
                yield from self.open(kind, delta.index)
            if delta.kind != "call":
                yield from self.items[-1].add(delta.text, logprobs)
                logprobs = [] if kind == "content" else logprobs
        # A token's text may be held back, so that it adds nothing yet.
        if logprobs:
            yield from self.items[-1].add("", logprobs)

    def open(self, kind: str, number: int = 0) -> Iterator[Event]:
        self.items.append(Item(kind, len(self.items), self.answer, number))
        yield from self.items[-1].begin()

    def close(self, status: str) -> Iterator[Event]:
        if self.items:
            yield from self.items[-1].end(status)

    def end(self, status: str) -> Iterator[Event]:
        """The last events. An answer in which nothing was thought, said or called has an empty message."""
        if not self.items:
            yield from self.open("content")
            yield from self.close(status)
            return
        last, parts = self.items[-1], self.answer.parts
        ended = {
            "thought": parts.thought_end is not None,
            "content": parts.content_end is not None,
            "call": bool(parts.calls) and parts.calls[-1].is_whole,
        }
        yield from self.close("completed" if ended[last.kind] else status)
