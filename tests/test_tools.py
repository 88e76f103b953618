"""The tools around the chapters: the harness's own checks, the commands behind make, checkpoints by name."""
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shared import chapters as contents
from shared import checkpoints, workloads
from shared.bench import __main__ as bench
from shared.bench import batches, growth, staircase, timing
from shared.bench.served import Served, processes_of
from shared.book import diff
from shared.book.doctests import check_package
from shared.chapters import CHAPTERS, CONTENTS, ROOT, Book, Row, find, first_with
from shared.checkpoints import RANDOM, checkpoint
from shared.commands import demo, doctor, install, run, serve
from shared.results import rows_of, write_row
from shared.verify.reference import reference
from tests import matrix


def definition(path, **marks):
    """A test as the harness sees it."""
    return SimpleNamespace(
        nodeid="test",
        path=path,
        iter_markers=lambda name: [SimpleNamespace(args=marks[name])] if name in marks else [],
    )


# ---- the harness


@pytest.fixture
def chapters_of(harness):
    return harness.chapters_of


def test_a_test_that_needs_what_no_chapter_can_do_is_an_error(chapters_of):
    with pytest.raises(pytest.UsageError, match="needs \\['telepathy'\\], which no chapter has"):
        chapters_of(definition(Path("tests/test_x.py"), needs=("telepathy",)))


def test_a_test_that_says_no_capability_is_an_error(chapters_of):
    with pytest.raises(pytest.UsageError, match="says no capability"):
        chapters_of(definition(Path("tests/test_x.py")))


def test_a_claim_holds_from_its_chapter_until_the_one_that_ends_it(chapters_of):
    path = Path("tests/claims/test_v01.py")
    assert chapters_of(definition(path)) == list(CHAPTERS)
    assert chapters_of(definition(path, until=("v02",))) == [CHAPTERS[0]]
    with pytest.raises(AssertionError, match="is no chapter"):
        chapters_of(definition(path, until=("v2",)))


def chosen(harness, file, test, *options, **values):
    """Whether the harness runs a case of a test with these options."""
    given = {"--gpu": False, "--tools": False, "--all": False} | dict.fromkeys(options, True)
    config = SimpleNamespace(getoption=given.get, only=values.pop("only", []), also=values.pop("also", []))
    function = getattr(importlib.import_module(file), test)
    marks = [*getattr(function, "pytestmark", []), *as_list(getattr(importlib.import_module(file), "pytestmark", []))]
    item = SimpleNamespace(
        nodeid=test,
        path=ROOT / f"{file.replace('.', '/')}.py",
        get_closest_marker=lambda name: next((mark for mark in marks if mark.name == name), None),
        iter_markers=lambda name: [mark for mark in marks if mark.name == name],
    )
    if values:
        item.callspec = SimpleNamespace(params=values)
        if values["chapter"] not in harness.chapters_wanted(config, item):
            return False
    return harness.is_wanted(config, item)


def as_list(marks):
    return marks if isinstance(marks, list) else [marks]


