"""The explained diffs: text beside code, the values that names held, what is folded."""
import re

import pytest

from shared.book.site import build, diff_pages, line_values
from shared.book.traps import answers
from shared.book.traps.seeded_bugs import Trap, read_traps
from shared.chapters import BOOK, CHAPTERS, find, first_with

TEXT = """# Two

## The diff

Before all.

### Remembering

Why it is remembered.

<!-- diff: cache.py::Cache.write -->
```diff
+old
```
<!-- end -->

What follows from it.

### Forgetting

Why it is forgotten.

<!-- traps: -->
- **a list of bugs**
<!-- end -->

<!-- diff: cache.py::cost -->

```python
## no heading
```

## Run it

Not about the diff.
"""


def test_words_stand_with_the_change_they_are_about():
    first, second = diff_pages.sections(TEXT)
    assert first.heading == ["### Remembering"] and second.heading == ["### Forgetting"]
    assert (first.claims[0].before, first.claims[0].after) == ("Why it is remembered.", "What follows from it.")
    assert second.claims[0].before == "Why it is forgotten.", "the list of traps is beside the code"
    assert second.claims[0].after == "```python\n## no heading\n```", "a comment in code is not a heading"


def test_a_page_has_each_changed_line_once_and_folds_what_is_far_from_a_change(make_book, first):
    then = dict(first)
    far = "".join(f"    x{n} = {n}\n" for n in range(12))
    first["cache.py"] = first["cache.py"].replace("    return n * SIZE\n", f"{far}    return n * SIZE\n")
    then["cache.py"] = first["cache.py"].replace("return n * SIZE", "return n * SIZE + 1")
    text = "# Two\n\n### Cost\n\nIt costs one more <b>.\n\n<!-- diff: cache.py::cost -->\n"
    book = make_book(first, then | {"README.md": text})
    page = diff_pages.page(book, book.chapters[1], {}, {})
    plain = re.sub("<[^>]*>", "", page)
    assert page.count('class="l del"') == 1 and page.count('class="l add"') == 1
    assert "\u2212    return n * SIZE" in plain and "+    return n * SIZE + 1" in plain
    assert "11 unchanged lines" in plain
    assert "It costs one more <b>." in page
    assert 'href="../../v02_b/files/cache/#L18"' in page
    where = [n for n, line in enumerate((book.chapters[1].path / "cache.py").read_text().splitlines(), 1) if "SIZE + 1" in line]
    held = {"n": {0: "3"}, "SIZE": {1: "4", 2: "5"}}
    page = diff_pages.page(book, book.chapters[1], {"v02": {("cache.py", where[0]): held}}, {})
    assert 'data-held="n&#10;v02, before  3">n</span>' in page
    assert 'data-held="SIZE&#10;v02, step 1  4&#10;v02, step 2  5">SIZE</span>' in page


def names_shown(text, held):
    [line] = diff_pages.numbered(text, 1, "f.py", BOOK.chapters[0], {"v01": {("f.py", 1): {name: {1: "0"} for name in held}}})
    return re.findall('data-held="([^&]*)&#10;v01, step 1  0"[^>]*>([^<]*)<', diff_pages.code_html(line))


def test_a_chain_of_attributes_is_distinguished_from_its_parts():
    assert names_shown("a.b.c = d", ["a.b.c", "b", "d"]) == [("a.b.c", "c"), ("d", "d")]
    assert names_shown("x[0].d = f().d + d", ["d"]) == [("d", "d")], "the owner of an attribute after a bracket is unknown"


TRAPS = """
[[trap]]
name = "free"
file = "cache.py"
unit = "cost"
find = "n * SIZE"
replace = "n"
test = "t"
sees = "All is <free>."

[[trap]]
name = "forgets"
file = "cache.py"
unit = "Cache.write"
find = "= number"
replace = "= 0"
test = "t"
sees = "Nothing is kept."
"""


def test_traps_stand_with_their_unit_and_the_others_at_the_end(make_book, first):
    then = dict(first)
    then["cache.py"] = first["cache.py"].replace("return n * SIZE", "return n * SIZE + 1").replace("class Cache", "class Gone").replace("    def write", "    def put")
    text = "# Two\n\n### Cost\n\nWhy.\n\n<!-- diff: cache.py::cost -->\n\n### All\n\nMore.\n\n<!-- diff: cache.py::Cache.write, cache.py::Gone.put -->\n"
    book = make_book(first, then | {"README.md": text}, beside={"tests/traps/v02.toml": TRAPS.replace("Cache.write", "Gone.__init__").replace("= number", "= {}").replace("= 0", "= 1")})
    says = {"v02/free": {"same": True}, "v02/forgets": {"question": "q", "answer": "<a>"}}
    page = diff_pages.page(book, book.chapters[1], {}, says)
    cost, rest = page.split("### All")
    assert "<b>free</b>: All is &lt;free&gt;." in cost and "The model gives the same answers." in cost and "forgets" not in cost
    shown, end = rest.split("### Bugs in unchanged code")
    assert "<b>" not in shown and "<b>forgets</b>" in end and "q \u2192 &lt;a&gt;" in end
    # Removed lines are looked up in the old chapter, new lines in the new one.
    assert 'href="../../v01_a/files/cache/#L14"' in shown and 'href="../../v02_b/files/cache/#L14"' in shown
    removed = re.findall(r"<summary>.*?</summary>", shown)
    assert '<span class="plus">+0</span> <span class="minus">\u22122</span>' in removed[0]
    assert '<span class="plus">+2</span> <span class="minus">\u22120</span>' in removed[1]
    assert cost.index('class="l del"') < cost.index('class="l add"')


