"""v10: the engine in a process of its own."""
import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from functools import partial

import httpx
import pytest

from shared.bench.served import Served, processes_of
from shared.chapters import ROOT
from shared.checkpoints import POCKET
from shared.verify.killing import kill
from shared.verify.serving import runner_of, serving, wait_until
from tests.support.fake_engine import FakeEngine
from tests.support.http import HTTP

ENGINE_FILES = ["backends.py", "batch.py", "cache.py", "config.py", "engine.py", "layers.py", "loader.py", "model.py", "sampling.py"]
FRONT_FILES = ["chat.py", "completions.py", "errors.py", "gate.py", "protocol.py", "responses.py", "streaming.py"]


@pytest.mark.until("v11")
def test_engine_and_endpoints_are_the_last_chapters(chapter):
    for name in [*ENGINE_FILES, *FRONT_FILES, "engine_loop.py", "engine_thread.py"]:
        assert (chapter.path / name).read_bytes() == (chapter.previous.path / name).read_bytes(), name


# ---- messages


@pytest.fixture
def fake(chapter, make_engine):
    return FakeEngine(chapter, make_engine("pocket").tokenizer, places=64)


class Wire:
    """The server's end of a socket, whose other end a test holds."""

    def __init__(self, module):
        self.runner = module.EngineProcess.__new__(module.EngineProcess)
        self.runner.socket, self.end = socket.socketpair()
        self.runner.silent_s, self.runner.stopping = 0.0, False
        self.runner.process = type("Process", (), {"join": lambda *_: None, "kill": lambda *_: None, "exitcode": 0})()
        self.received = []

    def receive(self, message, stats):
        self.received.append((message, stats))


def behind_a_socket(process, engine):
    """The server's end of a socket; at the other end, a thread does what the engine process would."""
    ours, its = socket.socketpair()
    process.leave = sys.exit
    threading.Thread(target=process.run_engine, args=(its, lambda: engine), daemon=True).start()
    assert isinstance(process.receive_message(ours)[0], process.Ready)
    return ours


@pytest.mark.parametrize("streams", [1, 16, 64])
def test_a_step_is_one_message_however_many_run(chapter, Params, module, fake, streams):
    """Counted on the socket, after all that the chapter does to a message."""
    process, loop = module("engine_process"), module("engine_loop")
    ours = behind_a_socket(process, fake)
    fake.gate.clear()
    # The first may be in a step before the others arrive; that step is held until they have.
    for call_id in range(streams):
        ours.sendall(process.packed(loop.Add(call_id, [([20] * 5, Params(max_tokens=5))])))
    time.sleep(0.1)
    fake.gate.set()
    messages = []
    while sum(len(each.outputs) for each in messages if isinstance(each, loop.Stepped)) < 5 * streams:
        messages.append(process.receive_message(ours)[0])
    steps = [len(each.outputs) for each in messages if isinstance(each, loop.Stepped)]
    assert 5 <= len(steps) <= 6 and max(steps) >= streams - 1
    ours.close()


def test_messages_arrive_whole_and_in_order_wherever_the_bytes_are_cut(chapter, module):
    """A read may end in the middle of a length, or return the end of one message with the whole next one."""
    process, loop, outputs = module("engine_process"), module("engine_loop"), module("outputs")
    stats = outputs.Stats(1, 2, 3, 4)
    sent = [(loop.Added(1), stats), (loop.Stepped([(1, 0, outputs.StepOutput(1, 7, "é" * 50_000, None, None))]), stats)]
    sent += [(loop.Aborted(number), stats) for number in range(50)]
    data = b"".join(map(process.packed, sent))
    for cuts in ([1] * 60 + [len(data)], [3, 5, 100_000, 1, len(data)], [len(data)]):
        wire = Wire(process)

        async def cross():
            await wire.runner.start(wire.receive)
            place = 0
            for cut in cuts:
                piece, place = data[place : place + cut], place + cut
                await asyncio.to_thread(wire.end.sendall, piece)
                await asyncio.sleep(0.001)
            while len(wire.received) < len(sent):
                await asyncio.sleep(0.001)
            wire.runner.stopping = True
            wire.end.close()
            await wire.runner.reading

        asyncio.run(asyncio.wait_for(cross(), 10))
        assert wire.received == sent
        # And in the other direction, where a thread reads.
        ours, its = socket.socketpair()
        found = []
        reader = threading.Thread(target=lambda: found.extend(iter(partial(process.receive_message, its), None)))
        reader.start()
        place = 0
        for number, cut in enumerate(cuts):
            # The first pieces are read before the next ones arrive.
            time.sleep(0.02 if number < 4 else 0)
            ours.sendall(data[place : place + cut])
            place += cut
        ours.close()
        reader.join(10)
        assert found == sent