def test_with_gpu_what_is_for_one_is_run_and_nothing_else(harness):
    last = CHAPTERS[-1]
    for file, test, wanted in (
        ("tests.claims.test_v06", "test_the_kernel_gives_what_plain_torch_gives", True),
        ("tests.claims.test_v06", "test_another_attention_is_refused", False),
        ("tests.test_on_a_gpu", "test_in_float32_it_generates_what_hugging_face_generates", True),
        ("tests.test_tokens", "test_greedy_tokens_are_hugging_faces", False),
    ):
        assert chosen(harness, file, test, "--gpu", chapter=last) == wanted, test
    for target, wanted in ((f"test-{last.id}", f"-m pytest --gpu --chapter {last.id};"), ("test", "-m pytest --gpu ;")):
        planned = subprocess.run(["make", "-n", f"PYTHON={sys.executable}", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert "if nvidia-smi -L > /dev/null 2>&1; then" in planned.stdout and wanted in planned.stdout


def test_the_matrix_is_what_is_run_without_an_option_and_options_ask_for_more(harness):
    first, last = CHAPTERS[0], CHAPTERS[-1]
    parity = ("tests.test_tokens", "test_greedy_tokens_are_hugging_faces")
    server = ("tests.test_server", "test_models_are_listed_and_an_unknown_one_is_404")
    for file, test in (parity, server):
        importlib.import_module(file)
    for checkpoint_name in matrix.CHECKPOINTS:
        case = dict(chapter=first, checkpoint_name=checkpoint_name)
        assert chosen(harness, *parity, **case) == (checkpoint_name in matrix.checkpoints_run(first, last))
        assert chosen(harness, *parity, **case, only=[first]) and chosen(harness, *parity, **case, also=[first])
        assert chosen(harness, *parity, "--all", **case)
        assert not chosen(harness, *parity, **case, only=[last]) and not chosen(harness, *parity, "--tools", **case)
        assert chosen(harness, *parity, chapter=last, checkpoint_name=checkpoint_name)
    assert chosen(harness, "tests.test_tools", "test_every_requirement_is_pinned", "--tools")
    assert not chosen(harness, "tests.test_tools", "test_every_requirement_is_pinned", only=[last])


def test_three_consecutive_chapters_see_all_checkpoints_and_a_claim_its_chapter_and_the_last():
    chapters = Book.of(ROOT, [Row(f"v{n:02}_a") for n in range(1, 9)]).chapters
    for start in range(5):
        seen = {name for chapter in chapters[start : start + 3] for name in matrix.checkpoints_run(chapter, chapters[-1])}
        assert seen == set(matrix.CHECKPOINTS)
    assert matrix.checkpoints_run(chapters[-1], chapters[-1]) == list(matrix.CHECKPOINTS)
    claims = Path("tests/claims/test_v03.py")
    assert matrix.chapters_run(claims, list(chapters[2:])) == [chapters[2], chapters[-1]]
    assert matrix.chapters_run(Path("tests/test_server.py"), list(chapters[3:])) == [chapters[3], chapters[-1]]
    with pytest.raises(ValueError, match="test_new.py has tests that take `chapter`; say in matrix.py"):
        matrix.chapters_run(Path("tests/test_new.py"), list(chapters))


def test_every_test_file_that_the_matrix_names_is_there():
    there = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    named = [*matrix.PARITIES, *matrix.ABOUT, *matrix.WHOLE_RUNS]
    assert set(named) <= there and len(set(named)) == len(named)


def test_tests_about_a_file_are_run_for_the_chapters_that_change_it(tmp_path):
    texts = ["a", "a", "b", "b", "b"]
    for n, text in enumerate(texts, 1):
        folder = tmp_path / "milestones" / f"v{n:02}_a"
        folder.mkdir(parents=True)
        (folder / "text.py").write_text(text)
    chapters = Book.of(tmp_path, [Row(f"v{n:02}_a") for n in range(1, 6)]).chapters
    run = matrix.chapters_run(Path("tests/test_text.py"), list(chapters))
    assert [chapter.id for chapter in run] == ["v01", "v03", "v05"]


def test_a_distance_that_is_no_number_is_the_worst(request, measure):
    kept = dict(request.config.distances)
    measure("test", "a", [1.0], [1.0], "x")
    measure("test", "b", [float("nan")], [1.0], "x")
    measure("test", "c", [1.0], [2.0], "x")
    worst = request.config.distances["test"]
    request.config.distances.clear()
    request.config.distances.update(kept)
    assert worst["where"] == "b"


def test_every_chapter_is_a_directory_and_every_directory_a_chapter():
    directories = {path.name for path in (ROOT / "milestones").iterdir() if (path / "__init__.py").exists()}
    assert directories == {chapter.name for chapter in CHAPTERS}
    with pytest.raises(ValueError, match="there is no chapter 'v99'; the chapters are v01"):
        find("v99")


def test_chapters_import_nothing_from_outside():
    for chapter in CHAPTERS:
        for path in chapter.path.rglob("*.py"):
            text = path.read_text()
            assert "import shared" not in text and "from shared" not in text and "milestones" not in text, path


def test_every_example_in_the_docstrings_of_the_tools_is_true():
    report = check_package("shared")
    assert report.attempted and not report.failures, "\n".join(report.failures)


# ---- checkpoints by name


def test_every_family_and_storage_form_is_among_the_random_checkpoints():
    specs = RANDOM.values()
    assert {spec.family for spec in specs} == {"llama", "mistral", "qwen2", "qwen3"}
    assert {spec.stored for spec in specs} == {"float32", "bfloat16", "float16"}
    for choice in ("tied", "sharded", "hub_form", "llama3_rope"):
        assert {getattr(spec, choice) for spec in specs} == {True, False}, choice


def test_the_forms_are_what_they_are_called():
    def config(name):
        return json.loads((checkpoint(name) / "config.json").read_text())

    assert "rope_parameters" in config("llama3") and "rope_scaling" not in config("llama3")
    assert config("llama3-hub")["rope_scaling"]["rope_type"] == "llama3" and "rope_parameters" not in config("llama3-hub")
    assert (checkpoint("mistral") / "model.safetensors.index.json").exists()


def test_the_same_spec_gives_the_same_bytes(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        checkpoints.write_checkpoint(RANDOM["qwen2"], path)
    first, second = ((path / "model.safetensors").read_bytes() for path in paths)
    assert first == second


def test_a_name_that_stands_for_nothing_is_refused():
    with pytest.raises(ValueError, match="there is no checkpoint 'nothing'; give a directory, a hub id"):
        checkpoint("nothing")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "owner/name is gated; accept its terms on its hub page, create a read token, and set HF_TOKEN"),
        ("RepositoryNotFoundError", "the hub has no owner/name, or it is private"),
        ("LocalEntryNotFoundError", "owner/name could not be downloaded from the hub"),
    ],
)
def test_a_hub_that_does_not_give_a_model_is_explained(monkeypatch, error, message):
    import huggingface_hub

    def refuse(*_, **__):
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError) as raised:
        checkpoint("owner/name")
    assert message in str(raised.value)


