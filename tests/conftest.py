"""The harness: which chapters a test holds for, the engines that tests share, and the distances that they measure.

A test that takes `chapter` holds for every chapter that has the capabilities it `needs`; a claim, in
claims/test_vNN.py, for its chapter and all later ones, unless `until` names a later chapter that ends it.
matrix.py chooses the chapters for which it is run without an option.
"""
import gc
import importlib
import math
import os
import random
import re
import sys
from functools import lru_cache
from pathlib import Path

# On two cores, two tests with small matrices run faster than one test with two threads; and a fork is safe.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# The same on every machine: no GPU is used, and kernels run in Triton's interpreter. With --gpu, the GPU is used and
# kernels are compiled. CUDA and Triton read these variables before the first option is parsed.
if "PYTEST_XDIST_WORKER" in os.environ:
    pass  # as in the process that started this one
elif "--gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ.pop("TRITON_INTERPRET", None)

# Do not import torch here: the process that only distributes tests would wait for it.
import pytest  # noqa: E402

from shared import results  # noqa: E402
from shared.book import full_record  # noqa: E402
from shared.chapters import BOOK, CHAPTERS, ROOT, Chapter, find  # noqa: E402
from shared.checkpoints import checkpoint  # noqa: E402
from shared.verify import serving  # noqa: E402
from tests import matrix  # noqa: E402
from tests.support.overflowing import write_overflowing  # noqa: E402
from tests.support.progress import OneLine  # noqa: E402
from tests.support.seen import Seen  # noqa: E402

SEEN = Seen()


def pytest_addoption(parser):
    parser.addoption("--chapter", action="append", metavar="vNN", help="only the tests of this chapter, all of them (repeatable)")
    parser.addoption("--full", metavar="vNN", help=f"as --chapter, and if all pass write that down in {full_record.FILE}")
    parser.addoption("--also", action="append", metavar="vNN", help="all tests of this chapter too (repeatable)")
    parser.addoption("--tools", action="store_true", help="only what is no chapter's")
    parser.addoption("--all", action="store_true", help="everything of every chapter, its servers in both ways")
    parser.addoption("--both-ways", action="store_true", help="servers also with --engine thread, where they can")
    parser.addoption("--gpu", action="store_true", help="only what is to be seen on a GPU: kernels compiled, chapters on it")
    parser.addoption("--record", action="store_true", help="write the measured distances to docs/results/distances.json")


def pytest_ignore_collect(collection_path, config):
    """The site's tests need packages that `make setup` does not install, so they run only if named."""
    if collection_path.name == "site" and not any("site" in argument for argument in config.args):
        return True
    if config.only and collection_path.is_file():
        return not may_hold(collection_path, config.only) or None