@pytest.mark.parametrize("kept", [0, 2, 9])
def test_a_message_that_is_cut_off_by_the_end_is_no_message(chapter, module, kept):
    process = module("engine_process")
    ours, its = socket.socketpair()
    ours.sendall(process.packed(("whole",)) + process.packed(("cut off",))[:kept])
    ours.close()
    assert process.receive_message(its) == ("whole",) and process.receive_message(its) is None


def test_a_message_is_small(chapter, module):
    """64 tokens: named tuples of numbers and strings, with their class named once."""
    process, loop, outputs = module("engine_process"), module("engine_loop"), module("outputs")
    step = loop.Stepped([(call_id, 0, outputs.StepOutput(call_id, 300, " word", None, None)) for call_id in range(64)])
    data = process.packed((step, outputs.Stats(64, 0, 10, 100)))
    assert struct.unpack("!I", data[:4]) == (len(data) - 4,) and len(data) < 64 * 40


@pytest.mark.until("v11")
def test_the_text_tells_how_many_bytes_cross(chapter, Params, module):
    process, loop, outputs = module("engine_process"), module("engine_loop"), module("outputs")
    stats = outputs.Stats(1, 0, 8190, 8192)

    def step(number, reason=None):
        word = " there" if reason is None else " was"
        return loop.Stepped([(each, 0, outputs.StepOutput(each, 300, word, None, reason)) for each in range(1, number + 1)]), stats

    text = chapter.text.read_text()
    add = loop.Add(1, [([0, 419, 414, 265, 333], Params(max_tokens=2))])
    for message in (add, (loop.Added(1), stats), step(1), step(1, "length"), (process.Alive(), None)):
        assert f"| {len(process.packed(message))} |" in text, message
    sizes = [len(process.packed(step(number))) for number in (16, 64)]
    assert f"With 16 streams a step's message takes {sizes[0]} bytes, and with 64 streams {sizes[1]:,}." in text, sizes


def test_an_abort_does_not_overtake_its_add(chapter, Params, module):
    process, loop = module("engine_process"), module("engine_loop")
    wire = Wire(process)

    async def send():
        await wire.runner.start(wire.receive)
        for call_id in range(20):
            wire.runner.send(loop.Add(call_id, [([20] * 5000, Params(max_tokens=5))]))
            wire.runner.send(loop.Abort(call_id))
        read = [(await asyncio.to_thread(process.receive_message, wire.end)) for _ in range(40)]
        assert [(type(each).__name__, each.call_id) for each in read] == [(name, i) for i in range(20) for name in ("Add", "Abort")]
        wire.runner.stopping = True
        wire.end.close()
        await wire.runner.reading

    asyncio.run(asyncio.wait_for(send(), 10))


# ---- which side waits


def test_the_event_loop_never_waits_for_an_engine_that_reads_nothing(chapter, Params, module):
    process, loop = module("engine_process"), module("engine_loop")
    wire = Wire(process)
    # A call that waits would wait forever.
    rescue = threading.Timer(5, wire.end.shutdown, [socket.SHUT_RDWR])
    rescue.start()

    async def send():
        await wire.runner.start(wire.receive)
        start = time.monotonic()
        for call_id in range(50):
            wire.runner.send(loop.Add(call_id, [([20] * 20_000, Params(max_tokens=5))]))
        assert time.monotonic() - start < 1
        rescue.cancel()
        wire.runner.stopping = True
        reading = asyncio.create_task(asyncio.to_thread(lambda: [process.receive_message(wire.end) for _ in range(50)]))
        assert [each.call_id for each in await reading] == list(range(50))
        wire.end.close()
        await wire.runner.reading

    asyncio.run(asyncio.wait_for(send(), 20))


def test_an_engine_whose_server_reads_nothing_waits_and_holds_nothing(chapter, Params, module, fake):
    """It stops in the middle of a step's message and continues when the server reads again; nothing is lost."""
    process, loop = module("engine_process"), module("engine_loop")
    ours = behind_a_socket(process, fake)
    steps, step = [], fake.step
    fake.step = lambda: steps.append(None) or step()
    ours.sendall(process.packed(loop.Add(1, [([20] * 30_000, Params(max_tokens=30_000))])))
    waits_at = None
    while waits_at != len(steps) or not steps:
        waits_at = len(steps)
        time.sleep(0.3)
    assert len(steps) < 20_000
    tokens = 0
    while tokens < 30_000:
        message, _ = process.receive_message(ours)
        tokens += len(getattr(message, "outputs", ()))
    ours.close()


