"""`make agent`: a model that calls functions of ours, through a server that it starts and ends; and how `make chat` shows an answer's parts."""
import builtins
import json
import os
import re
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared.chapters import ROOT, last_with
from shared.checkpoints import checkpoint
from shared.commands import agent, chat
from shared.verify.serving import serving, wait_until


@pytest.fixture
def start(request):
    """Starts the command on pocket. It and all of its processes have a variable by which `processes` finds them."""
    if sys.platform != "linux":
        pytest.skip("the processes are read from /proc")
    name = f"AGENT_OF_{os.getpid()}_{request.node.name.partition('[')[0]}"

    def start(*arguments):
        command = [sys.executable, "-m", "shared.commands.agent", "--model", "pocket", *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | {name: "1", "OMP_NUM_THREADS": "1"}, **pipes))
        return started[-1]

    def processes():
        """The ids of those that run. Linux shows the variables with which a program was started."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                if f"{name}=1".encode() in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
            except OSError:
                pass
        return found

    started = []
    start.processes = processes
    yield start
    for pid in processes():
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.communicate()


def test_it_calls_a_function_sends_the_result_back_and_leaves_nothing_behind(start):
    """pocket calls nothing unless it has to: the first answer is forced, the second one is its own."""
    process = start("--tool-choice", "time", "--max-tokens", "200", "--ask", "How are you?")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), out
    lines = out.splitlines()
    assert lines[1:3] == ["you: How are you?", "call: time {}"]
    assert re.fullmatch(r"result: \d\d:\d\d", lines[3]) and lines[4].startswith("pocket: ")
    assert start.processes() == []


def test_when_it_is_ended_early_its_server_ends_too(start):
    process = start("--tool-choice", "add", "--max-tokens", "1500", "--ask", "What is 1 plus 1?")
    while line := process.stdout.readline():
        if line.startswith("you: "):
            break
    assert start.processes()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    wait_until(lambda: not start.processes(), 5)


def test_a_server_that_does_not_start_is_reported_with_what_it_said(start):
    process = start("--model", "no-such-model")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "the server has not started:\nerror: there is no checkpoint 'no-such-model'" in err
    assert start.processes() == []


@pytest.fixture(scope="module")
def url():
    chapter = last_with("tools")
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=2, max_model_len=1024)
    with serving(chapter, engine) as server:
        yield server.url


def test_the_arguments_reach_the_function_and_its_result_the_model(url, monkeypatch, capsys):
    heard = []
    monkeypatch.setitem(agent.FUNCTIONS, "time", lambda **arguments: heard.append(arguments) or "half past nine")
    assert agent.main(["--url", url, "--tool-choice", "time", "--max-tokens", "200", "--ask", "How are you?"]) == 0
    assert heard == [{}] and "call: time {}\nresult: half past nine\npocket: " in capsys.readouterr().out


def test_a_call_that_is_cut_off_is_not_run(url, monkeypatch, capsys):
    monkeypatch.setitem(agent.FUNCTIONS, "add", lambda **_: pytest.fail("it was called"))
    assert agent.main(["--url", url, "--tool-choice", "add", "--max-tokens", "60", "--ask", "What is 17 plus 25?"]) == 1
    out = capsys.readouterr().out
    assert 'call: add {"a": ' in out and out.endswith("\n(cut off by max_tokens)\n")


def test_a_url_where_nothing_listens_is_an_error(capsys):
    assert agent.main(["--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers at http://127.0.0.1:9" in capsys.readouterr().err


def chunk(finish_reason=None, **delta):
    empty = {"content": None, "tool_calls": None}
    return SimpleNamespace(choices=[SimpleNamespace(finish_reason=finish_reason, delta=SimpleNamespace(**empty | delta))])


def called(index, call_id, name, arguments):
    return SimpleNamespace(index=index, id=call_id, function=SimpleNamespace(name=name, arguments=arguments))


class Scripted:
    """A client that gets prepared streams, and notes the bodies."""

    def __init__(self, *streams):
        self.streams, self.bodies = list(streams), []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **body):
        self.bodies.append(body | {"messages": list(body["messages"])})
        return self

    def __enter__(self):
        return iter(self.streams.pop(0))

    def __exit__(self, *_):
        pass


def test_thought_text_and_calls_are_put_together_from_pieces_and_sent_back(capsys):
    client = Scripted(
        [
            chunk(reasoning_content="Two "),
            chunk(reasoning_content="calls."),
            chunk(content="Let me see."),
            chunk(tool_calls=[called(0, "c1", "add", "")]),
            chunk(tool_calls=[called(0, None, None, '{"a": 1, ')]),
            chunk(tool_calls=[called(0, None, None, '"b": 2}')]),
            chunk(tool_calls=[called(1, "c2", "multiply", "")]),
            chunk(tool_calls=[called(1, None, None, '{"a": 3, "b": 4}')]),
            chunk("tool_calls"),
        ],
        [chunk(content="3 and 12."), chunk("stop")],
    )
    assert agent.Asker(client, "m", "required", 50).ask("Compute.")
    assert capsys.readouterr().out.splitlines() == [
        *("", "you: Compute.", "thought: Two calls.", "m: Let me see."),
        *('call: add {"a": 1, "b": 2}', 'call: multiply {"a": 3, "b": 4}', "result: 3", "result: 12", "m: 3 and 12."),
    ]
    first, second = client.bodies
    assert (first["tool_choice"], second["tool_choice"]) == ("required", "auto")
    _, answer, *results = second["messages"]
    assert answer["reasoning_content"] == "Two calls." and answer["content"] == "Let me see."
    assert [call["id"] for call in answer["tool_calls"]] == ["c1", "c2"]
    assert results == [{"role": "tool", "tool_call_id": name, "content": value} for name, value in (("c1", "3"), ("c2", "12"))]


def test_a_model_that_only_calls_is_given_up_and_a_function_that_fails_is_a_result(capsys):
    wrong = [chunk(tool_calls=[called(0, "c", "add", '{"a": 1}')]), chunk("tool_calls")]
    client = Scripted(*[wrong] * agent.MOST_ROUNDS)
    assert not agent.Asker(client, "m", "auto", 50).ask("Compute.")
    out = capsys.readouterr().out
    assert out.count("result: error: ") == agent.MOST_ROUNDS and out.endswith("(no answer after 5 rounds of calls)\n")
    assert client.streams == []


@pytest.mark.parametrize("words", ["$5, `x` or $(HOME)?", "it's", "--help"])
def test_make_passes_a_question_as_it_was_typed_and_a_model_only_if_one_is_named(words):
    def made(*variables):
        # These tests may have been started by make, whose variables and messages concern only itself.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(["make", r"PYTHON=printf '<%s>\n'", "agent", *variables], cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.stdout.splitlines()

    assert made(f"ASK={words}") == ["<-m>", "<shared.commands.agent>", f"<--ask={words}>"]
    assert made("MODEL=pocket")[2:] == ["<--model>", "<pocket>"]


def dies(*chunks):
    """A stream whose server dies after these chunks."""
    yield from chunks
    raise agent.httpx.RemoteProtocolError("peer closed connection")


def test_an_answer_that_breaks_off_ends_its_line_before_the_error(capsys):
    with pytest.raises(agent.httpx.RemoteProtocolError):
        agent.Asker(Scripted(dies(chunk(content="Hel"))), "m", "auto", 50).ask("Hi")
    assert capsys.readouterr().out == "\nyou: Hi\nm: Hel\n"


def test_with_a_url_the_model_is_the_one_that_is_asked_for(url, capsys):
    assert agent.main(["--url", url, "--model", "another", "--ask", "Hi"]) == 2
    assert "'another'" in capsys.readouterr().err


def test_a_chat_shows_thoughts_and_cuts_and_keeps_only_answers(monkeypatch, capsys):
    said = iter(["one", "two", "three", "four", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _prompt: next(said))
    client = Scripted(
        [chunk(reasoning_content="Hm"), chunk(reasoning_content=", one."), chunk(content="Fi"), chunk(content="rst."), chunk("stop")],
        [chunk(reasoning_content="Hm, two"), chunk("length")],
        dies(chunk(content="Th")),
        [chunk(content="Fourth"), chunk("length")],
    )
    chat.talk(client, "m", 0.0, 50)
    undone = "your last message is removed from the conversation"
    assert capsys.readouterr().out.splitlines() == [
        *("thought: Hm, one.", "m: First."),
        *("thought: Hm, two", "(cut off by max_tokens)", f"(nothing is said; {undone})"),
        *("m: Th", f"error: peer closed connection; {undone}"),
        *("m: Fourth", "(cut off by max_tokens)"),
    ]
    asked = [[message["content"] for message in body["messages"]] for body in client.bodies]
    assert asked == [["one"], ["one", "First.", "two"], ["one", "First.", "three"], ["one", "First.", "four"]]


@pytest.mark.parametrize("listed", [{"data": []}, {"data": None}, [], "x", {"data": [{"name": "no id"}]}], ids=str)
def test_a_server_that_lists_no_models_is_reported(listed, monkeypatch, capsys):
    """Whatever it is, it answers 200."""

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            raw = json.dumps(listed).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert chat.main(["--url", url]) == 2 and agent.main(["--url", url]) == 2
        assert capsys.readouterr().err.count("is not an OpenAI server, or lists no model") == 2
        server.shutdown()