def may_hold(file: Path, chapters: list) -> bool:
    """Whether a file may hold tests of these chapters. Files that are not collected make no record stale."""
    if file.parent.name == "claims":
        return file.stem.removeprefix("test_") <= max(chapter.id for chapter in chapters)
    return file.name in matrix.PARITIES | matrix.ABOUT.keys() | matrix.WHOLE_RUNS or not file.name.startswith("test_")


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*capabilities): run for the chapters that have them all")
    config.addinivalue_line("markers", "until(chapter): a claim that this chapter ends")
    config.addinivalue_line("markers", "whole: left to `make test-vNN`, which runs all of a chapter's tests")
    config.addinivalue_line("markers", "chooses_form: the engine measures which form of its weights is fastest, as users' engines do")
    config.addinivalue_line("markers", "gpu: run with --gpu as well, and then on the GPU")
    full = config.getoption("--full")
    only = [*(config.getoption("--chapter") or ()), *([full] if full else [])]
    if full and not hasattr(config, "workerinput"):
        fewer = [name for name in FEWER if config.getoption(name, None)]
        if fewer or config.args_source.name == "ARGS":
            raise pytest.UsageError(f"--full records that all tests of a chapter pass; leave out {', '.join(fewer) or 'paths'}")
    try:
        config.only = [find(text) for text in only]
        config.also = [find(text) for text in config.getoption("--also") or ()]
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.distances, config.seen, config.left_out = {}, set(), False
    config.changes = changes() if full else None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    """Runs once the terminal reporter exists."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and reporter.isatty and reporter.verbosity <= 0 and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(OneLine(reporter))


# Options with which not all tests are run.
FEWER = ("keyword", "markexpr", "chapter", "gpu", "collectonly", "deselect", "ignore", "ignore_glob", "lf")


def changes() -> str | None:
    """Uncommitted changes; None without git."""
    try:
        return full_record.changes(ROOT)
    except ValueError:
        return None


def chapters_of(definition) -> list:
    """The chapters that a test claims to hold for."""
    path = Path(definition.path)
    if path.parent.name == "claims":
        first = find(path.stem.removeprefix("test_")).id
        # The chapter that ends a claim may not exist yet.
        end = min((mark.args[0] for mark in definition.iter_markers("until")), default="v99")
        assert re.fullmatch(r"v\d\d", end), f"until({end!r}) is no chapter"
        return [chapter for chapter in CHAPTERS if first <= chapter.id < end]
    needed = {name for mark in definition.iter_markers("needs") for name in mark.args}
    if not needed:
        raise pytest.UsageError(f"{definition.nodeid} takes `chapter` but says no capability it needs")
    chapters = [chapter for chapter in CHAPTERS if needed <= chapter.capabilities]
    if not chapters:
        raise pytest.UsageError(f"{definition.nodeid} needs {sorted(needed)}, which no chapter has together")
    return chapters


def pytest_generate_tests(metafunc):
    config = metafunc.config
    if "chapter" in metafunc.fixturenames:
        chapters = chapters_wanted(config, metafunc.definition)
        config.left_out = config.left_out or chapters != chapters_of(metafunc.definition)
        metafunc.parametrize("chapter", chapters, ids=[chapter.id for chapter in chapters], scope="session")
        if Path(metafunc.definition.path).name in matrix.SERVERS:
            both = config.getoption("--all") or config.getoption("--both-ways")
            ways = [pytest.param("process", id=pytest.HIDDEN_PARAM), *(["thread"] if both else [])]
            metafunc.parametrize("engine_way", ways, indirect=True, scope="session")
    if "checkpoint_name" in metafunc.fixturenames:
        metafunc.parametrize("checkpoint_name", matrix.CHECKPOINTS, scope="session")


def chapters_wanted(config, definition) -> list:
    """The chapters for which the options select any case of a test; without options, matrix.py does."""
    chapters = chapters_of(definition)
    if config.only or config.getoption("--tools"):
        return [chapter for chapter in chapters if chapter in config.only]
    if config.getoption("--all"):
        return chapters
    try:
        chosen = [] if definition.get_closest_marker("whole") else matrix.chapters_run(Path(definition.path), chapters)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    return [chapter for chapter in chapters if chapter in chosen or chapter in config.also]


def pytest_collection_modifyitems(config, items):
    """Keep the tests that the options select; without any, those that matrix.py selects."""
    wanted, others = [], []
    for item in items:
        (wanted if is_wanted(config, item) else others).append(item)
    config.left_out = config.left_out or bool(others)
    config.hook.pytest_deselected(items=others)
    items[:] = wanted
    if config.getoption("--gpu") and not sees_gpu():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA device here"))


def sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def is_wanted(config, item) -> bool:
    """Whether the options select one of the cases of a test for the chapters that are wanted."""
    if config.getoption("--gpu") and not item.get_closest_marker("gpu"):
        return False
    values = item.callspec.params if hasattr(item, "callspec") else {}
    chapter = values.get("chapter")
    if chapter is None:
        return not config.only
    if not isinstance(chapter, Chapter):  # pytest's sign that a test has no case
        return False
    if values.get("engine_way") == "thread" and "engine_process" not in chapter.capabilities:
        return False
    if config.only or config.getoption("--all") or chapter in config.also:
        return True
    if item.get_closest_marker("whole"):
        return False
    name = values.get("checkpoint_name")
    return name is None or name in matrix.checkpoints_run(chapter, CHAPTERS[-1])


def pytest_collection_finish():
    """Garbage is not looked for among what exists now, which is as many objects as there are tests, and more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory):
    """A checkpoint in which one token's values overflow."""
    return write_overflowing(tmp_path_factory.mktemp("overflowing") / "llama")


@pytest.fixture(scope="session", autouse=True)
def engine_way(request):
    """How servers run their engines, in chapters where an engine can have its own process."""
    serving.ENGINE = getattr(request, "param", "process")


@pytest.fixture(autouse=True)
def plain_products(request, monkeypatch):
    """Let no measurement of speed decide about bits: by default, an engine on the CPU multiplies as PyTorch does."""
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    chapter = values.get("chapter")
    if chapter is None or "linear" not in chapter.capabilities or request.node.get_closest_marker("chooses_form"):
        return
    storage = importlib.import_module(f"milestones.{chapter.name}.storage")
    choose_form = storage.choose_form

    def choose_plain(model):
        return "plain" if model.lm_head.weight.device.type == "cpu" else choose_form(model)

    monkeypatch.setattr(storage, "choose_form", choose_plain)


# An engine's cache takes memory once its blocks have been used, and there are hundreds of engines.
@lru_cache(maxsize=32)
def shared_engine(chapter, name, **options):
    return chapter.load().Engine(checkpoint(name), **options)


@pytest.fixture
def make_engine(chapter):
    """Engines by checkpoint name and keywords, created once per session, so every test also tests reuse.

    A test must leave its engine idle, or the next test that uses it would fail.
    """
    used = []

    def make(name, **options):
        used.append(shared_engine(chapter, name, **options))
        return used[-1]

    yield make
    for engine in used:
        busy = engine.has_unfinished_requests()
        for request_id in list(engine.seqs):
            engine.abort_request(request_id)
        engine.step()
        assert not busy, "the test left requests or unread outputs in a shared engine"


