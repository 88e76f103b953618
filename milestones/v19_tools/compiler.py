"""Compiles grammars to automata, in this process or in one of its own, which is killed if it takes too long.

Compiling is Python, which would keep the engine's thread from running.
"""
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from .automaton import START, Automaton, Either, Text, Then, TooLarge, both, compile_node
from .json_schema import SchemaCompiler, Unsupported, check_schema, compile_schema
from .params import RequestError, param_of
from .parts import ANY_TEXT, Tool, parts_node
from .regex import parse_regex

# What a process of its own may take.
MOST_SECONDS, MOST_MEMORY = 10, 4 * 2**30


class NotNow(RequestError):
    """A grammar that could not be compiled within the limits, or not at once; another time it may be."""


def compile_here(kind: str, source) -> Automaton:
    """The automaton of a grammar.

    Raises:
        Unsupported: if no automaton can follow it. RequestError: if it is invalid.
    """
    param = param_of(kind, source)
    try:
        match kind:
            case "regex":
                automaton = compile_node(parse_regex(source))
            case "choice":
                automaton = compile_node(Either(tuple(map(Text, source))))
            case "json_schema":
                automaton = compile_schema(json.loads(source))
            case "parts":
                content = source.content and grammar_node(*source.content)
                functions = [(Text(tool.name), arguments_node(tool)) for tool in source.tools]
                automaton = compile_node(parts_node(source, content, functions))
            case _:
                raise Unsupported(f"{kind}: no automaton can follow it, because it may nest to any depth", kind)
    except TooLarge as error:
        raise Unsupported(f"{param} is too large: {error}; use shorter bounds or fewer parts", param) from None
    except RecursionError:
        raise Unsupported(f"{param} is nested too deeply; use fewer levels", param) from None
    if not automaton.table[START].any():
        raise RequestError(f"{param} matches no text, or only the empty one", param)
    return automaton


def grammar_node(kind: str, source):
    """The node of a grammar that is part of an answer's."""
    match kind:
        case "regex":
            # Its ^ and $ mean the ends of this part.
            return compile_node(parse_regex(source))
        case "choice":
            return Either(tuple(map(Text, source)))
        case "json_schema":
            return compile_schema(json.loads(source))
    raise Unsupported(f"{kind}: no automaton can follow it, because it may nest to any depth", kind)


def arguments_node(tool: Tool):
    """The node of a tool's arguments.

    Unsupported if there is none. If the tool is not strict, any object may take their place; no automaton can follow that either.
    """
    schema = json.loads(tool.schema)
    try:
        check_schema(schema, tool.param)
        node = SchemaCompiler(schema, tool.param).node(schema)
        if schema.get("type") == "object":
            return node
        node = both(compile_node(node), compile_node(Then((Text("{"), ANY_TEXT, Text("}")))))
        if node.is_empty:
            raise RequestError(f"{tool.param}: no object is allowed", tool.param)
        return node
    except Unsupported:
        raise
    except RequestError as error:
        if tool.is_strict:
            raise
        raise Unsupported(str(error), tool.param) from None


def compile_apart(kind: str, source) -> Automaton:
    """As `compile_here`, in a process of its own."""
    return run_apart(kind, source, param_of(kind, source))


def try_library(grammar: str, param: str, tokenizer: Callable[[], tuple[str, int]]) -> None:
    """Let llguidance read a grammar in a process of its own; NotNow if it takes too long, RequestError if it refuses it.

    It may go on forever, whatever limits it is given, and nothing could end it in a thread. tokenizer: the model's as JSON,
    with the size of its vocabulary. It takes a while to read, and is needed only if the grammar has tokens beside bytes.
    """
    error = run_apart("library", (grammar, None), param) and run_apart("library", (grammar, tokenizer()), param)
    if error:
        raise RequestError(f"{param} is refused: {error}", param)


def run_apart(kind: str, source, param: str) -> Automaton | str | None:
    """Compile in a process of its own; from the library, whose objects cannot be pickled, only an error. Waits without the interpreter's lock."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, input=pickle.dumps((os.getpid(), kind, source)), capture_output=True, timeout=MOST_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise NotNow(f"{param} takes more than {MOST_SECONDS} s to compile; use a simpler one", param) from None
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise NotNow(f"{param} could not be compiled: {reason[0]}; use a simpler one", param)
    result = pickle.loads(done.stdout)
    if result is None or isinstance(result, (str, Automaton)):
        return result
    error, message, error_param = result
    raise error(message, error_param)


def read_by_library(grammar: str, tokenizer: tuple[str, int] | None) -> str | None:
    """Why the library refuses a grammar, with a tokenizer or one of bytes; None if it does not."""
    from llguidance import LLMatcher, LLTokenizer

    text, vocab_size = tokenizer or ("byte", None)
    matcher = LLMatcher(LLTokenizer(text, n_vocab=vocab_size), grammar)
    return matcher.get_error().strip().partition("\n")[0][:500] or "without a reason" if matcher.is_error() else None


def leave_with(parent: int) -> None:
    """End this process once its parent has ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def main() -> None:
    """Compile what is on standard input, and write to standard output the automaton, or the error's class, message and param; of the library, an error or None."""
    # Where the system has no such limits, the parent's timeout still holds.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    parent, kind, source = pickle.load(sys.stdin.buffer)
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    try:
        result = read_by_library(*source) if kind == "library" else compile_here(kind, source)
    except RequestError as error:
        result = type(error), str(error), error.param
    sys.stdout.buffer.write(pickle.dumps(result))


if __name__ == "__main__":
    main()
