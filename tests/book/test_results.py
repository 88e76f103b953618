"""Results: a row for each kind of machine, and what happens to it when the measured code changes."""
import json

import pytest

from shared import machine, results
from shared.book.claims.markdown import read_result
from shared.book.claims.result_tables import arrivals, overhead, serving, serving_profile, suite
from shared.book.pictures import draw_all

from .conftest import row


@pytest.fixture
def book(make_book, first):
    return make_book(first, first)


@pytest.fixture
def measured_on(monkeypatch):
    """A function that pretends that this machine is of a given kind."""

    def measured_on(kind, date):
        monkeypatch.setattr(machine, "kind", lambda gpu: "gpu" if gpu else kind)
        monkeypatch.setattr(machine, "machine", lambda gpu: f"a machine with {kind}, 2 cores, Python 3.11.7")
        monkeypatch.setattr(machine, "today", lambda: date)

    return measured_on


def change(chapter, old, new):
    path = chapter.path / "cache.py"
    path.write_text(path.read_text().replace(old, new))


def test_a_measurement_replaces_the_row_of_its_kind_and_leaves_the_others(book, measured_on):
    for kind, date, speed in (("avx2", "2000-01-01", 1), ("avx512", "2000-01-03", 2), ("avx2", "2000-01-02", 3)):
        measured_on(kind, date)
        path = results.write_row("speed", {"v01": {"tok_s": speed}}, "measure", book.chapters[:1], book=book)
    measured_on("gpu", "2000-01-01")
    results.write_row("speed", {"v01": {"tok_s": 4}}, "measure", book.chapters[:1], gpu=True, book=book)
    rows = results.rows_of(path)
    assert list(rows) == ["avx512", "avx2", "gpu"]
    assert [found["v01"]["tok_s"] for found in rows.values()] == [2, 3, 4]
    assert rows["avx2"]["code"] == {"v01": results.code_hash(book.chapters[0].path)}
    assert results.cited(rows) is rows["avx512"], "the newest"
    assert read_result(book, "speed.json#v01.tok_s") == "2" and read_result(book, "speed.json@gpu#v01.tok_s") == "4"
    with pytest.raises(ValueError, match="has no row for arm; it has avx512, avx2, gpu"):
        read_result(book, "speed.json@arm#v01.tok_s")


def test_of_two_rows_of_one_day_the_one_with_more_chapters_is_cited(book, measured_on):
    for kind, count in (("avx512", 1), ("avx2", 2)):
        measured_on(kind, "2000-01-01")
        path = results.write_row("speed", {"v01": {"tok_s": count}}, "measure", book.chapters[:count], book=book)
    assert results.cited(results.rows_of(path))["v01"]["tok_s"] == 2
    measured_on("avx512", "2000-01-01")
    results.write_row("speed", {"v01": {"tok_s": 3}}, "measure", book.chapters[:2], book=book)
    assert results.cited(results.rows_of(path))["v01"]["tok_s"] == 3, "the first"


def test_a_figure_is_old_when_the_code_of_its_chapter_has_changed_and_words_do_not_count(book, measured_on):
    measured_on("avx2", "2000-01-01")
    figures = {name: {"tok_s": 7, "passes": 9} for name in ("v01", "v02")} | {"limits": {"gb_per_s": 5}, "together": 3}
    results.write_row("speed", figures, "measure", book.chapters, book=book)
    tokens = ("v01.tok_s", "v02.tok_s", "v01.passes", "limits.gb_per_s", "together", "date")

    def shown():
        return [read_result(book, f"speed.json#{token}") for token in tokens]

    assert shown() == ["7", "7", "9", "5", "3", "2000-01-01"]
    change(book.chapters[0], '"""Bytes of n entries."""', '"""What n entries take."""  # in bytes\n')
    assert shown() == ["7", "7", "9", "5", "3", "2000-01-01"]
    change(book.chapters[0], "n * SIZE", "n * SIZE + 1")
    # A test repeats the counts. Results without a chapter's name are about both.
    assert shown() == ["7 (old)", "7", "9", "5", "3 (old)", "2000-01-01"]
    change(book.chapters[0], "n * SIZE + 1", "n * SIZE")
    assert shown() == ["7", "7", "9", "5", "3", "2000-01-01"]


def test_a_result_that_every_machine_gives_has_no_rows(book, measured_on):
    measured_on("avx2", "2000-01-01")
    path = results.write("counts", {"v01": 3}, "count", book)
    assert list(results.rows_of(path)) == [""] and results.rows_of(path)[""]["v01"] == 3
    change(book.chapters[0], "n * SIZE", "n * SIZE + 1")
    assert read_result(book, "counts.json#v01") == "3"


