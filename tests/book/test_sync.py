"""Texts: generated parts are written and kept up to date, and untrue ones are reported."""
import json

import pytest

from shared.book.claims import generators
from shared.book.claims.markdown import TextError, bare_numbers, fill_blocks, find_claims, read_result
from shared.book.claims.sync import check, main, sync

from .conftest import row

TRAPS = """\
[[trap]]
name = "a number forgotten"
file = "cache.py"
unit = "Cache.write"
find = "= number"
replace = "= 0"
test = "tests/test_a.py::test_a"
sees = \"\"\"
Every number
is nought.\"\"\"
"""

FIRST_TEXT = """\
# A book

It begins here.

<!-- code: cache.py::Cache.* -->

Then it ends.

<!-- unshown: __init__.py, cache.py, cache.py::cost -->
`cost`, `__init__.py` and [cache.py](cache.py) say nothing that the prose does not.
"""


@pytest.fixture
def book(make_book, first):
    """A chapter with a true text."""
    book = make_book(first | {"README.md": FIRST_TEXT})
    sync(book)
    return book


@pytest.fixture
def two(make_book, first):
    """A function that writes a true first chapter and a second with this text and these files."""

    def two(text, **changes):
        second = first | {"README.md": text} | {name.replace("_py", ".py"): source for name, source in changes.items()}
        book = make_book(first | {"README.md": FIRST_TEXT}, second)
        sync(book)
        return book

    return two


def told(book):
    return [str(problem) for problem in check(book)]


def edit(book, old, new, chapter=0):
    page = book.chapters[chapter].text
    assert page.read_text().count(old) == 1
    page.write_text(page.read_text().replace(old, new))


def test_a_true_text_passes_and_is_written_only_once(book):
    assert told(book) == []
    assert sync(book) == ([], [])
    text = (book.chapters[0].path / "README.md").read_text()
    block = text.split("-->\n", 1)[1].split("<!-- end -->")[0]
    assert block.startswith("`cache.py`: `Cache`\n```python\n# The oldest is the first to go.\nclass Cache:\n")
    assert block.endswith("        self.numbers[name] = number\n```\n")


def test_sync_touches_no_line_outside_its_blocks(book):
    page = book.chapters[0].path / "README.md"
    assert fill_blocks(page.read_text(), lambda claim: []).replace("<!-- end -->\n", "") == FIRST_TEXT


def test_a_claim_without_a_block_leaves_what_follows_alone():
    old = "```\nold\n\n<!-- end -->\n```\n<!-- end -->\n"
    text = f"<!-- code: a.py -->\n\nBy hand.\n\n<!-- code: b.py -->\n{old}By hand too.\n"
    assert fill_blocks(text, lambda claim: ["new"]) == (
        "<!-- code: a.py -->\nnew\n<!-- end -->\n\nBy hand.\n\n<!-- code: b.py -->\nnew\n<!-- end -->\nBy hand too.\n"
    )


def test_two_claims_may_stand_one_above_the_other():
    text = "<!-- code: a.py -->\n<!-- code: b.py -->\nold\n<!-- end -->\n"
    assert fill_blocks(text, lambda claim: [claim.what]) == (
        "<!-- code: a.py -->\na.py\n<!-- end -->\n<!-- code: b.py -->\nb.py\n<!-- end -->\n"
    )


def test_an_end_below_a_paragraph_by_hand_is_not_taken_for_the_claim_s():
    with pytest.raises(TextError, match="this `end` belongs to no claim"):
        find_claims("<!-- code: a.py -->\n\nBy hand.\n<!-- end -->\n")


def test_claims_in_code_are_no_claims():
    claim = "<!-- code: a.py -->\n```\n<!-- end -->\n"
    assert find_claims(f"````\n```\n{claim}````\n~~~\n```\n{claim}~~~\n") == []


def test_a_stale_block_is_reported(book):
    source = book.chapters[0].path / "cache.py"
    source.write_text(source.read_text().replace("self.numbers = {}", "self.numbers = dict()"))
    [message] = told(book)
    assert message == "milestones/v01_a/README.md:5: the block of `code: cache.py::Cache.*` is stale; run `make sync`"
    assert sync(book)[0] == [book.chapters[0].path / "README.md"]
    assert told(book) == []


def test_a_block_edited_by_hand_is_reported(book):
    edit(book, "numbers = {}", "numbers = { }")
    assert "is stale" in told(book)[0]


