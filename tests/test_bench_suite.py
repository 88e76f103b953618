"""The benchmark against Hugging Face: all do the same work, and the counts are right. Speed is not tested."""
import dataclasses
import importlib
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from shared.bench import __main__ as bench
from shared.bench import gpu as bench_gpu
from shared.bench import overhead as bench_overhead
from shared.bench import suite as bench_suite
from shared.bench.timing import weight_bytes
from shared.chapters import CHAPTERS, ROOT, find, first_with
from shared.checkpoints import checkpoint
from shared.workloads import Request

WORK = bench_suite.Work("three requests", lambda vocab: [Request([9] * 3, 4), Request([8] * 40, 2), Request([7], 5)])


def test_chapters_and_hugging_face_do_the_same_work():
    chapters = [CHAPTERS[0], CHAPTERS[-1]]
    limits = {"bytes_per_s": 1e9, "operations_per_s": 1e9}
    rows = bench_suite.contest("llama", WORK, chapters, 2, limits)
    assert list(rows) == [CHAPTERS[0].id, CHAPTERS[-1].id, *bench_suite.PEERS]
    for row in rows.values():
        assert row["other_answers"] == 0 and row["repeats"] == 2
        assert row["tokens_per_cpu_s"] == pytest.approx(1e3 * 11 / row["cpu_ms"], rel=1e-2)
    assert rows["HF generate"]["times_hf"] == 1


def test_the_limit_counts_what_must_be_multiplied_and_read():
    model = CHAPTERS[-1].load().Engine(checkpoint("llama"), dtype="float32").model
    requests = WORK.requests(0)
    body = sum(each.numel() for each in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    operations = 2 * (body * (6 + 41 + 5) + head * 11)
    by_rate = bench_suite.least_seconds(requests, model, {"bytes_per_s": 1e18, "operations_per_s": 1e6})
    assert by_rate == pytest.approx(operations / 1e6)
    by_bytes = bench_suite.least_seconds(requests, model, {"bytes_per_s": 1e6, "operations_per_s": 1e18})
    assert by_bytes == pytest.approx(5 * weight_bytes(model) / 1e6)


def test_requests_that_arrive_by_chance_all_see_a_first_token(monkeypatch, capsys):
    monkeypatch.setattr(bench_suite, "ARRIVALS", 5)
    monkeypatch.setattr(bench_suite, "RATE", 1000.0)
    rows = bench_suite.arrivals([first_with("kv_cache"), CHAPTERS[-1]])
    for row in rows.values():
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p95"] <= 1e3 * row["seconds"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_of_memory_grows_with_what_is_held():
    """In a process that has not used more memory before."""
    code = "from shared.bench.suite import peak_kib as peak; a = peak(); held = b'x' * 2**26; print(peak() - a)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 60 * 2**10 < int(done.stdout) < 70 * 2**10


def test_the_suite_prints_every_contestant_and_says_when_it_was_noisy(capsys):
    row = {"cpu_ms": 100.0, "wall_ms": 110.0, "tokens_per_cpu_s": 50.0, "share_of_limit": 0.5, "spread": 0.4}
    row |= {"times_hf": 1.5, "other_answers": 0}
    rows = {"v07": row, "HF generate": row | {"other_answers": 2}}
    arrived = {"v07": {"ttft_ms_p50": 1.0, "ttft_ms_p95": 2.0, "seconds": 3.0}}
    limits = {"gb_per_s": 20.0, "gflops": 80.0}
    bench_suite.print_suite({"limits": limits, "pocket": {"ragged": rows}, "arrivals": arrived, "peak_mib": {"v07": 200.0}})
    said = capsys.readouterr().out
    assert "noisy" in said and "HF generate: 2 answers differ from those of v07" in said
    assert "v07             p50          1" in said and "v07 200" in said


def test_the_chapter_before_can_be_asked_for(monkeypatch):
    asked = []
    monkeypatch.setitem(bench.WORKLOADS, "suite", (lambda chapters, repeats: asked.append(chapters) or {}, lambda results: None))
    assert bench.main(["suite", "v05", "--before"]) == 0
    assert bench.main(["suite", "v01", "--before"]) == 0
    assert [[chapter.id for chapter in chapters] for chapters in asked] == [["v04", "v05"], ["v01"]]


@pytest.mark.parametrize("name", [CHAPTERS[0].id, CHAPTERS[-1].id])
def test_the_parts_of_a_step_are_timed_separately_and_nothing_stays_wrapped(name, monkeypatch, capsys):
    monkeypatch.setattr(bench_overhead, "SIZES", (1, 3))
    monkeypatch.setattr(bench_overhead, "STEPS", 2)
    package = find(name).load()
    module = importlib.import_module(f"{package.__name__}.engine")
    before = dict(vars(module))
    results = bench_overhead.overhead([find(name)], repeats=1)
    assert dict(vars(module)) == before
    sizes = (1, 3) if "max_num_seqs" in find(name).capabilities else (1,)
    assert list(results[name]) == [f"{way} {size}" for size in sizes for way in bench_overhead.WAYS]
    for row in results[name].values():
        assert all(row[part] > 0 for part in bench_overhead.PARTS)
        assert row["own"] == pytest.approx(row["step"] - row["model"] - row["head"], abs=0.2)
    bench_overhead.print_overhead(results)
    assert "sampled 1" in capsys.readouterr().out


def test_time_in_a_part_is_counted_once_and_the_wrapping_undone():
    class Owner:
        def step(self):
            return "said"

    owner, spent = Owner(), {"part": 0.0}
    undo = bench_overhead.restore(owner, "step")
    owner.step = bench_overhead.clocked(owner.step, spent, "part")
    assert owner.step() == "said" and spent["part"] > 0
    undo()
    assert vars(owner) == {}


def test_the_gpu_benchmark_rehearses_on_a_cpu(capsys):
    assert bench_gpu.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    last = CHAPTERS[-1].id
    for name in (*(chapter.id for chapter in CHAPTERS), "HF continuous", "decode step of", f"{last}_eager"):
        assert name in out


def test_the_gpu_benchmark_times_nothing_when_chapters_differ(monkeypatch):
    serve, calls = bench_gpu.serve, []

    def lying(engine, package, requests):
        calls.append(package)
        said = serve(engine, package, requests)
        return said if len(calls) < 2 else [[token_id + 1 for token_id in each] for each in said]

    monkeypatch.setattr(bench_gpu, "serve", lying)
    with pytest.raises(AssertionError, match=f"{CHAPTERS[1].id} on cpu generates"):
        bench_gpu.bench_gpu(bench_gpu.DRY_RUN, 60, keep=lambda *_: None)


def test_the_gpu_benchmark_keeps_what_there_is_and_stops_when_the_time_is_up(monkeypatch, capsys):
    kept, clock = [], iter([0.0, 0.0, 1.0, 99.0])
    monkeypatch.setattr(bench_gpu, "check", lambda setting: None)
    monkeypatch.setattr(bench_gpu, "throughput", lambda chapter, *_: {"error": f"{chapter.id} was measured"})
    monkeypatch.setattr(bench_gpu, "peer", lambda *_: {"error": "none here"})
    monkeypatch.setattr(bench_gpu, "decode_steps", lambda *_: [])
    monkeypatch.setattr(bench_gpu, "time", SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter))
    bench_gpu.bench_gpu(bench_gpu.DRY_RUN, 50, keep=lambda found, measured: kept.append([each.id for each in measured]))
    last, before = CHAPTERS[-1].id, CHAPTERS[-2].id
    # After each throughput, Hugging Face's, and the steps of each engine.
    others = [[last, before]] * (1 + len(bench_gpu.decoders(CHAPTERS[-2])))
    assert kept == [[last]] * (2 + len(bench_gpu.decoders(CHAPTERS[-1]))) + others
    assert f"time is up; not measured: {CHAPTERS[-3].id}, " in capsys.readouterr().out


