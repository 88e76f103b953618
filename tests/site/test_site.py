"""The site as readers see it: no link is dead, and everything works in a browser, on a phone too."""
import html
import re

import pytest

from shared.book.site.build import dead_links
from shared.book.traps import answers
from shared.book.traps.seeded_bugs import read_traps
from shared.chapters import BOOK

DIFFS = [f"milestones/{chapter.name}/diff/" for chapter in BOOK.chapters[1:]]
CHAPTERS = [f"milestones/{chapter.name}/" for chapter in BOOK.chapters]
OTHERS = ["", *(f"docs/{name}/" for name in ("trace", "traps", "ARCHITECTURE", "GLOSSARY", "RESULTS", "FROM_VLLM", "TEACHING", "PLAN"))]


def test_every_link_leads_somewhere(built):
    assert dead_links(built) == []
    pages = list(built.rglob("*.html"))
    print(f"\n{len(pages)} pages built, no link dead")
    assert len(pages) > 100


def test_every_chapter_and_every_diff_is_in_the_menu(built):
    home = (built / "index.html").read_text()
    for path in CHAPTERS + DIFFS:
        assert f'href="{path}"' in home, path


@pytest.mark.parametrize("path", OTHERS + CHAPTERS + DIFFS)
def test_a_page_fits_a_phone_and_a_desk_and_does_not_complain(open_page, path):
    page = open_page(path, 390, "dark")
    for width, scheme in ((390, "dark"), (1280, "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        # The menu takes a moment to slide away.
        page.wait_for_function("document.documentElement.scrollWidth <= document.documentElement.clientWidth", timeout=20_000)
    assert page.locator("h1").count() == 1


@pytest.mark.parametrize("path", ["", *CHAPTERS])
def test_a_pictures_words_are_legible_on_a_phone(open_page, path):
    page = open_page(path, 390)
    page.wait_for_function("[...document.images].every(picture => picture.complete)")
    scales = page.evaluate("""[...document.querySelectorAll(".md-content img[src$='.svg']")]
        .map(picture => [picture.src, picture.clientWidth / picture.naturalWidth])""")
    assert scales
    # Their smallest words are 11 px high.
    assert [src for src, scale in scales if 11 * scale < 9] == []


def test_a_diff_folds_and_unfolds(open_page):
    page = open_page("milestones/v05_paged_cache/diff/")
    units, folds = page.locator("details.unit"), page.locator("details.fold")
    assert units.count() > 10 and folds.count() > 0
    assert not folds.first.evaluate("fold => fold.open")
    page.get_by_role("button", name="unfold all").click()
    assert page.evaluate("[...document.querySelectorAll('.hunk details')].every(each => each.open)")
    page.get_by_role("button", name="fold all", exact=True).click()
    assert page.evaluate("[...document.querySelectorAll('.hunk details')].every(each => !each.open)")
    units.first.locator("summary").click(position={"x": 4, "y": 4})
    assert units.first.evaluate("unit => unit.open")


def test_a_name_in_a_diff_shows_what_it_held_before_and_after(open_page):
    page = open_page("milestones/v05_paged_cache/diff/")
    page.get_by_role("button", name="unfold all").click()
    held = page.locator("#held")
    assert held.is_hidden()
    names = page.locator(".l.same .live", has_text="new_ids")
    names.first.hover()
    told = held.inner_text().splitlines()
    assert told[0].endswith("new_ids")
    assert [line.split(",")[0] for line in told[1:]] == ["v04", "v04", "v05", "v05"]
    assert "step 1  list of 11: 0 3" in told[3] and "step 2  list of 1:" in told[4]
    page.mouse.move(2, 2)
    assert held.is_hidden()


def test_the_run_is_replayed(open_page):
    page = open_page("docs/trace/")
    assert page.locator(".replay canvas").count() == len(BOOK.chapters)
    output, told = page.locator(".replay output"), page.locator(".replay .told")
    assert output.inner_text() == "71", "it begins with the whole picture"
    page.get_by_role("button", name="play").click()
    page.wait_for_function("Number(document.querySelector('.replay output').textContent) < 71")
    page.wait_for_function("Number(document.querySelector('.replay output').textContent) >= 3")
    page.get_by_role("button", name="pause").click()
    page.locator(".replay input").evaluate("each => { each.value = each.max; each.dispatchEvent(new Event('input')); }")
    ends = told.all_inner_texts()
    assert ends[0].startswith("71 tokens") and all("10 of 10 requests finished" in each for each in ends)
    passes = [int(re.search(r"after (\d+) forward passes", each)[1]) for each in ends]
    assert passes[:4] == [71, 71, 39, 19]
    drawn = page.locator(".replay canvas").first.evaluate(
        "each => each.getContext('2d').getImageData(0, 0, each.width, each.height).data.some(value => value)"
    )
    assert drawn


def test_one_request_s_bits_change_with_its_company_unless_exact_is_on(open_page):
    page = open_page("docs/bits/")
    slider, told = page.locator(".bits input"), page.locator(".bits section p")
    assert page.locator(".bits output").inner_text() == "alone"
    assert page.locator(".bits mark").count() == 0
    assert told.all_inner_texts() == ["1 kind of numbers so far"] * 2
    marked = []
    for place in range(int(slider.get_attribute("max")) + 1):
        slider.evaluate("(each, value) => { each.value = value; each.dispatchEvent(new Event('input')); }", place)
        off, on = page.locator(".bits section").all()
        marked.append(off.locator("mark").count())
        assert on.locator("mark").count() == 0
        assert all(len(row.inner_text().split("\t")[-1].strip()) == 8 for row in off.locator("tr").all())
    assert sum(map(bool, marked)) > len(marked) / 2
    assert told.nth(0).inner_text() != "1 kind of numbers so far" == told.nth(1).inner_text()


def test_search_finds_a_block_table(open_page):
    page = open_page("")
    page.locator(".md-search__input").first.click()
    page.keyboard.type("block table", delay=20)
    results = page.locator(".md-search-result__item")
    results.first.wait_for(timeout=10_000)
    found = results.all_inner_texts()
    assert any("Memory in blocks" in each for each in found[:3]), found
    page.locator(".md-search-result__link", has_text="Memory in blocks").first.click()
    page.wait_for_url("**/milestones/v05_paged_cache/**")


def test_every_chapter_tells_what_its_bugs_make_the_model_say(built):
    page = html.unescape((built / "docs" / "traps" / "index.html").read_text())
    said = answers.read_answers(BOOK)
    for chapter in BOOK.chapters:
        assert f'id="{chapter.id}"' in page
        for trap in read_traps(chapter.traps):
            assert f"<strong>{trap.name}</strong>" in page
            told = said[f"{chapter.id}/{trap.name}"].get("answer", "the same")
            assert " ".join(told.split()) in " ".join(page.split()), trap.name