def test_a_claim_without_a_unit_is_reported_and_its_block_left(book):
    edit(book, "code: cache.py::Cache.*", "code: cache.py::Cash.*")
    before = (book.chapters[0].path / "README.md").read_text()
    assert "README.md:5: code: cache.py::Cash.*: there is no unit cache.py::Cash.*" in told(book)[0]
    assert sync(book)[0] == []
    assert (book.chapters[0].path / "README.md").read_text() == before


def test_an_unknown_claim_is_reported(book):
    edit(book, "Then it ends.", "Then it ends.\n\n<!-- coed: cache.py -->")
    assert "there is no claim named 'coed'" in told(book)[0]


def test_an_end_without_a_claim_is_reported(book):
    edit(book, "Then it ends.", "Then it ends.\n\n<!-- end -->")
    assert "this `end` belongs to no claim" in told(book)[0]


def test_every_unit_of_the_first_chapter_is_shown_once(book):
    source = book.chapters[0].path / "cache.py"
    source.write_text(source.read_text() + "\n\ndef late():\n    pass\n")
    assert any("cache.py::late is not shown" in message for message in told(book))
    edit(book, "cache.py::cost -->", "cache.py::cost, cache.py::late, cache.py::Cache -->")
    assert any("cache.py::Cache is shown 2 times" in message for message in told(book))


def test_unshown_units_need_a_reason_and_must_exist(book):
    edit(book, "`cost`, `__init__.py` and [cache.py](cache.py) say nothing that the prose does not.", "")
    assert "has no reason; give it in the paragraph below" in told(book)[0]
    edit(book, "cache.py::cost -->", "cache.py::coast -->")
    assert any("there is no unit cache.py::coast" in message for message in told(book))


@pytest.mark.parametrize("name", ["`cost`", "`__init__.py`", "[cache.py](cache.py)"])
def test_each_unshown_unit_is_named_in_the_prose_below(book, name):
    edit(book, name, "something")
    [message] = told(book)
    assert "the prose below `unshown: __init__.py, cache.py, cache.py::cost` does not name" in message


def test_prose_after_the_next_heading_names_nothing(book):
    edit(book, "`cost`, ", "# On\n\n`cost`, ")
    assert any("does not name cache.py::cost" in message for message in told(book))


CHANGED = "    return n * SIZE + 1"
DIFF = "# Second\n\nIt costs one more.\n\n<!-- diff: cache.py::cost -->\n"


def test_a_changed_unit_has_a_home(two, first):
    book = two("# Second\n", cache_py=first["cache.py"].replace("    return n * SIZE", CHANGED))
    [message] = told(book)
    assert "cache.py::cost is changed since v01 and no text claims it; claim it with `diff:`" in message
    book = two(DIFF, cache_py=first["cache.py"].replace("    return n * SIZE", CHANGED))
    assert told(book) == []
    text = (book.chapters[1].path / "README.md").read_text()
    assert "```diff\n@@ cache.py::cost @@\n def cost(n):\n" in text
    assert "+    return n * SIZE + 1\n```\n<!-- end -->\n" in text


def test_a_file_that_is_no_python_is_named(two, first, capsys):
    book = two("# Second\n")
    (book.chapters[1].path / "cache.py").write_text("<<<<<<< v02\n" + first["cache.py"])
    assert main(["--check"], book) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert "/cache.py:1 is not valid Python: <<<<<<< v02; if this is a propagation's conflict, finish that first" in line


def test_a_changed_unit_has_one_home_and_may_be_seen_again(two, first):
    changed = first["cache.py"].replace("    return n * SIZE", CHANGED)
    book = two(DIFF + "\nAgain.\n\n<!-- diff: cache.py::cost -->\n", cache_py=changed)
    assert ["cache.py::cost is claimed 2 times" in message for message in told(book)] == [True]
    book = two(DIFF + "\nAgain.\n\n<!-- see: cache.py::cost -->\n", cache_py=changed)
    assert told(book) == []


def test_a_home_stands_under_a_paragraph(two, first):
    text = DIFF.replace("It costs one more.\n", "")
    book = two(text, cache_py=first["cache.py"].replace("    return n * SIZE", CHANGED))
    assert ["has no paragraph directly above it" in message for message in told(book)] == [True]


