"""The command line: what it prints and where, and its errors."""
import importlib
import os
import shutil
from pathlib import Path

import pytest

from shared.chapters import ROOT
from shared.checkpoints import checkpoint
from tests.support.started import Started

pytestmark = pytest.mark.needs("command_line", "chat")


@pytest.fixture
def run(module, capsys):
    """main(argv) in this process: its exit code, stdout and stderr."""

    def run(*argv):
        capsys.readouterr()  # the output of engines that the test created before
        try:
            code = module("__main__").main(list(argv))
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def llama(*argv):
    return ("generate", *argv, "--model", str(checkpoint("llama")))


def test_generate_prints_the_texts_in_order(run, make_engine, Params):
    texts = [out.text for out in make_engine("llama").generate(["The cache", "A queue"], Params(max_tokens=9))]
    code, out, err = run(*llama("The cache", "A queue", "--max-tokens", "9"))
    assert (code, out) == (0, "".join(text + "\n" for text in texts))
    assert err.count("\n") == 1  # the settings in use


def test_stream_prints_the_same(run):
    arguments = ("The cache", "A queue", "A", "--max-tokens", "15", "--temperature", "0.8", "--seed", "3")
    assert run(*llama(*arguments))[:2] == run(*llama(*arguments, "--stream"))[:2]


def test_stream_prints_as_tokens_come(module, make_engine, Params, capsys, monkeypatch):
    """Each piece is flushed before the next token is computed."""
    engine = make_engine("llama")
    printed = []
    step = engine.step

    def watched_step():
        printed.append(capsys.readouterr().out)
        return step()

    monkeypatch.setattr(engine, "step", watched_step)
    module("__main__").stream_texts(engine, [[9, 10]], Params(max_tokens=12, ignore_eos=True))
    assert sum(bool(piece) for piece in printed) > 4


def test_every_sampling_flag_reaches_the_engine(run, make_engine, Params):
    params = Params(max_tokens=21, temperature=1.1, top_k=40, top_p=0.9, seed=12)
    [want] = make_engine("llama").generate(["The cache"], params)
    flags = "--max-tokens 21 --temperature 1.1 --top-k 40 --top-p 0.9 --seed 12".split()
    assert run(*llama("The cache", *flags))[1] == want.text + "\n"


def test_stats_say_what_the_run_cost(run):
    code, _, err = run(*llama("The cache", "--max-tokens", "5", "--stats"))
    assert code == 0
    assert "5 tokens in" in err and "tokens/s" in err and "forward passes over" in err


def test_chat_wraps_the_prompt_in_the_template(run, make_engine, module, Params):
    engine = make_engine("pocket")
    prompt_ids = module("text").encode_chat(engine.tokenizer, [{"role": "user", "content": "What is paging?"}])
    [want] = engine.generate([prompt_ids], Params(max_tokens=60))
    code, out, _ = run("generate", "What is paging?", "--chat", "--max-tokens", "60", "--model", str(checkpoint("pocket")))
    assert (code, out) == (0, want.text + "\n")


def test_without_a_model_it_takes_the_variables_then_the_bundled_model(run, monkeypatch, module, tmp_path):
    monkeypatch.setenv("STEPSERVE_MODEL", str(checkpoint("llama")))
    assert run("generate", "A", "--max-tokens", "1")[2].startswith("llama-")
    monkeypatch.delenv("STEPSERVE_MODEL")
    main = module("__main__")
    root = Path(main.__file__).parents[2]
    assert main.POCKET.relative_to(root) == checkpoint("pocket").relative_to(ROOT)
    # A copy of a chapter with a planted bug is not in a repository.
    monkeypatch.setattr(main, "POCKET", checkpoint("pocket"))
    assert run("generate", "A", "--max-tokens", "1")[2].startswith("pocket: ")
    monkeypatch.setattr(main, "POCKET", tmp_path / "nowhere")
    assert run("generate", "A")[::2] == (
        2,
        "error: no model: give --model DIR, or set STEPSERVE_MODEL to a checkpoint directory\n",
    )


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("generate", "A", "--model", "/nowhere"), "error: /nowhere is not a checkpoint: it has no config.json\n"),
        (llama("A", "--temperature", "-1"), "error: temperature must be a number from 0 (greedy) to 1e30, got -1.0\n"),
        (llama("A", "--max-tokens", "0"), "error: max_tokens must be an integer from 1 up or None, got 0\n"),
        (llama("A", "--device", "mps"), "error: device mps is not supported"),
        (llama("A", "--dtype", "int8"), "invalid choice: 'int8'"),
        (llama(), "the following arguments are required: PROMPT"),
        (llama("A", "--warp", "9"), "unrecognized arguments: --warp 9"),
        ((), "the following arguments are required: COMMAND"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(run, argv, sentence):
    code, out, err = run(*argv)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err and out == ""


def test_a_chapter_runs_on_its_own_somewhere_else(chapter, tmp_path):
    """Copied out of the repository and started as a process, without the repository on the path."""
    place = tmp_path / "some where"
    shutil.copytree(chapter.load().__path__[0], place / chapter.name, ignore=shutil.ignore_patterns("__pycache__"))
    model = place / "model"
    shutil.copytree(checkpoint("llama"), model)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "STEPSERVE_MODEL")}
    done = Started(chapter.name, "generate", "The cache", "--model", "model", "--max-tokens", "7", cwd=place, env=clean)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    want = chapter.load().Engine(checkpoint("llama")).generate(["The cache"], chapter.load().SamplingParams(max_tokens=7))
    assert out == want[0].text + "\n"


def test_a_flag_that_is_left_out_means_what_the_parameter_does(chapter, Params):
    """Except for the number of tokens: a user who types a command expects a whole answer."""
    main = importlib.import_module(f"milestones.{chapter.name}.__main__")
    own = Params()
    for name, options in main.SAMPLING_FLAGS.items():
        if name != "max_tokens" and "default" in options:
            assert options["default"] == getattr(own, name), name


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_a_pipe_that_is_closed_early_is_a_quiet_end(chapter, flags):
    """As by `| head -c 20`."""
    started = Started(f"milestones.{chapter.name}", *llama("The cache", "--max-tokens", "200", *flags), cwd=ROOT, env=dict(os.environ))
    try:
        started.stdout.close()
        assert started.wait(60) == 1
        said = started.stderr.read()
        assert "Traceback" not in said and "BrokenPipe" not in said
    finally:
        started.kill()
        started.stderr.close()