def test_what_is_long_has_a_line_for_each_of_its_parts(tmp_path):
    long = [{"name": "x" * 60, "n": n} for n in range(30)]
    path = results.store(tmp_path / "a.json", {"short": [1, 2], "long": long})
    assert json.loads(path.read_text()) == {"short": [1, 2], "long": long}
    assert len(path.read_text().splitlines()) == 2 + 1 + 2 + 30


def test_a_table_has_the_rows_there_are_and_says_which_are_old(book):
    took = {"times_hf": 1.5, "share_of_limit": 0.25, "cpu_ms": 10.0}
    works = {"pocket": {"single": {"v01": took, "v02": took | {"times_hf": 2.0}}}}
    works["arrivals"] = {"v01": {"ttft_ms_p50": 1.0, "ttft_ms_p95": 2.0, "seconds": 3.0}}
    now = {chapter.id: results.code_hash(chapter.path) for chapter in book.chapters}
    rows = row(works, "avx512", "2000-01-02", now) | row(works, "avx2", "2000-01-01", now | {"v02": "another"})
    book.results.mkdir(parents=True)
    (book.results / "suite.json").write_text(json.dumps(rows))
    assert suite(book, None) == [
        "| | v01 | v02 |",
        "|---|---:|---:|",
        "| *AVX512: avx512 machine, 2000-01-02* |  |  |",
        "| pocket, single | 1.50 (25%) | 2.00 (25%) |",
        "| *AVX2: avx2 machine, 2000-01-01* |  | old |",
        "| pocket, single | 1.50 (25%) | 2.00 (25%) |",
    ]
    assert "| *AVX2: avx2 machine, 2000-01-01; old, since the code has changed: v02* | | | | |" in arrivals(book, None)
    with pytest.raises(ValueError, match="there is no overhead.json; run `python -m shared.bench overhead --write`"):
        overhead(book, None)


def test_a_picture_says_on_what_it_was_measured_and_what_of_it_is_old(book):
    figures = {name: {"64": {"wall_ms": 1.0}, "128": {"wall_ms": 2.0}} for name in ("v01", "v02")}
    book.results.mkdir(parents=True)
    (book.results / "growth.json").write_text(json.dumps(row(figures, code={"v01": "another"})))
    drawn = draw_all(book)["growth.svg"]
    assert "AVX512: avx512 machine, 2000-01-01; old, since the code has changed: v01" in drawn


def test_the_tables_of_a_server_name_the_chapter_where_it_is_not_the_texts_own(book):
    def figures(**medians):
        return {name: {"median": value, "low": 0.9 * value, "high": 1.1 * value} for name, value in medians.items()}

    sized = {
        "tokens": 9,
        "alone": figures(tokens_per_s=2000.0, engine_us=500.4),
        "thread": figures(tokens_per_s=1000.0, engine_us=600.0, front_us=200.0, client_us=30.0, wall_us=1000.0),
        "process": figures(tokens_per_s=1500.0, engine_us=600.0, front_us=200.0, client_us=30.0, wall_us=700.0),
        "share": figures(thread=0.5, process=0.75),
    }
    groups = {"loop": {"share": 0.75, "us": 150.0}, "tokenizer": {"share": 0.25, "us": 50.0}}
    profile = {"streams": 16, "samples": 1234, "groups": groups}
    measured = {"http": "h11", "1": sized, "16": sized, "profile": {"thread": profile, "process": profile}}
    book.results.mkdir(parents=True)
    (book.results / "serving.json").write_text(json.dumps(row({"v02": measured}, code={"v02": "another"})))
    old = "old, since the code has changed: v02"
    cells = "2,000 | 1,000 | 50% (45% to 55%) | 500 | 600 | 200 | 30 | 1,000 |"
    assert serving(book, book.chapters[1])[2:] == [
        f"| *AVX512: avx512 machine, 2000-01-01; {old}* | | | | | | | | |",
        f"| thread, 1 stream | {cells}",
        f"| thread, 16 streams | {cells}",
    ], "a chapter without an engine process has only one way to run it"
    assert serving(book, book.chapters[0])[3] == f"| v02, thread, 1 stream | {cells}" == serving(book, None)[3]
    assert serving(book, None)[4] == "| v02, process, 1 stream | 2,000 | 1,500 | 75% (68% to 82%) | 500 | 600 | 200 | 30 | 700 |"
    assert serving_profile(book, book.chapters[1])[2:] == [
        f"| *AVX512: avx512 machine, 2000-01-01; thread, 16 streams, 1,234 samples; {old}* | | |",
        "| event loop: asyncio, select | 75% | 150 |",
        "| the tokenizer's thread | 25% | 50 |",
    ]
    assert "v02, thread, 16 streams, 1,234 samples" in serving_profile(book, None)[2]