def test_a_claim_of_what_did_not_change_is_reported(two):
    for kind in ("diff", "see", "words"):
        [message, *_] = told(two(f"# Second\n\nWhy.\n\n<!-- {kind}: cache.py::cost -->\n\nBecause.\n"))
        assert "cache.py::cost is the same as in v01" in message


def test_added_and_removed_units_and_files_need_homes_and_imports_do_not(two, first):
    source = first["cache.py"].replace("import math\n", "import math\nimport sys\n")
    source = source.replace("def write", "def put") + "\n\ndef late():\n    pass\n"
    book = two("# Second\n", cache_py=source, new_py='"""New."""\n')
    assert [message.split(": ")[1].split(" since v01 and no text claims it;")[0] for message in told(book)] == [
        "cache.py::Cache.put is added",
        "cache.py::late is added",
        "new.py is added",
        "cache.py::Cache.write is removed",
    ]


def test_a_change_of_words_alone_is_refused_without_a_reason(two, first):
    source = first["cache.py"].replace("Bytes of n entries", "Octets of n entries")
    assert "only comments or docstrings of cache.py::cost differ from v01; undo it" in told(two("# Second\n", cache_py=source))[0]
    assert "claim it with `words:`" in told(two(DIFF, cache_py=source))[0]
    words = DIFF.replace("diff:", "words:")
    assert "has no reason" in told(two(words, cache_py=source))[0]
    assert told(two(words + "\nBytes have become a lie.\n", cache_py=source)) == []
    changed = first["cache.py"].replace("    return n * SIZE", CHANGED)
    assert "cache.py::cost differs from v01 in more than comments and docstrings" in told(two(words + "\nA lie.\n", cache_py=changed))[0]


def test_a_new_unit_may_be_left_to_its_file_with_a_reason_and_a_changed_one_may_not(two, first):
    text = "# Second\n\n<!-- unshown: cache.py::late -->\n\n`late` is read in its file.\n"
    source = first["cache.py"] + "\n\ndef late():\n    pass\n"
    assert told(two(text, cache_py=source)) == []
    assert "has no reason" in told(two(text.replace("`late` is read in its file.", ""), cache_py=source))[0]
    [message] = told(two(text.replace("late", "cost")))
    assert "cache.py::cost is not new but identical since v01" in message
    changed = first["cache.py"].replace("    return n * SIZE", CHANGED)
    assert "cache.py::cost is not new but changed since v01" in told(two(text.replace("late", "cost"), cache_py=changed))[0]
    assert "there is no unit cache.py::lost" in told(two(text.replace("late", "lost"), cache_py=source))[0]


def test_units_in_another_order_are_reported(two, first):
    head, _, cost = first["cache.py"].partition("\n\ndef cost")
    cost = f"def cost{cost}"
    moved = head.replace("# The oldest", f"{cost}\n\n# The oldest")
    messages = told(two("# Second\n", cache_py=moved))
    assert any("units must keep their order (in v01); change it back" in message for message in messages)


def test_a_chapter_without_a_text_is_reported(make_book, first):
    assert told(make_book(first)) == ["milestones/v01_a/README.md:1: is missing; every chapter has a text"]


RESULTS = {"docs/results/speed.json": json.dumps(row({"v01": {"tok_s": 41.678, "a.b": [1, {"c": 12345}]}, "note": "warm"}))}


def test_results_are_filled_from_committed_files(make_book, first):
    text = FIRST_TEXT.replace(
        "It begins here.",
        "It makes <!-- result: speed.json#v01.tok_s .1f --> tok/s\n"
        "and <!-- result: speed.json#v01.a.b.1.c | , -->9<!-- / --> MB;\n"
        "so `<!-- result: x#y -->` is written, <!-- result: speed.json#note -->.",
    )
    book = make_book(first | {"README.md": text}, beside=RESULTS)
    sync(book)
    assert told(book) == []
    shown = (book.chapters[0].path / "README.md").read_text()
    assert "#v01.tok_s .1f -->41.7<!-- / --> tok/s" in shown and "-->12,345<!-- / --> MB" in shown
    assert "`<!-- result: x#y -->`" in shown and "-->warm<!-- / -->" in shown
    edit(book, "41.7", "99.9")
    assert ["a result token shows an old value" in message for message in told(book)] == [True]


