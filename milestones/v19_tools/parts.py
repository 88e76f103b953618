"""The parts of an answer: what is thought, what is said, and what is called.

A checkpoint was trained to write all of them as one text. `Parts` says which parts an answer may have, `parts_node` makes a
grammar of that, and `Splitter` takes the text apart while it is generated. So what is parsed is what the grammar allowed.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from .automaton import LAST_CODE, Chars, Either, Joined, Repeat, Special, Text, Then, compile_node, without

ANY_TEXT = Repeat(Chars(((0, LAST_CODE),)))
# Templates put line breaks between the parts. They belong to none.
GAP = Repeat(Text("\n"), 0, 2)


@dataclass(frozen=True)
class Form:
    """How a family of checkpoints writes calls: the marker, then name and arguments of each, in JSON.

    A marker may be a special token. Then its characters, spelled by other tokens, are no marker, and are forbidden.
    """

    marker: str  # begins the calls; "": they have none, and only the beginning of an answer can be a call
    before: tuple[str, ...]  # what may come between the marker and the first call
    opening: str  # before a name
    middle: str  # between a name and its arguments
    closing: str  # after the arguments
    between: str  # between two calls
    after: str  # after the last call
    is_single: bool = False  # whether an answer has at most one call
    id_size: int = 24  # letters and digits of a call's id

    @property
    def texts(self) -> tuple[str, ...]:
        return self.marker, self.opening, self.middle, self.closing, self.between, self.after


class Tool(NamedTuple):
    """A function that may be called."""

    name: str
    schema: str  # of its arguments, as JSON
    is_strict: bool  # False: if no grammar can follow the schema exactly, any object may be the arguments
    param: str  # where the request has the schema


@dataclass(frozen=True)
class Parts:
    """What an answer may consist of, in this order: a thought, then something said, then calls."""

    thought: tuple[str, str] | None = None  # the texts around a thought; None: the checkpoint does not write any
    is_open: bool = False  # the prompt ends within a thought, so the answer begins there
    content: tuple[str, str | tuple[str, ...]] | None = None  # the grammar of what is said, as in SamplingParams; None: any text
    form: Form | None = None  # None: nothing is called
    tools: tuple[Tool, ...] = ()  # none: calls are forbidden
    is_required: bool = False  # something must be called, and nothing is said
    is_single: bool = False  # at most one call
    special: tuple[str, ...] = ()  # the special tokens in all these texts
    param: str = "parts"  # where the request has what demands a grammar, for messages

    @property
    def nbytes(self) -> int:
        """The size of all grammars in it."""
        sources = [tool.schema for tool in self.tools]
        if self.content is not None:
            _, source = self.content
            sources += source if isinstance(source, tuple) else [source]
        return sum(len(source.encode()) for source in sources)


# ---- the grammar


def marked(text: str, special: tuple[str, ...]):
    """A node for a text in which the names of special tokens stand for these tokens."""
    for name in special:
        if name in text:
            before, after = text.split(name, 1)
            return Then((marked(before, special), Special(name), marked(after, special)))
    return Text(text)


def excluding(node, marker: str, beginning: tuple[str, ...] = ()):
    """The node's texts, except those that contain the marker (if it is not "") or begin with one of `beginning`, perhaps after line breaks."""
    found = [Then((ANY_TEXT, Text(marker), ANY_TEXT))] if marker else []
    found += [Then((Repeat(Text("\n")), Text(text), ANY_TEXT)) for text in beginning]
    return without(compile_node(node), compile_node(Either(tuple(found)))) if found else node


def parts_node(parts: Parts, content, functions: list[tuple]):
    """The node of all answers.

    content: the node of what may be said, None for any text. functions: the nodes of each name and of its arguments.
    """
    form, special = parts.form, parts.special
    calls = None
    if form is not None and parts.tools:
        each = [Then((name, marked(form.middle, special), node, marked(form.closing, special))) for name, node in functions]
        call = Then((marked(form.opening, special), Either(tuple(each))))
        repeated = call if parts.is_single else Joined(call, marked(form.between, special))
        lead = Either(tuple(map(Text, form.before)))
        calls = Then((GAP, marked(form.marker, special), lead, repeated, marked(form.after, special)))
    marker, beginning = (form.marker, () if form.marker else (form.opening,)) if form else ("", ())

    def said(*beginning: str):
        """What may be said, without what would look like a call or a thought, and what the splitter would take for line breaks."""
        if content is None:
            node = ANY_TEXT
        elif parts.thought is None:
            node = content
        else:
            node = Then((GAP, without(compile_node(content), compile_node(Then((Text("\n"), ANY_TEXT))))))
        return excluding(node, marker, beginning)

    told, before_calls = said(*beginning), Then(())
    if parts.thought is not None:
        opening, closing = parts.thought
        thought = Then((excluding(ANY_TEXT, closing), marked(closing, special)))
        if not parts.is_open:
            thought = Then((GAP, marked(opening, special), thought))
        told, before_calls = Then((thought, told)), thought
        if not parts.is_open:
            told, before_calls = Either((said(*beginning, opening), told)), Repeat(thought, 0, 1)
    if parts.is_required:
        return Then((before_calls, calls))
    if calls is None:
        return told
    # There is only one copy of the calls, which are large: they have the schemas of all tools.
    if content is None and marker:
        return Then((told, Either((Then(()), calls))))
    return Either((told, Then((before_calls, calls))))


# ---- taking an answer apart


class Delta(NamedTuple):
    """A piece of a part."""

    kind: str  # thought, content, call or arguments
    text: str  # for a call, the name of the function
    index: int = 0  # of the call


