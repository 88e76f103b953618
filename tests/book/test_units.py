"""Units: a chapter split into its units, and two chapters compared."""
import pytest

from shared.book.diff import changes_of, count, diff_lines, main, show
from shared.book.units import compare, expand, misplaced, parse, read_units

SOURCE = '''\
"""What is remembered."""
import math

SIZE = 4  # entries


# The oldest is the first to go.
@decorated
class Cache:
    """Numbers by name."""

    field: int = 3

    # Reads are counted.
    @property
    def size(self):
        return self._size

    @size.setter
    def size(self, value):
        self._size = value

# Stands alone.

def cost(n):
    """Bytes."""

    return n * SIZE


if True:
    LATE = 1
'''


def kinds(old, new):
    return {c.address: c.kind for c in compare(parse(old, "a.py"), parse(new, "a.py")) if c.kind != "identical"}


def varied(old, new):
    assert SOURCE.count(old) == 1
    return kinds(SOURCE, SOURCE.replace(old, new))


def test_a_file_is_taken_apart_into_its_units():
    units = parse(SOURCE, "a.py")
    assert list(units) == ["a.py", "a.py::Cache", "a.py::Cache.size", "a.py::cost"]
    assert units["a.py"].text.splitlines()[0] == '"""What is remembered."""'
    assert units["a.py"].text.splitlines()[-1] == "    LATE = 1"
    assert units["a.py::Cache"].text.startswith("# The oldest is the first to go.\n@decorated\nclass Cache:")
    assert units["a.py::Cache"].text.endswith("field: int = 3")
    assert units["a.py::Cache.size"].text.startswith("    # Reads are counted.\n    @property")
    assert units["a.py::Cache.size"].text.endswith("self._size = value")
    assert units["a.py::cost"].text == 'def cost(n):\n    """Bytes."""\n\n    return n * SIZE'
    assert "# Stands alone." in units["a.py"].text


def test_a_chapter_is_read_with_its_packages_and_without_caches(make_book):
    files = ("b.py", "kernels/a.py", ".ipynb_checkpoints/b.py", "__pycache__/b.py")
    [chapter] = make_book({name: "A = 1\n" for name in files}).chapters
    assert list(read_units(chapter.path)) == ["b.py", "kernels/a.py"]


def test_every_line_belongs_to_one_unit():
    owned = [line for unit in parse(SOURCE, "a.py").values() for line in unit.text.splitlines() if line]
    assert sorted(owned) == sorted(line for line in SOURCE.splitlines() if line)


def test_each_kind_of_change_is_distinguished_from_the_others():
    assert varied("n * SIZE", "n + SIZE") == {"a.py::cost": "changed"}
    assert varied("field: int = 3", "field: int = 4") == {"a.py::Cache": "changed"}
    assert varied("SIZE = 4", "SIZE = 5") == {"a.py": "changed"}
    assert varied("self._size = value", "self._size = int(value)") == {"a.py::Cache.size": "changed"}
    assert varied("import math\n", "import math\nimport sys\n") == {"a.py": "imports"}
    assert varied("def cost(n)", "def price(n)") == {"a.py::price": "added", "a.py::cost": "removed"}
    assert kinds(SOURCE, SOURCE) == {}


@pytest.mark.parametrize(
    "old, new, address",
    [
        ('"""Bytes."""', '"""Octets."""', "a.py::cost"),
        ("# Reads are counted.", "# Reads are numbered.", "a.py::Cache.size"),
        ("# The oldest is the first to go.", "# The oldest goes first.", "a.py::Cache"),
        ('"""What is remembered."""', '"""What is kept."""', "a.py"),
        ("import math", "import math  # for later", "a.py"),
        ("n * SIZE", "(n * SIZE)", "a.py::cost"),
        ("n * SIZE", "n  *  SIZE", "a.py::cost"),
    ],
)
def test_a_change_of_words_is_cosmetic(old, new, address):
    assert varied(old, new) == {address: "cosmetic"}


def test_a_string_that_is_not_a_docstring_is_code():
    assert varied("return self._size\n", 'return "a"\n') == {"a.py::Cache.size": "changed"}