# ---- how programs end


def test_a_program_that_is_told_to_end_ends_what_it_has_started():
    code = """
import time
from shared.programs import run

def main(argv):
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("ended")

run(main)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.stdout.read() == "ended\n"
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are read from /proc")
def test_a_server_that_is_interrupted_while_it_starts_is_ended(monkeypatch):
    started = []

    def interrupted(served):
        started.append(served)
        raise SystemExit

    monkeypatch.setattr(Served, "wait_until_it_serves", interrupted)
    with pytest.raises(SystemExit):
        Served(first_with("serve"))
    assert started[0].process.returncode == -signal.SIGKILL and processes_of(started[0]) == []


# ---- the commands behind make


def test_run_sends_a_users_turn_where_there_is_a_template(capsys):
    assert run.main(["v01", "Who are you?", "--max-tokens", "40"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("I am pocket")
    assert "has a chat template" in captured.err


def test_run_sends_the_text_as_it_is_where_there_is_none(capsys, tmp_path):
    path = tmp_path / "base"
    shutil.copytree(checkpoint("llama"), path, ignore=shutil.ignore_patterns("chat_template.jinja"))
    assert run.main(["v01", "The cache", "--model", str(path), "--max-tokens", "3"]) == 0
    assert "template" not in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["v99", "Hi"], ["v01", "Hi", "--model", "nothing"]])
def test_run_answers_a_mistake_with_one_sentence(argv, capsys):
    assert run.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "argv", "words"),
    [
        ("shared.verify.soak", "v05 v01", "this audits blocks, and v01 has none; name v05 or later chapters"),
        ("shared.verify.soak", "--requests 0", "--requests must be at least 1, got 0"),
        ("shared.verify.killing", "--count 0", "--count must be at least 1, got 0"),
        ("shared.verify.killing", "--chapter v99", "there is no chapter 'v99'; the chapters are v01"),
        ("shared.verify.killing", "--chapter v07", "v07 has no process of the engine; name v10 or a later chapter"),
        ("shared.verify.killing", "--chapter v01 --what server", "v01 has no process of the server; name v07 or a later chapter"),
        ("shared.verify.operate", "--minutes -1", "--minutes must be above 0 and finite, got -1.0"),
        ("shared.verify.operate", "--minutes nan", "--minutes must be above 0 and finite, got nan"),
        ("shared.bench.admission", "--repeats 0", "--repeats must be at least 1, got 0"),
        ("shared.bench.pieces", "--repeats 0", "--repeats must be at least 1, got 0"),
        ("shared.bench.kernels", "v99", "there is no chapter 'v99'; the chapters are v01"),
        ("shared.bench.kernels", "v01", "v01 has no kernels; name v06 or a later chapter"),
        ("shared.bench.load", "--write", "add `chapter`, or write the result with --json FILE"),
        ("shared.bench.load", "--url http://[::1 --model pocket", "http://[::1 is not the address of a server: Invalid IPv6 URL"),
        ("shared.bench.load", "--json /", "--json /: it is a directory, or its directory does not exist"),
        ("shared.bench.load", "--api-key é", "--api-key must be ASCII"),
        ("shared.commands.chat", "--url localhost:99999", "http://localhost:99999 is not the address of a server: Port out of range 0-65535"),
        ("shared.commands.agent", "--url ftp://localhost", "ftp://localhost is not the address of a server: it needs http or https"),
        ("shared.bench.load", "chapter --rate 4", "--rate is for a server that runs already, and `chapter` starts its own"),
        ("shared.checkpoints", "a b", "unrecognized arguments: b"),
        ("shared.checkpoints", "", "the following arguments are required: name"),
        ("shared.book.doctests", "--bogus", "unrecognized arguments: --bogus"),
        ("shared.book.doctests", "shared shared.nothing", "there is no package shared.nothing; name some such as shared"),
        ("shared.book.notebooks", "check v05", "check is for all notebooks; leave out v05"),
        ("shared.book.traps.hunt", "hunt v03", "hunt is about the bug that is planted; leave v03 out, or plant another one with `break v03`"),
        ("shared.book.traps.hunt", "reveal --ask Hm?", "--ask is for hunt, not for reveal"),
        ("shared.book.traps.hunt", "hunt --seed 3", "--seed is for break, not for hunt"),
        ("shared.book.traps.mutants", "v05 --count 0", "--count must be at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_runs(module, argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(argv.split())
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("module", ["commands.demo", "commands.doctor", "verify.soak_server", "book.promtool", "machine"])
def test_a_program_without_arguments_refuses_them_and_explains_itself(module, capsys):
    program = importlib.import_module(f"shared.{module}")
    for argv, status in ((["v05"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            program.main(argv)
        assert ended.value.code == status
    captured = capsys.readouterr()
    assert "unrecognized arguments: v05" in captured.err and program.__doc__.strip() in captured.out


def test_the_table_of_contents_refuses_what_it_does_not_know(capsys):
    assert contents.main(["--help"]) == 2
    assert "usage: python -m shared.chapters [names]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("triton", "numpy", "fault"),
    [
        ("3.6.0", "2.4.6", "Triton 3.6.0 fails with NumPy 2.4.6; install numpy below 2.4, or triton 3.7"),
        ("3.6.0", "2.3.5", None),
        ("3.7.1+git0a1b", "2.10.0rc1", None),
        (None, "2.4.6", "not installed"),
    ],
)
def test_doctor_knows_where_the_interpreter_cannot_run(monkeypatch, triton, numpy, fault):
    monkeypatch.setattr(doctor, "version", {"triton": triton, "numpy": numpy}.get)
    found = doctor.interpreter_fault()
    assert found is None if fault is None else fault in found


def test_doctor_reports_and_fails_when_something_is_missing(capsys, monkeypatch):
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    for word in ("python", "torch", "transformers", "device", "triton runs", "memory"):
        assert word in report
    monkeypatch.setattr(doctor, "REQUIRED", (*doctor.REQUIRED, "no-such-package"))
    assert doctor.main([]) == 1
    assert "MISSING: run make setup" in capsys.readouterr().out


def test_demo_races_shows_an_answer_and_that_all_agree(capsys, monkeypatch):
    monkeypatch.setattr(demo, "RACE", demo.RACE[:1])
    monkeypatch.setattr(demo, "CROWD", demo.CROWD[8:10])
    assert demo.main([]) == 0
    out = capsys.readouterr().out
    assert "A KV cache keeps the keys and values" in out
    assert f"{len(CHAPTERS)} chapters, 1 answer each, all identical to Hugging Face's" in out
    hf = reference(checkpoint("pocket"))
    first, second = out.split("2 of the questions again, with a system prompt of 200 tokens, max_tokens=512,\n")
    prompts = [demo.chat_ids(hf.tokenizer, question, workloads.SYSTEM_PROMPT) for question in demo.CROWD]
    in_both = len(hf.greedy(demo.chat_ids(hf.tokenizer, demo.RACE[0]), 160).token_ids)
    in_crowd = sum(len(hf.greedy(prompt, 512).token_ids) for prompt in prompts)
    for chapter in CHAPTERS:
        in_race = chapter.races or chapter is CHAPTERS[-1]
        assert first.count(f"{chapter.name:{demo.NAME_WIDTH}}\u25cf  {in_both:4} tokens") == in_race
        assert in_race or re.search(rf"\(.*\b{chapter.id}\b.*: not in the first race", out)
        is_crowded = "num_blocks" in chapter.capabilities and (in_race or chapter.races_when_full)
        assert second.count(f"{chapter.name:{demo.NAME_WIDTH}}\u25cf\u25cf  {in_crowd:4} tokens") == is_crowded


@pytest.mark.parametrize(("number", "name"), [(1, "v02"), (2, first_with("preemption").id)])
def test_demo_fails_when_a_chapter_differs(capsys, monkeypatch, number, name):
    """In the first race or only in the second."""
    race, races = demo.race, []

    def lie(lanes, prompts):
        race(lanes, prompts)
        races.append(lanes)
        if len(races) == number:
            lanes[1].token_ids[0][-1] += 1

    racing = [chapter for chapter in CHAPTERS if chapter.id in ("v01", "v02", "v05", name) or chapter is CHAPTERS[-1]]
    monkeypatch.setattr(demo, "CHAPTERS", racing)
    monkeypatch.setattr(demo, "RACE", demo.RACE[:1])
    monkeypatch.setattr(demo, "CROWD", demo.CROWD[:1])
    monkeypatch.setattr(demo, "race", lie)
    assert demo.main([]) == 1
    captured = capsys.readouterr()
    assert f"\n{name}: tokens differ from Hugging Face's; `make test-{name}` shows where" in captured.err
    assert "identical" not in captured.out


class FakeLane(demo.Lane):
    """A lane whose steps take given times."""

    def __init__(self, name, cost_s, num_steps):
        super().__init__(SimpleNamespace(name=name), None, None, request_ids=[0])
        self.cost_s, self.num_steps = cost_s, num_steps

    def start(self, prompts):
        self.token_ids, self.texts = [[]], [""]

    def step(self):
        self.clock_s += self.cost_s
        self.token_ids[0].append(1)
        self.texts[0] += "word "
        self.finished |= {0} if len(self.token_ids[0]) == self.num_steps else set()
        self.log.append(self.chapter.name)


def test_the_lane_that_is_furthest_behind_takes_the_next_step(capsys):
    FakeLane.log = []
    demo.race([FakeLane("slow", 4.0, 2), FakeLane("fast", 1.0, 6)], [[1]])
    assert FakeLane.log == ["slow", "fast", "fast", "fast", "fast", "slow", "fast", "fast"]
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["slow", "fast"]


def test_in_a_terminal_the_lanes_are_drawn_over(capsys, monkeypatch):
    monkeypatch.setattr(demo.sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(demo.shutil, "get_terminal_size", lambda: SimpleNamespace(columns=40))
    monkeypatch.setattr(demo, "FRAMES_PER_S", 10**9)
    FakeLane.log = []
    lane = FakeLane("only", 1.0, 20)
    demo.race([lane], [[1]])
    frames = capsys.readouterr().out.split("\x1b[2A")
    assert len(frames) == 21 and all(frame.count("\n") == 2 for frame in frames)
    lines = [line for frame in frames for line in frame.replace("\x1b[2K", "").splitlines()]
    assert max(map(len, lines)) == 39
    assert lines[1] == "    word " and lines[27] == "    \u2026" + ("word " * 14)[-34:] and lines[-1] == ""


def test_setup_takes_cpu_wheels_only_where_no_gpu_is_seen(monkeypatch):
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install, "in_reach", lambda index: True)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: False)
    assert install.torch_index() == install.CPU_INDEX
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    assert install.torch_index() is None
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/whl")
    assert install.torch_index() == "https://example.org/whl"


def test_setup_falls_back_to_the_default_index_and_says_so(monkeypatch, capsys):
    monkeypatch.setenv("TORCH_INDEX", "http://127.0.0.1:9/whl")  # no server listens there
    assert install.torch_index() is None
    assert "cannot reach http://127.0.0.1:9/whl" in capsys.readouterr().out


def test_setup_refuses_what_it_does_not_know(capsys):
    assert install.main(["there"]) == 2
    assert "must be book, here or none, got there" in capsys.readouterr().err


def test_setup_tells_an_older_python_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    monkeypatch.setattr(sys, "argv", ["install.py", "book"])
    with pytest.raises(SystemExit, match=r"Python must be 3\.11 or later, got .*; run .*`python3\.12 shared/commands/install\.py book`, then `make`"):
        runpy.run_path(str(ROOT / "shared" / "commands" / "install.py"), run_name="__main__")


def test_with_an_interpreter_of_ones_own_setup_says_that_it_does_nothing():
    for target in ("setup", "setup-book"):
        assert f"nothing is installed, since PYTHON={sys.executable} is used as it is" in make(f"PYTHON={sys.executable}", target).stdout


@pytest.mark.parametrize("python", [sys.executable, "no-such-python", "/a path/with spaces/python"])
def test_chapters_are_listed_by_the_named_interpreter_or_else_by_python3(python, tmp_path):
    assert " ".join(each.id for each in CHAPTERS) in make(f"PYTHON={python}", "help").stdout
    if python == sys.executable:
        # Also where there is no other.
        path = os.pathsep.join(each for each in os.environ["PATH"].split(os.pathsep) if not os.path.exists(os.path.join(each, "python3")))
        tools = tmp_path / "bin"
        tools.mkdir()
        for name in ("make", "sh", "echo"):
            (tools / name).symlink_to(shutil.which(name))
        done = subprocess.run([tools / "make", f"PYTHON={python}", "help"], cwd=ROOT, capture_output=True, text=True, env={"PATH": f"{tools}{os.pathsep}{path}"})
        assert " ".join(each.id for each in CHAPTERS) in done.stdout, done.stderr


def test_setup_here_takes_what_the_engines_need_and_nothing_of_the_tests(monkeypatch):
    commands = []
    monkeypatch.setattr(install, "run", commands.append)
    assert install.main(["here"]) == 0
    [command] = commands
    assert command[0] == install.sys.executable and "transformers>=5.17,<6" in command
    assert not any(each.startswith(("pytest", "mkdocs")) for each in command)


def test_every_requirement_is_pinned():
    pins = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for requirement in install.requirements("test", "book"):
        name = requirement.replace(">", " ").replace("=", " ").split()[0]
        assert name in pins, name


def test_make_has_a_target_for_every_chapter():
    for target in ("test", "run", "diff", "nbdiff", "traps", "break", "bench"):
        done = subprocess.run(["make", "-n", *(f"{target}-{each.id}" for each in CHAPTERS)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and all(chapter.id in done.stdout for chapter in CHAPTERS), done.stderr
    assert "make demo" in subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout


COPY = """
import importlib.util, multiprocessing, subprocess, sys
from pathlib import Path
from shared.book.changed_copy import changed_copy
from shared.chapters import find

