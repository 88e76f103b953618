"""The recorder, what is counted from it, and what is drawn."""
import json
import re

import pytest

from shared.bench.recorder import Part, Pass, Trace, record
from shared.bench.staircase import staircase_engine
from shared.book import pictures
from shared.chapters import ROOT
from shared.checkpoints import POCKET
from shared.commands import trace
from shared.commands.trace import shared_trace, small_trace, without_times
from shared.results import cited, figures, rows_of
from shared.workloads import Request, fixed

RESULTS = ROOT / "docs" / "results"


def part(request, num_tokens, useful, got_token=True, row=0):
    return Part(request, num_tokens, useful, got_token, [row])


# Two rows: A generates 3 tokens, B generates 1 and rides along once, C waits until A finishes.
HAND_MADE = Trace(
    chapter="v00_by_hand",
    places=2,
    lengths=[(2, 3), (4, 1), (1, 1)],
    passes=[
        Pass([part(0, 4, 2), part(1, 4, 4, row=1)], [0, 1, 2], 1.0),
        Pass([part(0, 1, 1), part(1, 1, 0, False, row=1)], [2], 0.5),
        Pass([part(0, 1, 1)], [2], 0.25),
        Pass([part(2, 1, 1)], [2], 0.125),
    ],
    kv_bytes=0,
)


def test_what_is_counted_from_a_run():
    assert HAND_MADE.num_tokens == 5
    assert HAND_MADE.num_positions == 12
    assert HAND_MADE.num_needed == (2 + 2) + 4 + 1
    assert HAND_MADE.ledger() == [{0: 4, 1: 4}, {0: 1, 1: 1}, {0: 1}, {2: 1}]
    assert HAND_MADE.useful_share() == (2 + 1 + 1 + 1) / (4 * 2)
    assert HAND_MADE.ends() == [3, 1, 4]
    assert [HAND_MADE.seconds_to_first(request) for request in range(3)] == [1.0, 1.0, 1.875]
    assert [HAND_MADE.waits(request) for request in range(3)] == [0, 0, 3]
    assert HAND_MADE.life(1) == [("useful", 1.0), ("wasted", 0.0), ("rides", 0.5)]
    assert HAND_MADE.life(0)[:2] == [("useful", 0.5), ("wasted", 0.5)]
    assert HAND_MADE.life(2) == [("waits", 1.0), ("waits", 0.5), ("waits", 0.25), ("useful", 0.125), ("wasted", 0.0)]


def test_a_line_for_each_request_a_character_for_each_step():
    assert trace.timeline(HAND_MADE) == [
        "A     2 +   3  \u2593\u2588\u2588",
        "B     4 +   1  \u2593\u2591",
        "C     1 +   1  \u00b7\u00b7\u00b7\u2588",
    ]


@pytest.mark.needs("generate")
def test_a_recorded_run_is_the_run(chapter, make_engine, tokens_per_pass):
    """Counted by another hook and by the engine itself; the recorder leaves nothing behind."""
    engine = make_engine("llama")
    requests = [Request([9, 10, 11], 4), Request([12], 2, arrival_step=1), Request([13, 14], 5, arrival_step=2, abort_step=4)]
    before = engine.num_positions
    found = []
    counts = tokens_per_pass(engine, lambda: found.append(record(chapter, engine, requests)))
    [(run, tokens)] = found
    assert [sum(each.values()) for each in run.ledger()] == counts
    assert run.num_positions == engine.num_positions - before == sum(counts)
    assert [len(ids) for ids in tokens] == [output for _, output in run.lengths]
    assert [len(ids) for ids in tokens][:2] == [4, 2]
    assert sum(part.got_token for each in run.passes for part in each.parts) == run.num_tokens
    assert "step" not in vars(engine) and "read" not in vars(getattr(engine, "cache", engine))
    assert not engine.model._forward_pre_hooks


@pytest.mark.needs("generate")
def test_the_committed_timelines_are_what_a_run_gives(chapter):
    committed = json.loads((RESULTS / "timeline.json").read_text())
    assert json.loads(json.dumps(without_times(small_trace(chapter, POCKET)))) == committed[chapter.id]


@pytest.mark.needs("generate")
def test_the_committed_staircase_counts_what_a_run_does(chapter):
    """Its times are one machine's; its counts hold on every machine. Without a cache they are computed, not run."""
    from shared.workloads import staircase

    committed = cited(rows_of(RESULTS / "staircase.json"))[chapter.id]
    requests = staircase(2000)
    lengths = [(len(request.prompt_ids), request.max_tokens) for request in requests]
    if "kv_cache" not in chapter.capabilities:
        positions = sum(sum(range(prompt, prompt + output)) for prompt, output in lengths)
        assert (committed["passes"], committed["positions"]) == (sum(output for _, output in lengths), positions)
        return
    engine = staircase_engine(chapter)
    run, _ = record(chapter, engine, staircase(engine.config.vocab_size))
    assert run.lengths == lengths
    assert (committed["passes"], committed["positions"]) == (len(run.passes), run.num_positions)
    assert (committed["kv_bytes"], committed["kv_read_bytes"]) == (run.kv_bytes, run.kv_read_bytes)
    assert committed["useful_share"] == round(run.useful_share(), 4)