@pytest.mark.parametrize(
    "token, why",
    [
        ("speed.json#v02.tok_s", "docs/results/speed.json has no v02.tok_s"),
        ("sped.json#v01", "does not name a file in docs/results/"),
        ("speed.json", "does not name a file in docs/results/"),
        ("speed.json#note .1f", "Unknown format code"),
    ],
)
def test_a_result_that_is_not_there_is_reported(make_book, first, token, why):
    tokens = f"<!-- result: {token} --> ms, <!-- result: speed.json#note --> and\nb <!-- result: {token} -->."
    book = make_book(first | {"README.md": FIRST_TEXT.replace("here.", tokens)}, beside=RESULTS)
    sync(book)
    messages = told(book)
    assert [message.split(":")[1] for message in messages] == ["3", "4"] and all(why in message for message in messages)
    assert "-->warm<!-- / -->" in (book.chapters[0].path / "README.md").read_text()


def test_a_result_at_the_start_of_a_line_is_reported(make_book, first):
    text = FIRST_TEXT.replace("It begins here.", "It takes\n<!-- result: speed.json#v01.tok_s --> ms")
    book = make_book(first | {"README.md": text}, beside=RESULTS)
    assert any("ends the paragraph on GitHub" in message for message in told(book))


def test_a_line_of_prose_that_would_become_a_heading_is_reported(make_book, first):
    book = make_book(first | {"README.md": FIRST_TEXT.replace("It begins here.", "It shipped in [vllm\n#23347](https://x.y).")})
    assert any("as a heading" in message for message in told(book))


@pytest.mark.parametrize(
    "number",
    [
        *("41.7 tok/s", "3 tokens per second", "1,200 GB/s", "3.3 TFLOP/s", "2 MB", "1.5 GiB"),
        *("12 ms", "10-20 ms", "12\nms", "**12** ms", "4 s", "1e-5 s"),
        *("3x", "2.5\u00d7", "2 x faster", "3 times faster", "80 %", "80%"),
    ],
)
def test_a_bare_measured_number_is_reported(number):
    assert len(bare_numbers(f"It takes {number}, or so.\n")) == 1, number


@pytest.mark.parametrize(
    "text",
    [
        "It takes `12 ms` or so.",
        "```\n12 ms\n```",
        "It takes 12 ms <!-- given: the data sheet --> or so.",
        "It takes 12 ms at 3 clients <!-- given: the data sheet -->.",
        "It takes <!-- result: a.json#b -->12<!-- / --> ms.",
        "<!-- it takes 12 ms -->",
        "2 x layers x 16 bytes, 1024 x 1024, v2 models, 3 tokens, 16 bits, 2026",
        "<!-- code: a.py -->\n```\n12 ms\n```\n<!-- end -->",
        "<!-- table: a -->\n| 12 ms |\n<!-- end -->",
        "[it](https://example.org/12 ms)",
    ],
)
def test_other_numbers_are_left_alone(text):
    assert bare_numbers(f"{text}\n") == [] or "(https" in text


def test_each_number_needs_a_source_of_its_own():
    text = "It takes 12 ms and 3 MB <!-- given: there -->.\n\nThen 4 ms.\n\nSee <!-- given: there -->.\n"
    assert bare_numbers(text) == [(1, "12 ms"), (3, "4 ms")]


def test_a_bare_number_fails_the_check(book):
    edit(book, "It begins here.", "It takes 12 ms.")
    [message] = told(book)
    assert message.startswith("milestones/v01_a/README.md:3: '12 ms' has no source; make it a result token, or ")


def test_traps_are_listed_from_their_file(make_book, first):
    claims = "Mistakes:\n\n<!-- traps -->\n\nHere:\n\n<!-- traps: cache.py::Cache.* -->"
    text = FIRST_TEXT.replace("It begins here.", claims)
    book = make_book(first | {"README.md": text}, beside={"tests/traps/v01.toml": TRAPS})
    sync(book)
    assert told(book) == []
    row = "- **a number forgotten** (`cache.py::Cache.write`): Every number is nought.\n<!-- end -->"
    assert (book.chapters[0].path / "README.md").read_text().count(row) == 2
    edit(book, "traps: cache.py::Cache.*", "traps: cache.py::cost")
    assert "traps: cache.py::cost: there is no unit cache.py::cost" in told(book)[0]
    book.chapters[0].traps.unlink()
    assert "there is no tests/traps/v01.toml" in told(book)[0]