def where(queue):
    import milestones.v01_naive
    queue.put(milestones.v01_naive.__file__)

def change(copy):
    (copy / "__init__.py").write_text("")
    (copy / "__main__.py").write_text("import sys\\nprint('the copy', sys.argv[1:])")

if __name__ == "__main__":
    with changed_copy(find("v01"), change, Path(sys.argv[1])) as copy:
        print(subprocess.run([*find("v01").command, "generate"], capture_output=True, text=True).stdout, end="")
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=where, args=(queue,))
        process.start()
        print(queue.get(timeout=60) == str(copy / "__init__.py"))
        process.join()
    print(importlib.util.find_spec("milestones.v01_naive").origin)
"""


def test_a_changed_copy_is_what_every_process_imports_that_is_started_meanwhile(tmp_path):
    """By a command or by spawning, as for an engine process; afterward, the chapter is imported again."""
    script, scratch = tmp_path / "it's a script.py", tmp_path / "scratch"
    script.write_text(COPY)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script, scratch], cwd=ROOT, env=env, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert said == ["the copy ['generate']", "True", str(CHAPTERS[0].path / "__init__.py")], done.stderr


def make(*arguments):
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("words", ['what does "paged" mean?', "$5, `x` or $(HOME)?", "it's", "--help", "a\\b"])
def test_words_reach_the_program_as_they_were_typed(words, tmp_path):
    program = tmp_path / "show"
    program.write_text(f"""#!/bin/sh\n[ "$1" = shared/chapters.py ] && exec '{sys.executable}' "$@"\nprintf '<%s>\\n' "$@"\n""")
    program.chmod(0o755)
    show = f"PYTHON={program}"
    assert f"<{words}>" in make(show, "run-v01", f"PROMPT={words}").stdout.splitlines()
    assert f"<--ask={words}>" in make(show, "hunt", f"ASK={words}").stdout.splitlines()
    assert f"<{words}>" in make(show, "new-v99", f"NAME={words}").stdout.splitlines()