# ---- a hung engine, and a slow one


def test_a_hung_engine_is_noticed_and_a_long_step_is_not_a_hang(chapter, module, fake, monkeypatch):
    process = module("engine_process")
    monkeypatch.setattr(process, "ALIVE_S", 0.05)
    monkeypatch.setattr(process, "SILENCE_S", 0.5)
    body = {"model": "pocket", "prompt": [20, 21], "max_tokens": 2}
    fake.gate.clear()
    with serving(chapter, fake) as server:
        threading.Timer(1.5, fake.gate.set).start()
        assert HTTP.post(f"{server.url}/v1/completions", json=body).status_code == 200
    monkeypatch.setattr(process, "say_alive", lambda channel: None)
    fake.gate.clear()
    with serving(chapter, fake) as server:
        answer = HTTP.post(f"{server.url}/v1/completions", json=body, timeout=10)
        assert answer.status_code == 500
        assert "the engine's process said nothing for" in answer.json()["error"]["message"]
        health = HTTP.get(f"{server.url}/health")
        assert health.status_code == 503 and health.json().pop("status") == "dead"
        assert all(count == 0 for name, count in health.json().items() if name != "status")
        wait_until(lambda: server.should_exit, 4)
        fake.gate.set()


def test_an_engine_that_does_not_stop_in_time_is_killed(module):
    """In the middle of a step it reads no message."""
    wire, killed = Wire(module("engine_process")), []

    def kill():
        killed.append(True)
        wire.end.close()

    wire.runner.process.kill = kill

    async def stop():
        await wire.runner.start(wire.receive)
        assert not killed
        await asyncio.wait_for(wire.runner.stop(0.1), 5)

    asyncio.run(stop())
    assert killed


def test_a_killed_process_that_does_not_end_holds_up_nobody(module, monkeypatch):
    """SIGKILL waits while a process is in a driver, and its end of the socket stays open."""
    process = module("engine_process")
    monkeypatch.setattr(process, "END_S", 0.2)
    monkeypatch.setattr(process, "ALIVE_S", 0.05)
    monkeypatch.setattr(process, "SILENCE_S", 0.2)
    silent, stopped = Wire(process), Wire(process)

    async def end():
        await silent.runner.start(silent.receive)
        while not silent.received:
            await asyncio.sleep(0.05)
        monkeypatch.setattr(process, "SILENCE_S", 60)
        await stopped.runner.start(stopped.receive)
        await stopped.runner.stop(0.1)

    asyncio.run(asyncio.wait_for(end(), 5))
    [(died, _)] = silent.received
    assert isinstance(died, module("engine_loop").Died) and "said nothing for" in died.reason and not stopped.received


def test_time_in_which_the_server_was_suspended_is_not_silence(chapter, module, monkeypatch):
    """Its clock went on, and the engine's messages of that time are in the socket."""
    process = module("engine_process")
    monkeypatch.setattr(process, "ALIVE_S", 0.05)
    monkeypatch.setattr(process, "SILENCE_S", 0.5)
    wire, ended, killed = Wire(process), threading.Event(), []
    wire.runner.process.kill = lambda: killed.append(time.monotonic())

    def say_alive():
        while not ended.wait(0.05):
            wire.end.sendall(process.packed((process.Alive(), None)))

    async def stand_still():
        await wire.runner.start(wire.receive)
        speaker = threading.Thread(target=say_alive)
        speaker.start()
        await asyncio.sleep(0.2)
        time.sleep(1)
        await asyncio.sleep(0.4)
        assert not killed and not wire.received
        ended.set()
        speaker.join()
        await asyncio.sleep(1)
        assert killed
        wire.runner.stopping = True
        wire.end.close()
        await wire.runner.reading

    asyncio.run(asyncio.wait_for(stand_still(), 10))


# ---- two processes