def test_tables_are_functions_by_name(book, monkeypatch):
    monkeypatch.setitem(generators.TABLES, "squares", lambda book, chapter: ["| n | n n |", "|---|---|", "| 3 | 9 |"])
    edit(book, "Then it ends.", "<!-- table: squares -->")
    assert "is missing; run `make sync`" in told(book)[0]
    sync(book)
    assert told(book) == []
    text = (book.chapters[0].path / "README.md").read_text()
    assert "<!-- table: squares -->\n| n | n n |\n|---|---|\n| 3 | 9 |\n<!-- end -->\n" in text
    edit(book, "table: squares", "table: cubes")
    assert "there is no table 'cubes'" in told(book)[0]


def test_texts_beside_the_chapters_are_kept_too(two, first):
    book = two(DIFF, cache_py=first["cache.py"].replace("    return n * SIZE", CHANGED))
    page = book.root / "docs" / "deep" / "page.md"
    page.parent.mkdir(parents=True)
    page.write_text("It costs 2 MB.\n\n<!-- code: v01/cache.py::cost -->\n\n<!-- see: v02/cache.py::cost -->\n")
    (book.root / "README.md").write_text("<!-- code: cache.py::cost -->\n")
    sync(book)
    assert "    return n * SIZE\n```" in page.read_text() and "+    return n * SIZE + 1\n```" in page.read_text()
    messages = told(book)
    assert len(messages) == 2 and "must name exactly one chapter" in messages[0] and "'2 MB'" in messages[1]


def test_code_that_contains_a_fence_gets_a_longer_one(make_book):
    source = 'def f():\n    """\n    ```\n    <!-- end -->\n    ```\n    `b`\n    """\n'
    book = make_book({"a.py": source, "README.md": "All:\n\n<!-- code: a.py::* -->\n\nDone.\n"})
    sync(book)
    assert told(book) == []
    assert "````python\n" in (book.chapters[0].path / "README.md").read_text()


def test_a_claim_may_take_several_lines():
    [claim] = find_claims("<!-- code: a.py::B,\n     a.py::c -->\n\nProse.\n")
    assert (claim.what, claim.stop, claim.end) == ("a.py::B, a.py::c", 2, 2)


def test_the_command_fails_where_the_check_does(book, capsys):
    assert main(["--check"], book) == 0
    edit(book, "It begins here.", "It takes 12 ms.")
    assert main(["--check"], book) == 1
    assert capsys.readouterr().out.endswith("1 problems\n")
    assert main(["--chekc"], book) == 2


def test_a_key_with_dots_is_found_whole(make_book, first):
    book = make_book(first, beside={"docs/results/a.json": json.dumps(row({"model.layers.0": {"max": 0.25}}))})
    assert read_result(book, "a.json#model.layers.0.max .0%") == "25%"


# ---- pictures and tables of committed results


RUN = {
    "chapter": "v03_a",
    "places": 2,
    "lengths": [[2, 1]],
    "passes": [{"parts": [{"request": 0, "num_tokens": 2, "useful": 2, "got_token": True, "rows": [0]}], "waiting": [0]}],
}


def test_a_picture_is_what_its_result_draws(book):
    assert not told(book)
    book.results.mkdir(parents=True, exist_ok=True)
    (book.results / "timeline.json").write_text(json.dumps({"command": "c", "date": "today", "v03": RUN, "v04": RUN, "v05": RUN, "v11": RUN, "shared": RUN}))
    assert told(book) == [
        f"docs/pictures/{name}.svg:1: does not match its result; run `make sync`"
        for name in ("v03_timeline", "v04_timeline", "v05_blocks", "v11_blocks", "v12_blocks")
    ]
    changed, problems = sync(book)
    names = ["v03_timeline.svg", "v04_timeline.svg", "v05_blocks.svg", "v11_blocks.svg", "v12_blocks.svg"]
    assert [path.name for path in changed] == names and not problems
    assert not told(book)
    path = book.root / "docs" / "pictures" / "v03_timeline.svg"
    path.write_text(path.read_text().replace("one token", "two tokens"))
    assert told(book) == ["docs/pictures/v03_timeline.svg:1: does not match its result; run `make sync`"]