def test_units_that_changed_places_are_reported():
    old = "def a():\n    pass\n\n\ndef b():\n    pass\n"
    new = "def b():\n    pass\n\n\ndef a():\n    pass\n"
    assert kinds(old, new) == {}
    assert misplaced(parse(old, "a.py"), parse(new, "a.py")) == [
        "a.py::b is where a.py::a was before; units must keep their order"
    ]


def test_blank_lines_between_units_are_reported():
    old, new = "def a():\n    pass\n\n\ndef b():\n    pass\n", "def a():\n    pass\n\ndef b():\n    pass\n"
    assert misplaced(parse(old, "a.py"), parse(new, "a.py")) == ["a.py::b has 1 blank lines above it, and had 2"]


def test_a_unit_between_two_others_moves_neither():
    old, new = "A = 1\n\n\ndef b():\n    pass\n", "A = 1\nB = 2\n\n\ndef c():\n    pass\n\n\ndef b():\n    pass\n"
    assert misplaced(parse(old, "a.py"), parse(new, "a.py")) == []


def test_a_constant_between_two_functions_moves_no_later_one():
    old = "A = 1\n\n\ndef b():\n    pass\n\n\ndef c():\n    pass\n\n\nD = 4\n"
    new = old.replace("def c", "NEW = 2\n\n\ndef c")
    assert kinds(old, new) == {"a.py": "changed"}
    assert misplaced(parse(old, "a.py"), parse(new, "a.py")) == []


def test_a_class_s_words_are_distinguished_from_its_methods_code():
    new = SOURCE.replace('"""Numbers by name."""', '"""Numbers."""').replace("self._size = value", "self._size = 0")
    assert kinds(SOURCE, new) == {"a.py::Cache": "cosmetic", "a.py::Cache.size": "changed"}


def test_a_claim_names_several_units_at_once():
    addresses = list(parse(SOURCE, "a.py"))
    assert expand("a.py::cost, a.py::Cache.*", addresses) == ["a.py::cost", "a.py::Cache", "a.py::Cache.size"]
    assert expand("a.py::*", addresses) == addresses
    with pytest.raises(ValueError, match="there is no unit a.py::Cash"):
        expand("a.py::Cash", addresses)


def test_a_diff_names_units_and_folds_what_is_unchanged(make_book, first):
    second = first | {"cache.py": first["cache.py"].replace("n * SIZE", "n * SIZE + 1")}
    second["new.py"] = "class New:\n    def a(self):\n        pass\n"
    book = make_book(first, second)
    changes = {change.address: change for change in changes_of(book.chapters[1])}
    assert diff_lines([changes["cache.py::cost"]]) == [
        "@@ cache.py::cost @@",
        " def cost(n):",
        '     """Bytes of n entries."""',
        "-    return n * SIZE",
        "+    return n * SIZE + 1",
    ]
    assert diff_lines([changes["new.py::New"], changes["new.py::New.a"]]) == [
        "@@ new.py::New @@", "+class New:", "+", "+    def a(self):", "+        pass"
    ]
    assert count(changes["cache.py::cost"]) == (1, 1)
    lines = show(book.chapters[1])
    assert "@@ cache.py::Cache @@" not in lines
    assert lines[-2].split() == "total +4 -1 units: 1 changed, 2 added, 0 removed; 5 lines".split()
    # One blank line between the class and its method, two between units, and a page that is new.
    assert lines[-1].split()[:4] == ["as", "diff", "-u", "counts"]


def test_far_apart_changes_are_two_hunks_of_one_unit(make_book):
    body = [f"    a{n} = {n}" for n in range(20)]
    old = "\n".join(["def f():", *body]) + "\n"
    book = make_book({"a.py": old}, {"a.py": old.replace("a1 = 1\n", "a1 = 2\n").replace("a18 = 18", "a18 = 0")})
    lines = diff_lines([change for change in changes_of(book.chapters[1]) if change.kind == "changed"])
    assert lines.count("@@ a.py::f @@") == 2 and len(lines) == 15 and " " + body[9] not in lines


def test_the_first_chapter_has_no_diff(make_book, first, capsys):
    book = make_book(first)
    assert main(["v01"], book) == 0
    assert capsys.readouterr().out == "v01 is the first chapter, so there is nothing to compare it with\n"
    assert main(["v09"], book) == 2
    assert "there is no chapter 'v09'; the chapters are v01" in capsys.readouterr().err
