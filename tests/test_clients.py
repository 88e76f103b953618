"""The load generator and the terminal chat, against a server in this process."""
import asyncio
import builtins

import openai
import pytest

from shared.bench import load
from shared.checkpoints import checkpoint
from shared.commands import chat
from shared.verify.serving import serving

pytestmark = pytest.mark.needs("serve")


@pytest.fixture(scope="session")
def server(chapter, engine_way):
    engine = chapter.load().Engine(checkpoint("pocket"), max_num_seqs=8, max_model_len=256)
    with serving(chapter, engine, **({"max_waiting": 8} if "openai" in chapter.capabilities else {})) as server:
        yield server


def measure(server, count, **how):
    return asyncio.run(load.run(server.url, load.workload(count, 1, "pocket"), how.get("connections"), how.get("rate"), None, 1))


@pytest.mark.parametrize("how", [{"connections": 3}, {"rate": 60.0}])
def test_a_loop_closed_or_open_counts_every_token_and_orders_its_times(server, how):
    result = measure(server, 7, **how)
    assert (result["requests"], result["failed"], result["errors"]) == (7, 0, [])
    wanted = sum(body["max_tokens"] for body in load.workload(7, 1, "pocket"))
    assert result["tokens_per_s"] * result["seconds"] == pytest.approx(wanted, rel=0.05)
    for times in (result[name] for name in ("ttft_ms", "tpot_ms", "itl_ms", "total_ms")):
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    assert result["ttft_ms"]["p50"] < result["total_ms"]["p50"]


@pytest.mark.needs("openai")
def test_a_failed_request_is_reported_and_in_no_percentile(server):
    """More requests at once than the queue holds, and a model that is not served."""
    bodies = [body | {"n": 4} for body in load.workload(6, 1, "pocket")] + [{"model": "nobody", "prompt": "x"}]
    result = asyncio.run(load.run(server.url, bodies, 7, None, None, 1))
    assert result["failed"] >= 2
    assert any(error.startswith("429: ") for error in result["errors"])
    assert any(error.startswith("404: ") for error in result["errors"])


def test_wrong_flags_are_refused(capsys):
    for argv in (["--rate", "1", "--connections", "2"], ["--requests", "0"], ["--rate", "-1"], ["--url", "http://127.0.0.1:9"]):
        with pytest.raises(SystemExit):
            load.main(argv)
    assert "no OpenAI server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_the_load_generator_ends_with_the_number_of_the_failed(server, capsys, tmp_path):
    file = tmp_path / "result.json"
    assert load.main(["--url", server.url, "--requests", "3", "--connections", "2", "--json", str(file)]) == 0
    assert "3 requests in" in capsys.readouterr().out and '"ttft_ms"' in file.read_text()


@pytest.mark.needs("openai")
def test_a_chat_remembers_and_forgets(server, monkeypatch, capsys):
    said = iter(["What is a KV cache?", "", "And a block table?", "/new", "What is a KV cache?", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _prompt: next(said))
    asked = []
    create = openai.resources.chat.Completions.create

    def spy(self, **options):
        asked.append([message["content"] for message in options["messages"]])
        return create(self, **options)

    monkeypatch.setattr(openai.resources.chat.Completions, "create", spy)
    assert chat.main(["--url", server.url, "--temperature", "0"]) == 0
    assert [len(each) for each in asked] == [1, 3, 1] and asked[1][0] == "What is a KV cache?" and len(asked[1][1]) > 10
    assert asked[1][1] in capsys.readouterr().out


@pytest.mark.needs("openai")
def test_an_error_in_a_chat_takes_the_message_back_and_a_missing_server_is_reported(server, monkeypatch, capsys):
    said = iter(["x " * 300, "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _prompt: next(said))
    assert chat.main(["--url", server.url]) == 0
    assert "your last message is removed from the conversation" in capsys.readouterr().out
    assert chat.main(["--url", "http://127.0.0.1:9"]) == 2
    assert "start one with `make serve`" in capsys.readouterr().err


@pytest.mark.needs("openai")
def test_ctrl_c_before_an_answer_begins_keeps_the_conversation(server, monkeypatch, capsys):
    said = iter(["What is a KV cache?", "And a block table?", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _prompt: next(said))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(openai.resources.chat.Completions, "create", interrupted)
    assert chat.main(["--url", server.url]) == 0
    assert capsys.readouterr().out.count("your last message is removed from the conversation") == 2