def test_the_command_prints_and_writes_a_page(tmp_path, capsys):
    page = tmp_path / "trace.html"
    assert trace.main(["v02", "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert trace.main(["v02"]) == 0
    assert "v02_kv_cache: 10 requests, at most 1 at once: 71 forward passes, 106 positions, 100% of them needed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        trace.main(["v99"])
    assert "there is no chapter 'v99'" in capsys.readouterr().err
    text = page.read_text()
    assert text.count("<svg ") == 1 and text.count("<tr><td>") == 71
    assert not re.search(r"<script|<link|src=|url\(|@import", text), "the page must need nothing else"


def test_of_a_block_the_needed_part_is_colored():
    drawn = pictures.lane([{"parts": [{"request": 0, "num_tokens": 4, "useful": 2, "rows": [3]}], "waiting": []}], 0, 0)
    heights = re.findall(r'class="(\w+)".*?height="(\d+)"', "".join(drawn))
    assert heights == [("waste", "14"), ("prompt", "7")]
    assert "2 of 4 positions needed" in drawn[0]


def test_the_committed_shared_blocks_are_what_a_run_gives():
    committed = json.loads((RESULTS / "timeline.json").read_text())
    run = shared_trace(POCKET)
    assert json.loads(json.dumps(without_times(run))) == committed["shared"]
    # Nothing is preempted, so all that is computed is needed; four requests find two blocks of 4 tokens.
    assert run.num_needed == run.num_positions == sum(prompt + output - 1 for prompt, output in run.lengths) - 4 * 8


def test_shared_blocks_are_drawn_with_all_their_owners_and_findable_until_reused():
    """A computes two blocks of 4 and half of one; B finds the two; both finish; C takes a block that was A's and B's."""

    def run(request, num_tokens, rows):
        return {"request": request, "num_tokens": num_tokens, "useful": num_tokens, "got_token": True, "rows": rows}

    passes = [
        {"parts": [run(0, 10, [0, 1, 2])], "waiting": [0, 1]},
        {"parts": [run(0, 1, [0, 1, 2]), run(1, 3, [0, 1, 3])], "waiting": [1]},
        {"parts": [run(2, 2, [1])], "waiting": [2]},
    ]
    drawn = pictures.shared_blocks({"chapter": "v00_by_hand", "lengths": [[10, 2], [11, 1], [2, 1]], "passes": passes}, num_blocks=4)
    cells = re.findall(r'<rect class="([a-z]+[a-z0-9 ]*)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn)
    shown = {}  # by pass and block: classes and the height of each color
    for kind, x, y, _, height in cells:
        column, block = int((float(x) - 76) // 30) + 1, int((float(y) - 84) // 22)
        if block >= 0 and column >= 1 and kind != "waste":
            shown.setdefault((column, block), []).append((kind, round(float(height) / 19, 2)))
    assert shown[1, 0] == shown[1, 1] == [("owner0", 1.0)] and shown[1, 2] == [("owner0", 0.5)]
    assert [kind for kind, _ in shown[2, 0]] == ["owner0", "owner1", "found"] == [kind for kind, _ in shown[2, 1]]
    assert shown[2, 2] == [("owner0", 0.75)] and shown[2, 3] == [("owner1", 0.75)]
    # Block 0 can still be found; block 1 has a new owner; blocks 2 and 3 were never full.
    assert [kind for kind, _ in shown[3, 0]] == ["kept owner0"] and shown[3, 1] == [("owner2", 0.5)]
    assert set(shown) == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0), (3, 1)}
    lanes = re.findall(r'<text class="small" x="([\d.]+)" y="192" text-anchor="middle">(\w)</text>', drawn)
    assert lanes == [("91", "B")], "only B waits, in the first pass"


def test_one_scale_for_all_that_take_several_at_once():
    results = figures(cited(rows_of(RESULTS / "timeline.json")))
    widths = {re.search(r'width="(\d+)"', pictures.of_chapter(name)(results))[1] for name in ("v03", "v04")}
    assert len(widths) == 1


def test_a_workload_of_given_lengths():
    requests = fixed([(3, 5), (1, 2)], 401)
    assert [(len(r.prompt_ids), r.max_tokens, r.arrival_step) for r in requests] == [(3, 5, 0), (1, 2, 0)]
