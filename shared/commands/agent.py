"""Ask a model questions for which it calls the functions of this file: what `make agent` runs.

    make agent                                   # three questions
    make agent ASK="What is 17 plus 25?"         # one of your own
    make agent MODEL=Qwen/Qwen3-0.6B             # a larger model
    python -m shared.commands.agent --url http://127.0.0.1:8000 --ask "What time is it?"   # a server that runs already

Without --url, it starts the last chapter's server and ends it when all questions are answered.
"""
import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import openai

from shared.chapters import ROOT
from shared.checkpoints import POCKET
from shared.programs import run, server_url

try:
    import httpx2 as httpx  # newer versions of OpenAI's client use it
except ImportError:
    import httpx

CLIENT_ERRORS = (openai.APIError, httpx.HTTPError, httpx.InvalidURL, ValueError)
QUESTIONS = ("What is 17 plus 25?", "How is the weather in Oslo and in Lima?", "What time is it?")
TOOLS_MODEL = str(POCKET.with_name("pocket-tools"))
MOST_ROUNDS = 5
START_S = 600.0  # a model may have to be downloaded first

# ---- the functions, and how they are described to the model


def add(a: int, b: int) -> str:
    return str(a + b)


def multiply(a: int, b: int) -> str:
    return str(a * b)


WEATHER = {
    "Oslo": {"celsius": -4, "sky": "snow"},
    "Lima": {"celsius": 24, "sky": "sun"},
    "Paris": {"celsius": 11, "sky": "rain"},
    "Tokyo": {"celsius": 18, "sky": "clouds"},
}


def weather(city: str) -> str:
    return json.dumps(WEATHER[city]) if city in WEATHER else "error: no such city"


def time_of_day() -> str:
    return datetime.now().strftime("%H:%M")


FUNCTIONS: dict[str, Callable[..., str]] = {"add": add, "multiply": multiply, "weather": weather, "time": time_of_day}


def tool(name: str, description: str, **arguments: str) -> dict:
    """A function as the server expects it; of each argument, the type. All of them are required."""
    parameters = {"type": "object", "properties": {argument: {"type": kind} for argument, kind in arguments.items()}}
    if arguments:
        parameters["required"] = list(arguments)
    # Strict: the server refuses a schema that it cannot obey exactly, so calls need no checks below. (OpenAI's also wants additionalProperties: False.)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters, "strict": True}}


TOOLS = [
    tool("add", "Add two numbers.", a="integer", b="integer"),
    tool("multiply", "Multiply two numbers.", a="integer", b="integer"),
    tool("weather", "Get the weather in a city.", city="string"),
    tool("time", "Get the time."),
]

# ---- the conversation


class Asker(NamedTuple):
    """A client, and what it sends with each question."""

    client: openai.OpenAI
    model: str
    tool_choice: str | dict  # in the first request of a question; then the model decides
    max_tokens: int

    def ask(self, question: str) -> bool:
        """Talk until the model answers without a call; False if it never does, or is cut off."""
        print(f"\nyou: {question}")
        messages = [{"role": "user", "content": question}]
        for number in range(MOST_ROUNDS):
            message, finish_reason = self.listen(messages, self.tool_choice if number == 0 else "auto")
            if finish_reason == "length":
                print("(cut off by max_tokens)")
                return False
            if "tool_calls" not in message:
                return True
            messages.append(message)
            for call in message["tool_calls"]:
                content = result_of(call["function"])
                print(f"result: {content}")
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        print(f"(no answer after {MOST_ROUNDS} rounds of calls)")
        return False

    def listen(self, messages: list[dict], tool_choice: str | dict) -> tuple[dict, str | None]:
        """Print an answer as it arrives; return it as a message to send back, and its finish reason."""
        message, calls, finish_reason = {"role": "assistant", "content": None}, [], None
        body = dict(model=self.model, messages=messages, tools=TOOLS, tool_choice=tool_choice)
        with Printer() as printer, self.client.chat.completions.create(**body, temperature=0, max_tokens=self.max_tokens, stream=True) as stream:
            for chunk in stream:
                if not chunk.choices:
                    continue
                choice = chunk.choices[0]
                finish_reason = choice.finish_reason or finish_reason
                # OpenAI's client knows no reasoning_content, but keeps what it does not know.
                for name, label in (("reasoning_content", "thought"), ("content", self.model)):
                    if piece := getattr(choice.delta, name, None):
                        message[name] = (message.get(name) or "") + piece
                        printer.add(label, piece)
                for piece in choice.delta.tool_calls or ():
                    if piece.id:  # the first piece of a call
                        calls.append({"id": piece.id, "type": "function", "function": {"name": piece.function.name, "arguments": ""}})
                        printer.begin("call", f"{piece.function.name} ")
                    calls[piece.index]["function"]["arguments"] += piece.function.arguments
                    printer.add("call", piece.function.arguments)
        return message | ({"tool_calls": calls} if calls else {}), finish_reason


