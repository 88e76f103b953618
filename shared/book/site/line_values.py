"""The values that names have while a chapter answers one fixed prompt: what the diff pages show beside each line.

    values = record(find("v05"))
    values["batch.py", 70]["positions"]     # {1: 'list of 21: 0 1 2 3 ...', 2: 'list of 2: 11 10'}

A line has what its names were after it had run for the first time in the first step, which feeds a prompt (or, where
requests share a pass, both), and in the second, which feeds a token of each; 0 stands for what comes before all steps.
"""
import ast
import contextlib
import math
import os
import sys
from collections import Counter
from pathlib import Path

from shared.chapters import Chapter, python_files

PROMPTS = ("Explain KV cache in one sentence.", "What is a block table?")
MAX_TOKENS = 4
STEPS = 2  # that are shown
# A name that is nothing that can be shown in so many visits of a step stays untold.
VISITS = 4
SHOWN = 4  # elements of a tensor or a list

# By file and line: of each name what it was, by the number of the step.
Values = dict[tuple[str, int], dict[str, dict[int, str]]]


def record(chapter: Chapter) -> Values:
    """Run the chapter on the prompts; by file and line, what each name was."""
    from shared.checkpoints import POCKET

    package = chapter.load()
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        engine = package.Engine(POCKET, device="cpu", dtype="float32")
    chats = [package.text.encode_chat(engine.tokenizer, [{"role": "user", "content": each}]) for each in PROMPTS]
    with following(chapter.path, engine) as values:
        engine.generate(chats, package.SamplingParams(max_tokens=MAX_TOKENS, logprobs=1, seed=1))
    return values


@contextlib.contextmanager
def following(package_dir: Path, engine):
    """Note the values of names in a package's files while the block runs the engine."""
    follower = Follower(package_dir)
    schedule = engine.scheduler.schedule

    def next_step():
        follower.step += 1
        follower.visits.clear()
        return schedule()

    before = sys.gettrace()
    engine.scheduler.schedule = next_step
    sys.settrace(follower.on_call)
    try:
        yield follower.values
    finally:
        sys.settrace(before)
        del engine.scheduler.schedule


class Follower:
    """A trace function, and what it has seen."""

    def __init__(self, package_dir: Path):
        self.values: Values = {}
        self.step = 0
        self.visits = Counter()  # of a line in this step
        self.files = {}
        for path in python_files(package_dir):
            name = path.relative_to(package_dir).as_posix()
            self.files[os.path.realpath(path)] = (name, names_by_line(path.read_text()))

    def on_call(self, frame, event, _):
        found = self.files.get(os.path.realpath(frame.f_code.co_filename))
        if found is None or frame.f_code.co_name.startswith("<"):
            return None
        name, names = found
        last = None

        def on_event(frame, event, _):
            nonlocal last
            if last is not None and event in ("line", "return"):
                self.note(name, last, names.get(last, ()), frame)
            last = frame.f_lineno if event == "line" else None
            return on_event

        return on_event

    def note(self, file: str, line: int, names: tuple[str, ...], frame) -> None:
        """What the names of a line are, now that it has run."""
        self.visits[file, line] += 1
        if self.visits[file, line] > VISITS or self.step > STEPS:
            return
        for name in names:
            value = look_up(name, frame)
            told = describe(value)
            if told is None:
                continue
            self.values.setdefault((file, line), {}).setdefault(name, {}).setdefault(self.step, told)


def names_by_line(source: str) -> dict[int, tuple[str, ...]]:
    """Variables and chains of attributes, by the first line of the simple statement, or of the head, they are in."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        bodies = {id(child) for field in ("body", "orelse", "finalbody", "handlers") for child in getattr(node, field, [])}
        heads = [child for child in ast.iter_child_nodes(node) if id(child) not in bodies]
        names = dict.fromkeys(name for head in heads for inner in ast.walk(head) if (name := chain(inner)))
        if names:
            found[node.lineno] = tuple(names)
    return found


def chain(node: ast.AST) -> str | None:
    """`a.b.c` as text; None for anything else.

    >>> chain(ast.parse("self.cache.k", mode="eval").body), chain(ast.parse("f(x).y", mode="eval").body)
    ('self.cache.k', None)
    """
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := chain(node.value)):
        return f"{owner}.{node.attr}"
    return None


def look_up(name: str, frame):
    """The value of a chain in a frame; None if it cannot be told."""
    head, *rest = name.split(".")
    value = frame.f_locals.get(head)
    for attribute in rest:
        try:
            value = getattr(value, attribute)
        except Exception:  # not there yet, or a property that cannot be asked now
            return None
    return value


def describe(value) -> str | None:
    """A value in a few words; None for what has nothing to show.

    >>> describe([3, 1, 4, 1, 5]), describe({"a": 1}), describe(len)
    ('list of 5: 3 1 4 1 ...', 'dict of 1', None)
    """
    if hasattr(value, "shape") and hasattr(value, "flatten"):
        values = [spelled(each) for each in value.flatten()[:SHOWN].tolist()]
        more = " ..." if math.prod(value.shape) > SHOWN else ""
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}: {' '.join(values)}{more}"
    if isinstance(value, (bool, int, float, str)):
        return spelled(value)
    if hasattr(value, "__len__") and type(value).__module__ in ("builtins", "collections"):
        plain = not isinstance(value, (dict, set)) and all(isinstance(each, (int, float, str)) for each in value)
        told = f"{type(value).__name__} of {len(value)}"
        if plain and len(value):
            told += ": " + " ".join(spelled(each) for each in list(value)[:SHOWN]) + (" ..." if len(value) > SHOWN else "")
        return told
    return None


def spelled(value) -> str:
    """A number or a text, short."""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
