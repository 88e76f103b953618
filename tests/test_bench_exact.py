"""What the benchmark of exact engines measures and counts."""
from shared.bench import exact
from shared.bench.timing import Timing
from shared.chapters import first_with


def test_ratios_are_of_medians():
    timings = {"v15, fastest": [Timing(1, 1), Timing(1, 2), Timing(1, 9)], "plain": [Timing(1, 4)] * 3, "exact": [Timing(1, 3)] * 3}
    table = exact.rows(timings)
    assert (table["exact_to_before"], table["exact_to_plain"]) == (1.5, 0.75)


def test_it_counts_what_differs(monkeypatch):
    monkeypatch.setattr(exact, "REQUESTS", 12)
    monkeypatch.setattr(exact, "MAX_NEW", 12)
    monkeypatch.setitem(exact.TIGHT, "num_blocks", 24)
    found = exact.differences(first_with("exact"), "llama", "float32")
    assert found["plain"]["logprobs_differ"] > 0 < found["plain"]["largest"] < 1e-3
    assert found["exact"]["logprobs_differ"] == found["exact"]["largest"] == found["exact"]["texts_differ"] == 0
    assert found["exact"]["logprobs"] == 12 * 12 * 3 and found["exact"]["preemptions"] > 0 < found["exact"]["cached_tokens"]


def test_bits_are_those_of_float32():
    assert exact.bits_of(1.0) == "3f800000" and exact.bits_of(-0.0) == "80000000"
    assert exact.bits_of(1 + 2**-23) == "3f800001"


def test_the_request_s_numbers_are_one_kind_only_if_exact(monkeypatch):
    monkeypatch.setattr(exact, "COMPANY", (0, 3, 20))
    found = exact.numbers(first_with("exact"))
    kinds = {way: {tuple(each["bits"] for each in rows) for rows in found[way].values()} for way in ("fastest", "exact")}
    assert len(kinds["exact"]) == 1 < len(kinds["fastest"])
