"""The films: what a terminal showed and when, drawn as a picture."""
import xml.etree.ElementTree as ElementTree

import pytest

from shared.book.site import film
from shared.chapters import CHAPTERS


def shown(frame):
    return ["".join(words for words, _, _ in row).rstrip() for row in frame.rows]


def test_a_film_shows_what_was_typed_and_printed_in_order(monkeypatch):
    monkeypatch.setattr(film, "SILENT_S", 0.3)
    command = r"""python3 -c 'print("\033[32mgreen\033[0m <b>"); print(input("say: ").upper())'"""
    frames = film.take("x", film.Film((command,), lines=8, typed=("hello",)))
    assert shown(frames[0])[0] == "$"
    assert shown(frames[3])[0].startswith("$ pyt"[: len(shown(frames[3])[0])])
    assert shown(frames[-1])[1:4] == ["green <b>", "say: hello", "HELLO"]
    assert frames[-1].rows[1][0] == ("green", "green", False)
    assert all(0 <= frame.seconds <= film.LONGEST_PAUSE_S for frame in frames)


def test_what_is_drawn_over_is_seen_as_it_was(monkeypatch):
    command = r"""printf 'one\n'; sleep 0.4; printf '\033[1A\033[2Ktwo\n'"""
    frames = film.take("x", film.Film((command,), lines=6))
    seen = [shown(frame)[1] for frame in frames]
    assert "one" in seen and seen[-1] == "two"


def test_a_picture_of_a_film_is_sound_xml_and_ends_on_its_last_frame():
    frames = [film.Frame(0.5, ((("a <&> b", "red", True),), ())), film.Frame(0.25, ((("c", "default", False),), ()))]
    text = film.svg(frames, 20, 2, "a & b")
    ElementTree.fromstring(text)
    assert "a &lt;&amp;&gt; b" in text and 'fill="#ff7b72" font-weight="bold"' in text
    total = 0.5 + film.LAST_S
    assert f"animation: film {total:.2f}s steps(1, end) infinite" in text
    assert f"{100 * 0.5 / total:.3f}%{{transform:translateY(-56px)}}" in text
    assert "prefers-reduced-motion: reduce) { .film { animation: none; transform: translateY(-56px)" in text


def test_an_unknown_film_is_refused(capsys):
    with pytest.raises(SystemExit):
        film.main(["rave"])
    assert "there is no film rave; the films are race" in capsys.readouterr().err


@pytest.mark.parametrize("name", film.FILMS)
def test_a_film_does_not_show_where_it_was_taken(name):
    assert "make[1]" not in film.PICTURES.joinpath(f"film_{name}.svg").read_text()


def test_the_film_of_the_demo_shows_every_chapter():
    """It is the first picture that a reader sees. After a new chapter: make film ARGS=race"""
    last_words = film.PICTURES.joinpath("film_race.svg").read_text().rpartition("chapters, 24 answers each")[0][-20:]
    assert last_words.split(">")[-1].strip() == str(len(CHAPTERS))