def test_a_line_of_both_chapters_shows_both_values():
    old = diff_pages.Line([], 1, {"n": [("v01", {1: "3"})], "gone": [("v01", {1: "1"})]})
    new = diff_pages.Line([], 2, {"n": [("v02", {1: "4"})]})
    assert diff_pages.both(old, new).values == {"n": [("v01", {1: "3"}), ("v02", {1: "4"})], "gone": [("v01", {1: "1"})]}


def test_markup_in_code_and_values_stays_text():
    lines = diff_pages.numbered("a = '<script>' & b\n", 1, "f.py", BOOK.chapters[0], {"v01": {("f.py", 1): {"a": {1: "'<b>'"}}}})
    html = diff_pages.line_html(lines[0], "same")
    assert "<script>" not in html and "<b>" not in html and "&lt;script&gt;" in html and "&lt;b&gt;" in html


def test_values_are_those_of_the_first_two_steps():
    # From the next chapter on, a step in which each request feeds one token is built elsewhere.
    chapter = first_with("graphs").previous
    values = line_values.record(chapter)
    source = (chapter.path / "batch.py").read_text().splitlines()
    [line] = [n for n, text in enumerate(source, 1) if text.strip() == "token_ids += new_ids"]
    # The questions have 11 and 10 tokens; then each feeds one token per step.
    held = values["batch.py", line]["new_ids"]
    assert set(held) == {1, 2}
    assert re.fullmatch(r"list of 11: 0 3 \d+ \d+ \.\.\.", held[1]) and re.fullmatch(r"list of 1: \d+", held[2])
    assert all(set(steps) <= {0, 1, 2} for names in values.values() for steps in names.values())
    # A statement that ends its function is recorded too.
    returns = [n for n, text in enumerate((chapter.path / "cache.py").read_text().splitlines(), 1) if text.strip() == "return block_ids"]
    assert values["cache.py", returns[0]]["block_ids"][1] == "list of 1: 0"


def test_names_are_those_of_the_statement_alone():
    source = "for a in b.c:\n    d = e(\n        f.g,\n    )\nif h:\n    pass\ndef i(j): return k\n"
    found = line_values.names_by_line(source)
    assert set(found[1]) == {"a", "b.c", "b"} and set(found[2]) == {"d", "e", "f.g", "f"} and found[5] == ("h",)


def test_a_link_that_leads_nowhere_stops_the_site(make_book, first, tmp_path):
    book = make_book(first, beside={"README.md": "[a](milestones/v01_a/cache.py) [b](https://x.y) [c](#d)\n"})
    text = book.root / "README.md"
    assert build.for_site(book, text, tmp_path / "pages") == "[a](milestones/v01_a/files/cache.md) [b](https://x.y) [c](#d)\n"
    for wrong in ("nothing.md", "milestones/v01_a/gone.py", "docs"):
        (book.root / "docs").mkdir(exist_ok=True)
        text.write_text(f"[a]({wrong})\n")
        with pytest.raises(build.BrokenLink, match=wrong):
            build.for_site(book, text, tmp_path / "pages")
    text.write_text("```\n[a](nothing.md)\n```\n")
    assert "nothing.md" in build.for_site(book, text, tmp_path / "pages"), "code is left alone"


def test_dead_links_of_a_built_site_are_reported(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "index.html").write_text('<a href="b/">1</a><a href="b/#here">2</a><a href="b/#there">3</a><img src="c.png"><a href="mailto:d">')
    (tmp_path / "b" / "index.html").write_text('<p id="here"></p><a href="..">4</a><a href="#nowhere">5</a>')
    assert build.dead_links(tmp_path) == [
        "b/index.html: #nowhere has no such anchor",
        "index.html: b/#there has no such anchor",
        "index.html: c.png does not exist",
    ]


def test_an_answer_belongs_to_one_bug():
    book = BOOK
    assert answers.stale(book) == []
    trap = read_traps(book.chapters[0].traps)[0]
    other = Trap(**(vars(trap) | {"replace": trap.replace + " "}))
    assert answers.key(trap) != answers.key(other)
    sound = [f"answer {n}" for n in range(len(answers.QUESTIONS + answers.OTHERS))]
    assert answers.told(sound, list(sound)) == {"same": True}
    assert answers.told(sound, ["", *sound[1:]])["answer"] == "(nothing)"
    assert answers.told(sound, [*sound[:-1], "x"]) == {"question": answers.OTHERS[-1], "answer": "x"}
    assert answers.told(sound, "(KeyError: 2)")["answer"] == "(KeyError: 2)"


def test_an_answer_that_is_missing_or_of_another_bug_is_reported(make_book, first):
    trap = '[[trap]]\nname = "n"\nfile = "cache.py"\nunit = "cost"\nfind = "n * SIZE"\nreplace = "n"\ntest = "t"\nsees = "s"\n'
    book = make_book(first, beside={"tests/traps/v01.toml": trap, f"docs/results/{answers.FILE}": '{"answers": {"v01/gone": {"key": "x"}}}'})
    assert answers.stale(book) == ["v01/n", "v01/gone"]


def test_a_chapter_is_found_by_its_traps_page():
    page = build.traps_page(BOOK, {"v01/scale missing": {"question": "q", "answer": "a | b"}})
    assert page.count("\n## v") == len(CHAPTERS)
    assert "| a \\| b |" in page
    assert find("v01").name in page