def first_model(client: openai.OpenAI) -> str:
    """The first model that a server lists; ValueError if what it says is no such list."""
    try:
        name = client.models.list().data[0].id
        if not isinstance(name, str):
            raise TypeError(f"its first model's id is {name!r}")
        return name
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{client.base_url} is not an OpenAI server, or lists no model ({error})") from None


class Printer:
    """Prints the parts of an answer, each on lines of its own; leaving the context ends the last line."""

    def __init__(self):
        self.label: str | None = None

    def __enter__(self) -> "Printer":
        return self

    def __exit__(self, *error) -> None:
        self.end()

    def begin(self, label: str, text: str = "") -> None:
        self.end()
        self.label = label
        print(f"{label}: {text}", end="", flush=True)

    def add(self, label: str, text: str) -> None:
        if label != self.label:
            self.begin(label)
        print(text, end="", flush=True)

    def end(self) -> None:
        if self.label:
            print(flush=True)
        self.label = None


def result_of(function: dict) -> str:
    """Run the function that was called. What goes wrong is a result too: the model has to hear of it."""
    try:
        return FUNCTIONS[function["name"]](**json.loads(function["arguments"]))
    except Exception as error:
        return f"error: {error}"


# ---- the server


@contextlib.contextmanager
def served(model: str, patience_s: float = START_S) -> Iterator[str]:
    """Start the last chapter's server on a free port; yields its URL. Leaving the context ends all of its processes.

    ValueError if the server does not start, with what it said.
    """
    command = [sys.executable, "-m", "shared.commands.serve", "--model", model, "--port", "0", "--log-format", "none"]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + patience_s
            while "  curl " not in (said := Path(log.name).read_text(errors="replace")):
                if process.poll() is not None or time.monotonic() > end:
                    # Read again: it may have said why just before it ended.
                    raise ValueError(f"the server has not started:\n{Path(log.name).read_text(errors='replace')}".rstrip())
                time.sleep(0.05)
            yield said.split("  curl ")[1].split()[0].removesuffix("/v1/completions")
        finally:
            # Its own session, so that Ctrl-C reaches only this process, which then ends the server's two.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.commands.agent", description="Ask a model that may call functions.")
    parser.add_argument("--ask", metavar="QUESTION", action="append", help="repeatable (default: three questions)")
    parser.add_argument("--model", metavar="DIR", help="or a hub id (default: pocket-tools); with --url, a model that the server lists (default: the first)")
    parser.add_argument("--url", type=server_url, help="of a server that runs already (default: start one)")
    choices = ("auto", "required", "none", *FUNCTIONS)
    parser.add_argument("--tool-choice", choices=choices, default="auto", help="in a question's first request (default: auto)")
    parser.add_argument("--max-tokens", type=int, default=500, help="per answer (default: 500)")
    args = parser.parse_args(argv)
    named = {"type": "function", "function": {"name": args.tool_choice}}
    try:
        with contextlib.nullcontext(args.url) if args.url else served(args.model or TOOLS_MODEL) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            # A server of our own has one model, under a name that it derives.
            model = args.url and args.model or first_model(client)
            asker = Asker(client, model, named if args.tool_choice in FUNCTIONS else args.tool_choice, args.max_tokens)
            answered = [asker.ask(question) for question in args.ask or QUESTIONS]
    except openai.APIConnectionError:
        print(f"error: no server answers at {url}", file=sys.stderr)
        return 2
    except CLIENT_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(answered) else 1


if __name__ == "__main__":
    run(main)