def test_decode_steps_are_timed_with_and_without_what_made_them_faster():
    timed = {name: options for chapter in CHAPTERS for name, options in bench_gpu.decoders(chapter).items()}
    last = CHAPTERS[-1].id
    assert timed == {"v13": {}, "v14": {}, last: {}, f"{last}_eager": {"graphs": False}}


def test_what_comes_before_the_first_request_is_timed_apart(monkeypatch, capsys):
    engine, ticks, free = SimpleNamespace(warm_up=lambda: free.append(2**30)), iter([10.0, 13.5]), [2**31]
    monkeypatch.setattr(bench_gpu, "finished", lambda device: next(ticks))
    monkeypatch.setattr(bench_gpu, "free_bytes", lambda device: free[-1])
    start = bench_gpu.warmed_up(engine, "cuda")
    assert start == {"warm_up_s": 3.5, "warm_up_mib": 1024.0}
    assert bench_gpu.warmed_up(object(), "cuda") == {}
    row = {"requests": 3, "tokens": 40, "seconds": [2.0], "tokens_per_s": 20.0}
    for each in (row, row | start):
        bench_gpu.report_row("v15", each)
    without, beside = capsys.readouterr().out.splitlines()
    assert without.split() == ["v15", "3", "40", "2.00", "20"] and beside.split() == [*without.split(), "3.50", "1,024"]


def test_a_step_with_a_piece_of_a_prompt_is_not_timed_as_a_decode_step(monkeypatch):
    real = bench_gpu.engine_of
    monkeypatch.setattr(bench_gpu, "engine_of", lambda *args, **options: real(*args, **options | {"max_num_batched_tokens": 9}))
    with pytest.raises(AssertionError, match="2 decode steps of 3 sequences fed"):
        bench_gpu.decode_steps(CHAPTERS[-1], {}, checkpoint("llama"), bench_gpu.DRY_RUN, bytes_per_s=1e6)