def stairs(**changes):
    """One chapter's row of the staircase."""
    row = {
        "requests": 3,
        "tokens": 1200,
        "passes": 1000,
        "tokens_per_pass": 1.2,
        "positions": 5000,
        "needed_share": 0.5,
        "kv_bytes": 3 * 2**20,
        "kv_read_bytes": 20_000_000,
        "weight_read_bytes": 3_000_000_000,
        "late_ttft_ms": 0.0,
        "tokens_per_s": 77.4,
        "watched": {"request": 1, "lengths": [4, 2], "life_ms": {"waits": 64.0, "useful": 32.0, "wasted": 32.0}},
    }
    return row | changes


def test_a_cost_card_shows_what_changed_in_bold(two):
    text = "# Next\n\n<!-- table: cost -->\n\n<!-- table: strip -->\n"
    book = two(text)
    assert any("there is no staircase.json" in problem for problem in told(book))
    book.results.mkdir(parents=True, exist_ok=True)
    life = {"waits": 8.0, "useful": 8.0, "rides": 100.0}
    later = stairs(passes=900, watched={"request": 1, "lengths": [4, 2], "life_ms": life})
    (book.results / "staircase.json").write_text(json.dumps(row({"v01": stairs(), "v02": later})))
    cache = book.chapters[1].path / "cache.py"
    cache.write_text(cache.read_text().replace("SIZE = 4  # entries\n", "SIZE = 5  # entries\nMORE = 6\n"))
    sync(book)
    lines = (book.chapters[1].path / "README.md").read_text().splitlines()
    assert "| 3 requests to pocket, 1,200 tokens | v01 | v02 |" in lines
    assert "| forward passes | 1,000 | **900** |" in lines
    # What is the same in both is not a cost of this chapter.
    assert not any(line.startswith(("| positions computed", "| memory reserved")) for line in lines)
    assert "| lines of Python | | 2 added, 1 removed |" in lines
    assert "request 2 of 3, 4 + 2 tokens; one character is at most 2 ms" in lines
    assert f"v01  {'·' * 32}{'░' * 16}{'█' * 16}" in lines
    assert f"v02  {'·' * 4}{'█' * 4}" in lines


def test_a_card_of_a_chapter_that_changes_no_count_shows_no_speed(two):
    book = two("# Next\n\n<!-- table: cost -->\n")
    book.results.mkdir(parents=True, exist_ok=True)
    (book.results / "staircase.json").write_text(json.dumps(row({"v01": stairs(), "v02": stairs(tokens_per_s=500.0)})))
    sync(book)
    card = (book.chapters[1].path / "README.md").read_text().partition("|---|")[2]
    assert [line.split(" | ")[0] for line in card.splitlines()[1:3]] == ["| forward passes, positions, bytes", "| lines of Python"]
    assert "tokens per second" not in card


def test_a_card_has_no_row_and_no_column_of_nothing_but_zeros(two):
    book = two("# Next\n\n<!-- table: cost -->\n\n<!-- table: strip -->\n")
    book.results.mkdir(parents=True, exist_ok=True)
    life = {"waits": 8.0, "useful": 8.0, "rides": 100.0}
    rides = {"watched": {"request": 1, "lengths": [4, 2], "life_ms": life}}
    for first, second, shown in ((0, 0, False), (0, 2**20, True)):
        rows = {"v01": stairs(kv_bytes=first), "v02": stairs(kv_bytes=second, **(rides if shown else {}))}
        (book.results / "staircase.json").write_text(json.dumps(row(rows)))
        sync(book)
        text = (book.chapters[1].path / "README.md").read_text()
        assert ("memory reserved" in text) == ("then rides along" in text) == shown


def test_the_staircase_in_a_text_of_no_chapter(two):
    book = two("# Next\n")
    (book.root / "README.md").write_text("# All\n\n<!-- table: staircase -->\n\n<!-- table: cost -->\n")
    book.results.mkdir(parents=True, exist_ok=True)
    (book.results / "staircase.json").write_text(json.dumps(row({"v01": stairs()})))
    assert any("staircase.json has no v02; run" in problem for problem in told(book))
    (book.results / "staircase.json").write_text(json.dumps(row({"v01": stairs(), "v02": stairs(tokens_per_s=1234.5)})))
    sync(book)
    lines = (book.root / "README.md").read_text().splitlines()
    assert "| [v01](milestones/v01_a/README.md) | 77 | 1,000 | 5,000 | 50% | 3.0\u00a0GB | 3\u00a0MiB | 0\u00a0ms |" in lines
    assert any("a cost card belongs to a chapter" in problem for problem in told(book))
