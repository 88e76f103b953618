"""The harness: which test runs for which chapter, the engines they share, and the distances they measured.

A test that takes `chapter` runs for every chapter that has the capabilities it `needs`; a claim, in
claims/test_vNN.py, for its chapter and all later ones, unless `until` says that a later chapter ended it.
"""
import importlib
import json
import math
import os
import random
import re
import sys
from functools import lru_cache
from pathlib import Path

# Two cores run two tests' worth of small matrices faster than one test's with two threads; and a fork is safe.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# On every machine the same: no GPU is used, kernels run through Triton's interpreter. With --gpu it is the other way
# around. CUDA and Triton read these before the first option is parsed.
if "--gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
else:
    os.environ.pop("TRITON_INTERPRET", None)

import pytest  # noqa: E402
import torch  # noqa: E402

from shared.chapters import CHAPTERS, ROOT, find  # noqa: E402
from shared.checkpoints import RANDOM, checkpoint  # noqa: E402
from shared.verify.reference import reference  # noqa: E402

DISTANCES = ROOT / "docs" / "results" / "distances.json"


def pytest_addoption(parser):
    parser.addoption("--chapter", action="append", metavar="vNN", help="only the tests of this chapter (repeatable)")
    parser.addoption("--gpu", action="store_true", help="only what is to be seen on a GPU: kernels compiled, chapters on it")
    parser.addoption("--record", action="store_true", help=f"write the measured distances to {DISTANCES.name}")


def pytest_ignore_collect(collection_path, config):
    """The site's tests need what `make setup` does not bring: they run when they are named."""
    if collection_path.name == "site" and not any("site" in argument for argument in config.args):
        return True


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*capabilities): run for the chapters that have them all")
    config.addinivalue_line("markers", "until(chapter): a claim that this chapter ends")
    config.addinivalue_line("markers", "gpu: run with --gpu as well, and then on the GPU")
    try:
        config.selected = [find(text) for text in config.getoption("--chapter") or ()] or list(CHAPTERS)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    config.distances = {}


def chapters_of(definition) -> list:
    """The chapters that a test claims to hold for."""
    path = Path(definition.path)
    if path.parent.name == "claims":
        first = find(path.stem.removeprefix("test_")).id
        # The chapter that ends a claim may not be written yet.
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
    if "chapter" in metafunc.fixturenames:
        chapters = chapters_of(metafunc.definition)
        metafunc.parametrize("chapter", chapters, ids=[chapter.id for chapter in chapters], scope="session")
    if "checkpoint_name" in metafunc.fixturenames:
        metafunc.parametrize("checkpoint_name", ["pocket", *RANDOM], scope="session")


def pytest_collection_modifyitems(config, items):
    """With --chapter, keep that chapter's tests alone; what holds for no chapter in particular is left out. So with --gpu."""

    def wanted(item):
        if config.getoption("--gpu") and not item.get_closest_marker("gpu"):
            return False
        if not config.getoption("--chapter"):
            return True
        return hasattr(item, "callspec") and item.callspec.params.get("chapter") in config.selected

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]
    if config.getoption("--gpu") and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA device here"))


@lru_cache(maxsize=None)
def shared_engine(chapter, name, **options):
    return chapter.load().Engine(checkpoint(name), **options)


@pytest.fixture
def make_engine(chapter):
    """Engines by checkpoint name and keywords, made once a session: so every test also tests reuse.

    Each must be left idle; the next test that gets it would fail for it otherwise.
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
        assert not busy, "the test left requests, or outputs that nobody read, in a shared engine"


@pytest.fixture
def engine(make_engine, checkpoint_name):
    return make_engine(checkpoint_name)


@pytest.fixture
def hf(checkpoint_name):
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
    """How many tokens each forward pass of a run was fed, counted from outside."""

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
def rng():
    return random.Random(20)


@pytest.fixture
def measure(request):
    """Record how far a measured tensor is from the reference's; returns the distance.

    relative: divided by the largest magnitude of the reference.
    """

    def measure(kind, where, got, want, name, relative=False):
        got, want = torch.as_tensor(got).float(), torch.as_tensor(want).float()
        assert got.shape == want.shape, f"{where}: shape {list(got.shape)}, reference {list(want.shape)}"
        distance = (got - want).abs().max().item()
        if relative:
            distance /= want.abs().max().item()
        worst = request.config.distances.get(kind)
        # Nothing is worse than a NaN: it must neither hide behind a number nor be replaced by one.
        if worst is None or math.isnan(distance) or distance > worst["distance"]:
            request.config.distances[kind] = {"distance": distance, "where": where, "checkpoint": name}
        return distance

    return measure


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--gpu") and not torch.cuda.is_available():
        terminalreporter.write_line("nothing was run: PyTorch sees no CUDA device here; `make doctor` says what it sees")
    if not config.distances:
        return
    terminalreporter.section("distance from Hugging Face: the worst of each kind")
    width = max(len(kind) for kind in config.distances)
    for kind, worst in sorted(config.distances.items()):
        terminalreporter.write_line(
            f"{kind:{width}}  {worst['distance']:.1e}  at {worst['where']} on {worst['checkpoint']}"
        )
    if config.getoption("--record"):
        DISTANCES.parent.mkdir(parents=True, exist_ok=True)
        DISTANCES.write_text(json.dumps(record(config), indent=2) + "\n")


def record(config) -> dict:
    """The distances with what is needed to measure them again."""
    from shared.machine import machine, today

    return {
        "command": "pytest " + " ".join(config.invocation_params.args),
        "machine": machine(),
        "date": today(),
    } | {kind: worst for kind, worst in sorted(config.distances.items())}