def test_a_chapter_gets_as_many_requests_as_it_can_use(monkeypatch):
    shares = [bench_gpu.share(chapter, bench_gpu.GPU) for chapter in CHAPTERS]
    assert shares[0] == 1 and shares[-1] == 256 and shares == sorted(shares)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is refused")
def test_without_a_gpu_the_measurement_is_refused(capsys):
    for argv in ([], ["--dry-run", "--write"]):
        with pytest.raises(SystemExit):
            bench_gpu.main(argv)
    assert "--dry-run checks the command without one" in capsys.readouterr().err


def test_a_decode_step_stands_beside_the_bytes_it_must_read(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(bench_gpu, "finished", lambda device: 12.0 * next(ticks))
    rows = bench_gpu.decode_steps(CHAPTERS[-1], {}, checkpoint("llama"), bench_gpu.DRY_RUN, bytes_per_s=1e6)
    engine = CHAPTERS[-1].load().Engine(checkpoint("llama"), dtype="float32")
    weights = weight_bytes(engine.model)
    for row, (size, context) in zip(rows, bench_gpu.DRY_RUN.decode, strict=True):
        assert row["step_ms"] == 1e3 * 12.0 / 2, "two steps are timed"
        # In the two steps each sequence has context + 2 and context + 3 positions; a position has 2 * 3 * 2 * 14 floats.
        floor_s = (weights + size * (context + 2.5) * 2 * 3 * 2 * 14 * 4) / 1e6
        assert row["floor_ms"] == pytest.approx(1e3 * floor_s, rel=1e-3)
        assert row["share"] == pytest.approx(floor_s / 6.0, abs=1e-3)


def test_sequences_that_have_no_room_are_not_timed(monkeypatch):
    monkeypatch.setattr(bench_gpu, "DRY_RUN", dataclasses.replace(bench_gpu.DRY_RUN, decode=((8, 20), (2, 5))))
    rows = bench_gpu.decode_steps(CHAPTERS[-1], {}, checkpoint("llama"), bench_gpu.DRY_RUN, bytes_per_s=1e6)
    assert rows[0] == {"sequences": 8, "context": 20, "error": "only 4 sequences fit into the cache"} and "step_ms" in rows[1]


def test_a_contestant_that_does_not_fit_is_reported_and_another_has_its_share(monkeypatch, capsys):
    real, too_large = bench_gpu.engine_of, first_with("max_num_seqs")

    def engine_of(chapter, *more, **options):
        if chapter is too_large:
            raise ValueError("a slab of 14 GiB\ndoes not fit")
        return real(chapter, *more, **options)

    monkeypatch.setattr(bench_gpu, "engine_of", engine_of)
    requests = [Request([9] * 3, 4), Request([8] * 5, 2), Request([7], 5)]
    path, rows = checkpoint("llama"), {}
    for chapter in (CHAPTERS[0], too_large, CHAPTERS[-1]):
        rows[chapter.id] = bench_gpu.throughput(chapter, path, requests, bench_gpu.DRY_RUN)
    rows["HF continuous"] = bench_gpu.peer(path, requests, bench_gpu.DRY_RUN)
    first, failed, last, peer = rows.values()
    assert failed == {"error": "a slab of 14 GiB does not fit"}
    assert [row["tokens"] for row in (first, last, peer)] == [4, 11, 11]
    for row in (first, last):
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / min(row["seconds"]), rel=0.05)
    for name, row in rows.items():
        bench_gpu.report_row(name, row)
    assert f"{too_large.id}             a slab of 14 GiB does not fit" in capsys.readouterr().out


def test_a_peer_that_takes_too_long_is_reported():
    from shared.bench.peers import ContinuousBatching

    batching = ContinuousBatching(checkpoint("llama"), 2048)
    try:
        with pytest.raises(RuntimeError, match="was not done after 0.01 s: 0 of 2 requests"):
            batching.generate([Request([9] * 3, 200)] * 2, seconds=0.01)
    finally:
        batching.stop()


def test_time_in_two_calls_of_a_part_adds_up(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0])
    monkeypatch.setattr(bench_overhead.time, "perf_counter", lambda: next(clock))
    spent = {"part": 0.0}
    run = bench_overhead.clocked(lambda: None, spent, "part")
    run()
    run()
    assert spent["part"] == 4.0


def test_every_function_that_a_step_calls_is_in_one_part():
    """Timed functions are called by `advance`, directly or not, and do not nest; choosing has two of them."""
    named = [name for functions in bench_overhead.PARTS.values() for _, name in functions]
    names = ["accepts", "build", "build_batch", "commit", "compute_logits", "forward", "sample", "schedule", "top_logprobs"]
    assert sorted(named) == names


def test_a_step_of_sixteen_is_not_asked_of_chapters_that_take_one(capsys):
    with pytest.raises(SystemExit):
        bench.main(["decode", "v02", "v04"])
    assert "decode measures a step of 16 sequences, and v02 runs one at a time" in capsys.readouterr().err