def run(chapter, code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.whole
def test_the_servers_modules_import_no_torch(chapter):
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module('milestones.{chapter.name}.{name}')\n" for name in ("process", "service", "__main__", "engine_process")
    )
    done = run(chapter, code + "print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_a_dying_engines_last_messages_are_read_although_the_server_wrote_meanwhile(chapter, module, fake, monkeypatch):
    """The event loop may be busy while the engine dies, and send a request before it reads."""
    loop, left = module("engine_loop"), []
    monkeypatch.setattr(fake, "step", lambda: 1 / 0)
    monkeypatch.setattr(fake, "fail_step", lambda: [])
    monkeypatch.setattr(module("engine_process"), "ALIVE_S", 0.1)
    runner, received = runner_of(chapter, fake), []
    monkeypatch.setattr(module("engine_process"), "leave", lambda code: (left.append(code), sys.exit()))
    call = [([20, 21], module("params").SamplingParams(max_tokens=2))]

    async def die():
        await runner.start(lambda message, _stats: received.append(message))
        runner.send(loop.Add(1, call))
        await asyncio.sleep(0)
        time.sleep(0.5)
        # It must not end before its last messages are read, although Alive cannot be sent any more.
        assert not left
        runner.send(loop.Add(2, call))
        await runner.reading

    asyncio.run(asyncio.wait_for(die(), 10))
    assert [type(message) for message in received] == [loop.Added, loop.Died] and "ZeroDivisionError" in received[-1].reason


@pytest.mark.whole
def test_a_file_that_cannot_be_read_is_said_in_one_line(chapter):
    """A name may be too long for the file system, or a folder closed to this user."""
    done = subprocess.run(
        [sys.executable, "-m", f"milestones.{chapter.name}", "serve", "--model", "a" * 300], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "File name too long" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.whole
@pytest.mark.parametrize("model_dir", ["nowhere", str(POCKET)])
def test_what_the_engine_refuses_at_its_start_is_said_as_before(chapter, module, model_dir):
    process = module("engine_process")
    runner = process.EngineProcess(partial(process.load_engine, model_dir, block_size=0))
    with pytest.raises(ValueError) as caught:
        runner.wait_until_ready()
    in_one_process = pytest.raises(ValueError, chapter.load().Engine, model_dir, block_size=0)
    assert str(caught.value) == str(in_one_process.value)


def test_a_process_that_ends_before_it_is_ready_is_an_error_and_not_a_wait(chapter, module):
    process = module("engine_process")
    with pytest.raises(ValueError, match=r"has ended \(exit code 7\) before it was ready"):
        process.EngineProcess(partial(os._exit, 7)).wait_until_ready()


@pytest.mark.whole
def test_bytes_that_are_no_message_end_both_sides(chapter, module):
    """A bug must not leave a process that no longer reads: the engine ends, and the server notices."""
    process, loop = module("engine_process"), module("engine_loop")
    runner = process.EngineProcess(partial(process.load_engine, POCKET)).wait_until_ready()

    async def write_nonsense():
        received = asyncio.Queue()
        await runner.start(lambda message, stats: received.put_nowait(message))
        runner.writer.write(struct.pack("!I", 3) + b"abc")
        assert await received.get() == loop.Died("the engine's process has ended (exit code 1)")
        # And in the other direction.
        wire = Wire(process)
        await wire.runner.start(wire.receive)
        wire.end.sendall(struct.pack("!I", 3) + b"abc")
        await wire.runner.reading
        assert [message for message, _ in wire.received] == [loop.Died("the engine's process has ended (exit code 0)")]

    asyncio.run(asyncio.wait_for(write_nonsense(), 20))


@pytest.mark.whole
@pytest.mark.parametrize(("number", "said"), [(signal.SIGSEGV, "SIGSEGV"), (35, "exit code -35")])
def test_the_engines_death_is_reported_and_logged_whatever_its_signal(chapter, module, caplog, number, said):
    """Only the first and the last of the real-time signals have names."""
    process, loop = module("engine_process"), module("engine_loop")
    runner = process.EngineProcess(partial(process.load_engine, POCKET)).wait_until_ready()
    files = len(os.listdir("/proc/self/fd"))

    async def die():
        received = asyncio.Queue()
        await runner.start(lambda message, stats: received.put_nowait(message))
        os.kill(runner.process.pid, number)
        assert await received.get() == loop.Died(f"the engine's process has ended ({said})")

    asyncio.run(asyncio.wait_for(die(), 20))
    assert f"the engine's process has ended ({said})" in caplog.text
    assert len(os.listdir("/proc/self/fd")) < files


def test_a_death_with_an_unknown_exit_code_is_reported(chapter, module):
    """A process that ignores SIGCHLD does not learn how its children ended."""
    process, loop = module("engine_process"), module("engine_loop")
    wire = Wire(process)
    wire.runner.process.exitcode = None

    async def die():
        await wire.runner.start(wire.receive)
        wire.end.close()
        await wire.runner.reading

    asyncio.run(asyncio.wait_for(die(), 10))
    assert [message for message, _ in wire.received] == [loop.Died("the engine's process has ended (exit code None)")]


class InterruptedStart:
    """Sends this process a Ctrl-C when it is pickled, in the middle of a process's start."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGINT)
        return int, ()


@pytest.mark.whole
def test_ctrl_c_while_the_process_starts_leaves_nothing(chapter):
    # A shell lets what it runs in the background ignore Ctrl-C.
    code = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from milestones.{chapter.name}.engine_process import EngineProcess\n"
    code += "from tests.claims.test_v10 import InterruptedStart\nEngineProcess(InterruptedStart())"
    done = run(chapter, code)
    assert "KeyboardInterrupt" in done.stderr and done.returncode != 0


@pytest.mark.whole
def test_a_second_signal_ends_a_hung_engine_too(chapter):
    with Served(chapter) as served, served.stream({"prompt": "Once", "max_tokens": 2000}) as lines:
        next(lines)
        os.kill(served.pids["engine"], signal.SIGSTOP)
        os.kill(served.pids["server"], signal.SIGTERM)
        time.sleep(0.3)
        os.kill(served.pids["server"], signal.SIGTERM)
        assert served.wait(5) == 1
        wait_until(lambda: not processes_of(served), 3)


@pytest.fixture(scope="module")
def served(chapter):
    with Served(chapter) as served:
        yield served


@pytest.mark.whole
def test_the_server_has_no_torch_and_the_engine_no_http_after_they_have_answered(served):
    served.ask({"prompt": "Once", "max_tokens": 5, "logprobs": 2, "echo": True}).raise_for_status()
    maps = {name: open(f"/proc/{pid}/maps").read() for name, pid in served.pids.items()}
    assert "libtorch" in maps["engine"] and "libtorch" not in maps["server"]
    # FastAPI's.
    assert "pydantic_core" in maps["server"] and "pydantic_core" not in maps["engine"]
    threads = {name: len(os.listdir(f"/proc/{pid}/task")) for name, pid in served.pids.items()}
    assert threads["engine"] >= 3


@pytest.mark.whole
def test_signals_to_the_engine_alone_change_nothing(served):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(served.pids["engine"], number)
    time.sleep(0.2)
    assert served.ask({"prompt": "Once", "max_tokens": 5}).status_code == 200


@pytest.mark.whole
def test_a_server_that_was_suspended_keeps_its_engine(served):
    with served.stream({"prompt": "Once", "max_tokens": 300}) as lines:
        next(lines)
        os.kill(served.pids["server"], signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(served.pids["server"], signal.SIGCONT)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]


@pytest.mark.whole
def test_when_the_engine_is_killed_every_client_gets_an_error_at_once_and_the_server_exits_1(chapter):
    with Served(chapter) as served:
        told = kill(served, "engine", streams=8, after_s=0.3, patience_s=5)
        assert told.answered + told.failed == 8 and told.hung == 0 and told.failed
        assert told.seconds_to_answer < 1 and told.seconds_to_end < 5 and told.exit_code == 1
        assert "has ended (SIGKILL)" in told.error
        assert not processes_of(served)


@pytest.mark.whole
def test_a_request_that_the_engine_has_not_answered_fails_when_it_dies(chapter):
    with Served(chapter) as served:
        os.kill(served.pids["engine"], signal.SIGSTOP)
        told = kill(served, "engine", streams=3, after_s=0.5, patience_s=5)
        assert (told.answered, told.failed, told.hung) == (0, 3, 0)
        assert told.seconds_to_answer < 1 and "has ended (SIGKILL)" in told.error


@pytest.mark.whole
def test_nothing_is_left_of_a_killed_server(chapter):
    with Served(chapter) as served:
        told = kill(served, "server", streams=8, after_s=0.3, patience_s=5)
        assert told.hung == 0 and not processes_of(served)


@pytest.mark.whole
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.whole)])
def test_ctrl_c_reaches_both_processes_and_the_answers_finish(chapter, number):
    with Served(chapter) as served:
        with served.stream({"prompt": "Once", "max_tokens": 200}) as lines:
            next(lines)
            os.killpg(served.pids["server"], number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
        assert served.wait(15) == 0 and "Traceback" not in served.said()
        # multiprocessing's resource tracker ends a moment after the server.
        wait_until(lambda: not processes_of(served), 5)


@pytest.mark.whole
def test_a_script_that_never_stops_its_engine_exits(chapter):
    """At exit, multiprocessing sends SIGTERM to its children and waits for them."""
    module = f"milestones.{chapter.name}.engine_process"
    code = f"from {module} import EngineProcess, load_engine\nfrom functools import partial\n"
    code += f"runner = EngineProcess(partial(load_engine, {str(POCKET)!r})).wait_until_ready()\nprint(runner.process.pid)"
    done = run(chapter, code)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: not os.path.exists(f"/proc/{int(done.stdout)}"), 5)


@pytest.mark.whole
def test_what_the_engine_prints_is_no_message_although_stderr_is_closed(chapter):
    """As a daemon may start it. The socket to the engine must not get stderr's number."""
    module = f"milestones.{chapter.name}.engine_process"
    code = f"import os\nos.close(0)\nos.close(2)\nfrom {module} import EngineProcess, load_engine\nfrom functools import partial\n"
    code += f"print(EngineProcess(partial(load_engine, {str(POCKET)!r})).wait_until_ready().name)"
    assert run(chapter, code).stdout == "pocket\n"


@pytest.mark.whole
def test_a_server_that_cannot_begin_takes_its_engine_with_it(chapter):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        with Served(chapter, "--port", port, wait=False) as served:
            assert served.wait(20) == 2
            assert f"cannot listen on 127.0.0.1:{port}" in served.said()
            wait_until(lambda: not processes_of(served), 5)


# ---- large requests of other clients

TURN = {"role": "user", "content": "a"}
LARGEST = {
    "chat": ("/v1/chat/completions", {"messages": [TURN], "n": 128, "max_tokens": 60, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}),
    "chat streamed": ("/v1/chat/completions", {"messages": [TURN], "n": 128, "max_tokens": 40, "logprobs": True, "top_logprobs": 20, "stream": True}),
    "completions": ("/v1/completions", {"prompt": ["a", "b"], "n": 128, "max_tokens": 60, "logprobs": 5, "ignore_eos": True}),
    "echo": ("/v1/completions", {"prompt": [[9 + i] * 1500 for i in range(16)], "max_tokens": 1, "logprobs": 5, "echo": True}),
    "response": ("/v1/responses", {"input": "a", "include": ["message.output_text.logprobs"], "top_logprobs": 20}),
    "messages": ("/tokenize", {"messages": [TURN] * 2000}),
    "text": ("/tokenize", {"prompt": "a b " * 30_000}),
    "token strings": ("/tokenize", {"prompt": "a b " * 500, "return_token_strs": True}),
    "tokens": ("/detokenize", {"tokens": [9] * 2048}),
}


@pytest.fixture(scope="module")
def served(chapter):
    with Served(chapter) as served:
        yield served


@pytest.mark.whole
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.whole] * (kind not in ("chat", "messages"))) for kind in LARGEST])
def test_no_request_waits_for_another_clients_largest_one(served, kind):
    """Over 200 probes of /health beside it, the 95th percentile grows by less than 50 ms."""
    path, body = LARGEST[kind]
    sent = json.dumps({"model": "pocket"} | body)

    def slowest(count):
        found = []
        while len(found) < count or (asking and any(thread.is_alive() for thread in asking)):
            begun = time.perf_counter()
            assert HTTP.get(f"{served.url}/health").status_code == 200
            found.append(time.perf_counter() - begun)
            time.sleep(0.005)
        return sorted(found)[int(len(found) * 0.95)]

    def ask():
        while not enough.is_set():
            with httpx.stream("POST", f"{served.url}{path}", content=sent, headers={"content-type": "application/json"}, timeout=120) as answer:
                statuses.add(answer.status_code)
                for _ in answer.iter_raw(1 << 20):
                    pass

    # The machine may be busy with something else for a while.
    for _ in range(3):
        asking, statuses = [], set()
        before = slowest(200)
        enough = threading.Event()
        asking = [threading.Thread(target=ask)]
        asking[0].start()
        threading.Timer(1.5, enough.set).start()
        beside = slowest(200)
        asking[0].join()
        assert statuses == {200}
        if beside < before + 0.05:
            return
    raise AssertionError(f"{kind}: {1000 * before:.0f} ms before, {1000 * beside:.0f} ms beside it")