class Call:
    """A call whose name is known, and as much of its arguments as has been generated."""

    def __init__(self, call_id: str, name: str):
        self.id = call_id
        self.name = name
        self.arguments = ""
        self.is_whole = False
        self.depth = 0
        self.in_string = self.escaped = False

    def read(self, text: str) -> int:
        """Read JSON up to the end of the arguments; return how many characters belong to them."""
        for index, character in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped = character == "\\"
                self.in_string = character != '"'
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    self.is_whole = True
                    self.arguments += text[: index + 1]
                    return index + 1
        self.arguments += text
        return len(text)


class Splitter:
    """Takes the text of one answer apart. Feed it pieces of any size: it holds back what may be part of a marker."""

    def __init__(self, parts: Parts, new_id):
        """new_id: returns the id of the next call."""
        self.parts = parts
        self.new_id = new_id
        self.thought: str | None = None
        self.content = ""
        self.calls: list[Call] = []
        self.held = ""  # text that no part has yet
        self.num_read = 0  # characters
        self.thought_end: int | None = None  # how many of them the thought takes, its marker included, once it has ended
        # Where what is said begins and ends, without line breaks around it; the end is known once something is called.
        self.content_begin: int | None = None
        self.content_end: int | None = None
        self.at_begin = True  # of a part, whose line breaks are left out
        self.taken_from = 0  # where the text begins that was taken last
        self.read = self.read_thought if parts.thought and parts.is_open else self.read_begin if parts.thought else self.read_content
        if self.read == self.read_thought:
            self.thought = ""

    def push(self, text: str, last: bool) -> list[Delta]:
        """Add text, and return what it adds to the parts; with last, all that remains."""
        self.held += text
        self.num_read += len(text)
        deltas: list[Delta] = []
        while True:
            reader = self.read
            reader(deltas, last)
            if self.read == reader:
                return [delta for delta in deltas if delta.text or delta.kind == "call"]

    @property
    def calls_are_whole(self) -> bool:
        return bool(self.calls) and all(call.is_whole for call in self.calls) and self.read == self.read_rest

    def read_begin(self, deltas: list[Delta], last: bool) -> None:
        """Does the answer begin with a thought?"""
        opening, _ = self.parts.thought
        text = self.held.lstrip("\n")
        if text.startswith(opening):
            self.held = text.removeprefix(opening)
            self.thought, self.read = "", self.read_thought
        elif last or not opening.startswith(text):
            self.read = self.read_content

    def read_thought(self, deltas: list[Delta], last: bool) -> None:
        _, closing = self.parts.thought
        text, found = self.take(closing, last)
        self.thought += text
        deltas.append(Delta("thought", text))
        if found:
            self.thought_end = self.num_read - len(self.held)
            self.at_begin, self.read = True, self.read_content

    def read_content(self, deltas: list[Delta], last: bool) -> None:
        form = self.parts.form if self.parts.tools else None
        if form and not form.marker and not self.content:
            text = self.held.lstrip("\n")
            if text.startswith(form.opening):
                self.content_end = self.num_read - len(self.held)
                self.read = self.read_name
                return
            if form.opening.startswith(text) and not last:
                return
        text, found = self.take(form.marker if form else "", last)
        # Where something must be called, this can only be half a marker.
        text = "" if self.parts.is_required else text
        self.content += text
        deltas.append(Delta("content", text))
        if text and self.content_begin is None:
            self.content_begin = self.taken_from
        if found:
            self.content_end = self.taken_from + len(text)
            self.read = self.read_name

    def read_name(self, deltas: list[Delta], last: bool) -> None:
        form = self.parts.form
        opened = self.held.partition(form.opening)[2] if form.opening else self.held
        name, middle, rest = opened.partition(form.middle)
        if middle:
            self.calls.append(Call(self.new_id(), name))
            deltas.append(Delta("call", name, len(self.calls) - 1))
            self.held, self.read = rest, self.read_arguments

    def read_arguments(self, deltas: list[Delta], last: bool) -> None:
        call = self.calls[-1]
        size = call.read(self.held)
        deltas.append(Delta("arguments", self.held[:size], len(self.calls) - 1))
        self.held = self.held[size:]
        if call.is_whole:
            self.read = self.read_rest

    def read_rest(self, deltas: list[Delta], last: bool) -> None:
        """Does another call follow?"""
        form = self.parts.form
        following = form.closing + form.between
        # What comes after the last call may begin like what comes between two.
        if not self.parts.is_single and self.held.startswith(following + form.opening):
            self.held, self.read = self.held.removeprefix(following), self.read_name

    def take(self, marker: str, last: bool) -> tuple[str, bool]:
        """The text before the marker, and whether that was found; without line breaks around it.

        What may be the beginning of the marker is held back, and so are line breaks, which may come before it.
        """
        if self.at_begin and self.parts.thought:
            self.held = self.held.lstrip("\n")
            self.at_begin = not self.held
        self.taken_from = self.num_read - len(self.held)
        before, found, rest = self.held.partition(marker) if marker else (self.held, "", "")
        if found:
            self.held = rest
            return before.rstrip("\n"), True
        size = 0
        if not last and marker:
            size = next((n for n in range(len(marker) - 1, 0, -1) if before.endswith(marker[:n])), 0)
            size = len(before) - len(before[: len(before) - size].rstrip("\n"))
        text, self.held = before[: len(before) - size], before[len(before) - size :]
        return text, False


def arguments_of(text: str) -> dict:
    """The arguments that a client sends back, as a dict; "" is none. ValueError if they are no JSON object."""
    arguments = json.loads(text or "{}")
    if not isinstance(arguments, dict):
        raise ValueError(f"got {text[:40]}")
    json.dumps(arguments, allow_nan=False)  # fails for NaN and infinity, which Python's parser takes
    return arguments