@pytest.fixture
def engine(make_engine, checkpoint_name):
    return make_engine(checkpoint_name)


@pytest.fixture
def hf(checkpoint_name):
    from shared.verify.reference import reference

    return reference(checkpoint(checkpoint_name))


@pytest.fixture
def Params(chapter):
    return chapter.load().SamplingParams


@pytest.fixture
def module(chapter):
    """The chapter's modules by file name."""
    return lambda name: importlib.import_module(f"milestones.{chapter.name}.{name}")


@pytest.fixture
def tokens_per_pass():
    """The number of tokens fed in each forward pass of a run, counted from outside."""

    def tokens_per_pass(engine, run):
        counts = []
        hook = engine.model.register_forward_pre_hook(lambda _model, args: counts.append(len(args[0].token_ids)))
        try:
            run()
        finally:
            hook.remove()
        return counts

    return tokens_per_pass


@pytest.fixture
def harness(request):
    """This file as a module; another folder may have one too, so it is not found by that name."""
    [harness] = [plugin for plugin in request.config.pluginmanager.get_plugins() if hasattr(plugin, "chapters_of")]
    return harness


@pytest.fixture
def rng():
    return random.Random(20)


@pytest.fixture
def measure(request):
    """Record how far a measured tensor is from the reference's; returns the distance.

    relative: divided by the largest magnitude of the reference.
    """

    import torch

    def measure(kind, where, got, want, name, relative=False):
        got, want = torch.as_tensor(got).float(), torch.as_tensor(want).float()
        assert got.shape == want.shape, f"{where}: shape {list(got.shape)}, reference {list(want.shape)}"
        distance = (got - want).abs().max().item()
        if relative:
            distance /= want.abs().max().item()
        worst = request.config.distances.get(kind)
        # NaN counts as the largest distance: a number must neither hide nor replace it.
        if worst is None or math.isnan(distance) or distance > worst["distance"]:
            request.config.distances[kind] = {"distance": distance, "where": where, "checkpoint": name}
        return distance

    return measure


# ---- the combined report of several processes


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    config.seen |= set(full_record.counted(SEEN.files(), ROOT))
    if hasattr(config, "workeroutput"):
        config.workeroutput |= {"distances": config.distances, "seen": sorted(config.seen), "left_out": config.left_out}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    said = getattr(node, "workeroutput", {})
    config = node.config
    config.seen |= set(said.get("seen", ()))
    config.left_out = config.left_out or said.get("left_out", False)
    for kind, worst in said.get("distances", {}).items():
        known = config.distances.get(kind)
        if known is None or math.isnan(worst["distance"]) or worst["distance"] > known["distance"]:
            config.distances[kind] = worst


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if hasattr(config, "workerinput"):
        return  # this process ran only a part; the one that combines the parts reports
    say = terminalreporter.write_line
    if config.getoption("--gpu") and not sees_gpu():
        say("nothing was run: PyTorch sees no CUDA device here; `make doctor` says what it sees")
    if config.distances:
        terminalreporter.section("distance from Hugging Face: the worst of each kind")
        width = max(len(kind) for kind in config.distances)
        for kind, worst in sorted(config.distances.items()):
            say(f"{kind:{width}}  {worst['distance']:.1e}  at {worst['where']} on {worst['checkpoint']}")
        if config.getoption("--record"):
            command = "pytest " + " ".join(config.invocation_params.args)
            results.write("distances", dict(sorted(config.distances.items())), command)
    if config.getoption("--full"):
        config.num_skipped = len(terminalreporter.stats.get("skipped", ()))
        say(kept(config, exitstatus))
    elif config.left_out and not config.getoption("--gpu"):
        say(left_out(config))


def left_out(config) -> str:
    """The tests that were not run, and where they run."""
    if config.only:
        return "not run: tests of other chapters and of the tools; `make test` runs some of each"
    if config.getoption("--tools"):
        return "not run: tests of chapters; `make test-vNN` runs those of one"
    also = f"; all of {', '.join(chapter.id for chapter in config.also)} were run" if config.also else ""
    return (
        f"not run: tests for other chapters, checkpoints and cases{also}. "
        "`make test-vNN` runs all of a chapter's, `make test-all` those of all chapters; tests/matrix.py says which are left out"
    )


def kept(config, exitstatus) -> str:
    """Record that all tests of a chapter have run, if they have; return what was done."""
    [chapter] = config.only
    if exitstatus != 0 or config.num_skipped:
        return f"{full_record.FILE}: not written, since not all tests of {chapter.id} ran and passed"
    if config.changes is None:
        return f"{full_record.FILE}: not written, since `git status` fails here"
    if config.changes or changes():
        return f"{full_record.FILE}: not written, since there are uncommitted changes"
    full_record.record(BOOK, chapter, sorted(config.seen))
    return f"{full_record.FILE}: all tests of {chapter.id} pass, on {len(config.seen)} files; commit it"
