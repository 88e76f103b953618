"""Record the values of names while a chapter answers two fixed prompts, for the diff pages.

    values = record(find("v05"))
    values["batch.py", 70]["positions"]     # {1: 'list of 21: 0 1 2 3 ...', 2: 'list of 2: 11 10'}

For each line, these are its names' values after it has first run: in the first step, which computes a prompt (or both, if
requests share a forward pass), in the second step, which computes one token of each, and, as step 0, before all steps.
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
STEPS = 2  # how many steps are recorded
# In each step, only a line's first visits are recorded.
VISITS = 4
SHOWN = 4  # how many elements of a tensor or list are shown

# File and line to name to step to value.
Values = dict[tuple[str, int], dict[str, dict[int, str]]]


def record(chapter: Chapter) -> Values:
    """Run the chapter on the prompts; the values of names, by file and line."""
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
    """Record the values of names in a package's files while the block runs the engine; yields the values."""
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
    """A trace function that records values."""

    def __init__(self, package_dir: Path):
        self.values: Values = {}
        self.step = 0
        self.visits = Counter()  # of each line in this step
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
        """Record the values of a line's names after it has run."""
        self.visits[file, line] += 1
        if self.visits[file, line] > VISITS or self.step > STEPS:
            return
        for name in names:
            value = look_up(name, frame)
            description = describe(value)
            if description is None:
                continue
            self.values.setdefault((file, line), {}).setdefault(name, {}).setdefault(self.step, description)


def names_by_line(source: str) -> dict[int, tuple[str, ...]]:
    """Variables and attribute chains, by the first line of their simple statement or compound statement's header."""
    by_line = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        bodies = {id(child) for field in ("body", "orelse", "finalbody", "handlers") for child in getattr(node, field, [])}
        heads = [child for child in ast.iter_child_nodes(node) if id(child) not in bodies]
        names = dict.fromkeys(name for head in heads for inner in ast.walk(head) if (name := chain(inner)))
        if names:
            by_line[node.lineno] = tuple(names)
    return by_line


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
    """The value of an attribute chain in a frame; None if it has none."""
    head, *rest = name.split(".")
    value = frame.f_locals.get(head)
    for attribute in rest:
        try:
            value = getattr(value, attribute)
        except Exception:  # not set yet, or a property that cannot be computed yet
            return None
    return value


def describe(value) -> str | None:
    """A short description of a value; None for objects that are not shown.

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
        description = f"{type(value).__name__} of {len(value)}"
        if plain and len(value):
            description += ": " + " ".join(spelled(each) for each in list(value)[:SHOWN]) + (" ..." if len(value) > SHOWN else "")
        return description
    return None


def spelled(value) -> str:
    """A number or a string, shortened."""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