def test_a_chapter_that_is_not_there_is_reported_with_those_that_are():
    for target in ("test", "run", "diff", "nbdiff", "traps", "break", "bench"):
        done = make(f"{target}-v99")
        assert done.returncode == 2 and "there is no chapter v99; the chapters are v01 v02" in done.stderr, done.stderr


def test_a_bug_mended_in_the_first_chapter_reaches_the_last_and_leaves_the_diffs_alone(tmp_path):
    """On the real chapters, copied into a repository of their own."""
    bug, mended = "first * cos + second * sin", "first * cos - second * sin"
    for name in ("milestones", "shared"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "models"))
    layers = [tmp_path / "milestones" / chapter.name / "layers.py" for chapter in CHAPTERS]
    for path in layers:
        path.write_text(path.read_text().replace(mended, bug))

    def call(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call("git", "init", "-q")
    call("git", "add", ".")
    call("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "with a bug")
    copies = Book.of(tmp_path, CONTENTS).chapters
    diffs = [diff.show(chapter) for chapter in copies]
    layers[0].write_text(layers[0].read_text().replace(bug, mended))
    call(sys.executable, "-m", "shared.book.propagate", CHAPTERS[0].id, "--no-tests")
    for path, chapter in zip(layers, CHAPTERS, strict=True):
        assert path.read_text() == (chapter.path / "layers.py").read_text()
    assert diffs == [diff.show(chapter) for chapter in copies]


# ---- the timer


def test_contestants_take_turns_after_one_unmeasured_run_each():
    order = []
    contestants = {name: lambda name=name: order.append(name) or timing.Timing(1.0, 1.0) for name in "AB"}
    timings = timing.interleave(contestants, repeats=3)
    assert "".join(order) == "AB" + "ABABAB"
    assert {name: len(runs) for name, runs in timings.items()} == {"A": 3, "B": 3}


# This tests the timer; running it with every chapter would take longer with each new one.
FEW = (*CHAPTERS[:3], CHAPTERS[-1])


def test_growth_measures_every_chapter_at_every_length(monkeypatch, capsys):
    monkeypatch.setattr(growth, "GROWTH_LENGTHS", (3, 5))
    results = growth.growth(list(FEW), repeats=1)
    for chapter in FEW:
        assert {"3", "5", "worst_spread", "ratio"} == set(results[chapter.id])
        assert results[chapter.id]["5"]["wall_ms"] > 0
    growth.print_growth(results)
    assert "ms per token" in capsys.readouterr().out


@pytest.fixture
def small(monkeypatch):
    """A staircase of few steps."""
    requests = workloads.fixed([(3, 6), (5, 2), (4, 12), (2, 3)], 401)
    monkeypatch.setattr(workloads, "staircase", lambda vocab_size: requests)


def test_the_staircase_counts_and_times_every_chapter(small, monkeypatch, capsys, tmp_path):
    elsewhere = Book(tmp_path, CHAPTERS)
    monkeypatch.setattr(bench, "write_row", lambda *args: write_row(*args, book=elsewhere))
    monkeypatch.setattr(bench, "CHAPTERS", FEW)
    assert bench.main(["staircase", "--repeats", "2", "--write"]) == 0
    [results] = rows_of(elsewhere.results / "staircase.json").values()
    # The bundled model's head is tied, so its whole file is read in every forward pass.
    tensors = load_file(checkpoint("pocket") / "model.safetensors")
    stored = sum(tensor.numel() for tensor in tensors.values())
    norms = sum(tensor.numel() for name, tensor in tensors.items() if "norm" in name)
    assert results["command"] == "python -m shared.bench staircase --repeats 2 --write"
    for chapter in FEW:
        row = results[chapter.id]
        assert (row["requests"], row["tokens"], row["needed"]) == (4, 23, 33)
        assert row["tokens_per_s"] == pytest.approx(1e3 * 23 / row["wall_ms"], rel=0.01)
        itemsize = 2 if row["linear"] == "halves" else 4
        assert row["weight_read_bytes"] == row["passes"] * (itemsize * (stored - norms) + 4 * norms)
        assert row["watched"]["lengths"] == [4, 12]
        assert row["short"]["requests"] == 4
    assert results[CHAPTERS[0].id]["positions"] == sum(sum(range(p, p + n)) for p, n in [(3, 6), (5, 2), (4, 12), (2, 3)])
    assert results[first_with("kv_cache").id]["positions"] == 33
    assert "tokens/pass" in capsys.readouterr().out


def test_a_staircase_whose_chapters_disagree_is_no_result(small, monkeypatch):
    record = staircase.record

    def lie(chapter, engine, requests):
        found, tokens = record(chapter, engine, requests)
        return found, tokens if chapter is CHAPTERS[0] else [[1], *tokens[1:]]

    monkeypatch.setattr(staircase, "record", lie)
    with pytest.raises(AssertionError, match="v02 generates other tokens than v01"):
        staircase.staircase(list(CHAPTERS[:2]), repeats=1)


def test_the_crowd_is_served_in_fewer_steps_and_positions_from_chapter_to_chapter(monkeypatch, capsys, tmp_path):
    elsewhere = Book(tmp_path, CHAPTERS)
    monkeypatch.setattr(bench, "write_row", lambda *args: write_row(*args, book=elsewhere))
    monkeypatch.setattr(workloads, "CROWD", workloads.CROWD[9:13])
    # One at full length, three at their actual length, or all.
    monkeypatch.setattr(workloads, "CROWD_BLOCKS", 48)
    assert bench.main(["crowded", "--repeats", "1", "--write"]) == 0
    [found] = rows_of(elsewhere.results / "crowded.json").values()
    before, preempts, shares = first_with("preemption").previous.id, first_with("preemption").id, first_with("prefix_cache").id
    assert list(found["code"]) == [before, *(each.id for each in CHAPTERS if each.races_when_full)]
    assert found[before]["passes"] > found[preempts]["passes"] > found[shares]["passes"]
    assert found[before]["positions"] == found[preempts]["positions"]
    # 200 tokens are the same in all, and 12 blocks of 16 hold 192 of them.
    assert (found[shares]["shared"], found[shares]["requests"]) == (200, 4)
    assert found[preempts]["positions"] - found[shares]["positions"] == 3 * 192
    assert all(found[name]["tokens"] == found[before]["tokens"] for name in (preempts, shares))
    assert "ms to first" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["crowded", "v04"])
    assert "crowded sizes the cache in blocks, and v04 does not; name later chapters" in capsys.readouterr().err


def test_a_crowd_that_gets_other_answers_is_no_result(monkeypatch):
    serve = staircase.serve

    def lie(chapter, engine, prompts):
        found = serve(chapter, engine, prompts)
        return found | ({"token_ids": [[1]]} if chapter is CHAPTERS[-1] else {})

    monkeypatch.setattr(workloads, "CROWD", workloads.CROWD[:1])
    monkeypatch.setattr(staircase, "serve", lie)
    with pytest.raises(AssertionError, match=f"{CHAPTERS[-1].id} generates other tokens than {CHAPTERS[-2].id}"):
        staircase.crowded(list(CHAPTERS[-2:]), repeats=1)


def test_batch_measures_where_several_run_together(monkeypatch, capsys):
    monkeypatch.setattr(batches, "BATCH_SIZES", (1, 3))
    monkeypatch.setattr(batches, "BATCH_MODELS", ("llama", "qwen2"))
    results = batches.batch(list(FEW), repeats=1)
    assert list(results) == [chapter.id for chapter in FEW]
    alone, together = first_with("kv_cache").id, first_with("max_num_seqs").id
    assert "3" not in results[alone]["llama"]
    assert results[together]["llama"]["3"]["tokens_per_s"] > 0
    # A tied embedding is the head and is read whole; otherwise only the head is.
    for name, tied in (("llama", False), ("qwen2", True)):
        parameters = AutoModelForCausalLM.from_pretrained(checkpoint(name)).num_parameters()
        embedding = checkpoints.RANDOM[name].vocab_size * checkpoints.RANDOM[name].hidden_size
        assert results[together][name]["weight_bytes"] == 4 * (parameters - (0 if tied else embedding))
    batches.print_batch(results)
    assert "tokens/s by requests per forward pass" in capsys.readouterr().out


def test_decode_measures_a_step_of_sixteen(monkeypatch, capsys):
    monkeypatch.setattr(batches, "BATCH_MODELS", ("llama", "qwen2"))
    chapters = [chapter for chapter in FEW if "max_num_seqs" in chapter.capabilities]
    monkeypatch.setattr(batches, "DECODE_CONTEXTS", (3, 9))
    # These have 320 positions.
    monkeypatch.setattr(batches, "DECODE_MAX_LEN", 320)
    results = batches.decode(chapters, repeats=1)
    assert all(results[chapter.id][model]["wall_ms"] > 0 for chapter in chapters for model in ("llama", "qwen2"))
    batches.print_decode(results)
    assert "ms per step of 16 sequences" in capsys.readouterr().out


def test_a_noisy_measurement_says_so(capsys, monkeypatch):
    monkeypatch.setattr(growth, "GROWTH_LENGTHS", (3,))
    timings = {"wall_ms": 1.0, "cpu_ms": 1.0, "spread": 0.9, "repeats": 2}
    growth.print_growth({"v01": {"3": timings, "worst_spread": 0.9, "ratio": 1.0}})
    assert "noisy: runs differ by up to 90%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "served"),
    [("llama", ["--served-model-name", "llama"]), ("owner/name", ["--served-model-name", "owner/name"]), ("a-link", [])],
)
def test_serve_leaves_a_directory_its_own_name_and_the_user_the_last_word(monkeypatch, tmp_path, model, served):
    """The name of a checkpoint loaded by id used to override the user's own."""
    snapshot = checkpoint("qwen3")
    monkeypatch.setattr(checkpoints, "download", lambda hub_id: snapshot)
    monkeypatch.chdir(tmp_path)
    Path("a-link").symlink_to(snapshot)
    calls = []
    module = SimpleNamespace(main=calls.append)
    monkeypatch.setattr(serve.importlib, "import_module", lambda name: module)
    where = {"llama": str(checkpoint("llama")), "owner/name": str(snapshot), "a-link": "a-link"}[model]
    serve.main(["--served-model-name", "mine", "--model", model, "--port", "0"])
    serve.main([f"--model={model}"])
    want = ["serve", "--model", where, *served]
    assert calls == [[*want, "--served-model-name", "mine", "--port", "0"], want]
