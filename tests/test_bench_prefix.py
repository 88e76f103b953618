"""The benchmark of the prefix cache: what it counts is right, and what is committed is what a run counts."""
import json

import pytest

from shared import results, workloads
from shared.bench import prefix, staircase
from shared.bench.timing import Timing
from shared.book.claims import result_tables
from shared.chapters import BOOK, CHAPTERS, Book, first_with

CHAPTER = first_with("prefix_cache")
BEFORE = CHAPTER.previous.id


@pytest.fixture
def small(monkeypatch):
    for name, value in {
        "NUM_CHATS": 4,
        "CHAT_TOKENS": 3,
        "NUM_TURNS": 3,
        "TURN_TOKENS": 20,
        "NUM_UNSHARED": 3,
        "NUM_REQUESTS": 12,
        "SIZES": (14, 200),
        "HASHED_TOKENS": 64,
    }.items():
        monkeypatch.setattr(prefix, name, value)


def test_the_positions_of_chats_are_those_that_arithmetic_gives(small):
    found = prefix.chats(CHAPTER, repeats=1)
    assert (found["requests"], found["shared"], found["shared_blocks"]) == (4, 200, 12)
    for arrival in ("one after another", "all at once"):
        rows = found[arrival]
        assert list(rows) == [BEFORE, "off", "on", "on, no waiting"]
        assert all(rows[name]["positions"] == rows[name]["arithmetic"] for name in (BEFORE, "off", "on"))
        assert rows[BEFORE]["positions"] == rows["off"]["positions"] == rows["on"]["positions"] + 3 * 192
        assert len({row["tokens"] for row in rows.values()}) == 1
        assert all(0 < row["ttft_ms"] <= row["wall_ms"] for row in rows.values())
    assert found["one after another"]["on, no waiting"]["positions"] == found["one after another"]["on"]["positions"]
    at_once = found["all at once"]
    assert at_once["on, no waiting"]["positions"] == at_once["off"]["positions"]
    assert at_once["on"]["passes"] == at_once["off"]["passes"] + 1


def test_what_can_be_found_is_full_blocks_of_one_earlier_prompt():
    prompts = [[1, 2, 3, 4], [1, 2, 9, 9, 9, 9], [1, 2, 3, 4], [1, 2, 9, 9, 9, 9, 9], [5]]
    found = [0, 2, 2, 6, 0]
    totals = [prefix.by_arithmetic(prompts[:n], [2] * n, block_size=2) for n in range(6)]
    assert [after - before for before, after in zip(totals, totals[1:])] == [len(p) - f + 1 for p, f in zip(prompts, found, strict=True)]


def test_each_turn_computes_what_it_has_not_found(small):
    rows = prefix.turns(CHAPTER)
    assert len(rows) == 3 and rows[0]["cached"] == 0 and rows[2]["cached"] > rows[1]["cached"] > 0
    for row in rows:
        assert row["positions"] == row["prompt"] - row["cached"] + row["output"] - 1
        assert row["positions_without"] == row["prompt"] + row["output"] - 1
        assert row["cached"] % 16 == 0


def test_the_cost_of_sharing_nothing_is_a_ratio_of_neighboring_runs(small, monkeypatch):
    seconds = iter([9, 9, 9, 1.0, 2.0, 3.0, 1.0, 4.0, 5.0])  # the warm-up, then two rounds: before, off, on

    def timed(run):
        run()
        return Timing(1.0, next(seconds, 0.5))

    monkeypatch.setattr(prefix, "timed", timed)
    found = prefix.unshared(CHAPTER, repeats=2)
    assert found["on_to_off"] == {"median": 1.375, "low": 1.3125, "high": 1.4375}
    assert found["off_to_before"]["median"] == 3.0
    assert found["requests"] == 3 and found["hash_ns_per_token"] == round(1e9 / 64, 1)


@pytest.mark.parametrize(
    ("order", "reused"),
    [
        ("own", ["unused", "a2", "a1", "a0", "b0"]),
        ("head first", ["unused", "a0", "a1", "a2", "b0"]),
        ("newest first", ["b0", "a0", "a1", "a2", "unused"]),
    ],
)
def test_the_orders_in_which_free_blocks_are_reused(order, reused):
    """Of five blocks, a table of three is freed, then one of a single block; all four can be found, and one was never used."""
    pool = prefix.pools_of(CHAPTER)[order](5, 4)
    names = freed(pool, a=3, b=1)
    assert pool.find([b"a0", b"a1", b"a2"]) == [block_id for block_id, name in names.items() if name[0] == "a"]
    assert [names.get(pool.allocate(1)[0], "unused") for _ in range(5)] == reused


def test_only_blocks_of_running_requests_are_found():
    pool = prefix.pools_of(CHAPTER)["only running"](5, 4)
    table = pool.allocate(2)
    pool.publish(table[0], b"key")
    pool.share(table)
    pool.free(table)
    assert pool.find([b"key"]) == table[:1], "another request still owns it"
    pool.free(table)
    assert not pool.find([b"key"]) and pool.num_free == 5


def test_at_random_any_block_is_reused_but_first_those_that_cannot_be_found():
    orders = []
    for _ in range(2):
        pool = prefix.pools_of(CHAPTER)["at random"](12, 4)
        names = freed(pool, a=9)
        assert not names.keys() & set(pool.allocate(3))
        orders.append([names[pool.allocate(1)[0]] for _ in range(9)])
    assert orders[0] == orders[1], "the same in every run"
    assert sorted(orders[0]) not in (orders[0], orders[0][::-1])


def freed(pool, **tables: int) -> dict[int, str]:
    """The names of blocks that were allocated to tables of these lengths, published and freed; by id, in order."""
    blocks = {name: pool.allocate(num_blocks) for name, num_blocks in tables.items()}
    names = {block_id: f"{name}{i}" for name, table in blocks.items() for i, block_id in enumerate(table)}
    for block_id, name in names.items():
        pool.publish(block_id, name.encode())
    for table in blocks.values():
        pool.free(table)
    return names


def test_hits_are_counted_for_each_size_and_order(small):
    found = prefix.hits(CHAPTER)
    assert found["requests"] == 12 and list(found["sizes"]) == ["14", "200"]
    large = found["sizes"]["200"]
    assert list(large) == [*prefix.pools_of(CHAPTER), "off"]
    # Everything fits: whatever an earlier request has computed is found.
    assert large["own"]["hit_share"] == found["most_hit_share"] == large["head first"]["hit_share"] > large["only running"]["hit_share"]
    assert large["off"]["cached"] == 0 < large["own"]["cached"]
    assert large["off"]["positions"] == large["own"]["positions"] + large["own"]["cached"]
    assert found["sizes"]["14"]["own"]["cached"] <= large["own"]["cached"]


# ---- what is committed


@pytest.fixture(scope="module")
def committed():
    return results.cited(results.read(BOOK.results / "prefix.json", prefix.COMMAND))


def test_the_committed_chats_are_those_that_arithmetic_gives(committed):
    chats = committed["chats"]
    prompts = prefix.chat_prompts(prefix.make_engine(CHAPTER).tokenizer)
    assert (chats["requests"], chats["shared"]) == (len(prompts), 200)
    for arrival in ("one after another", "all at once"):
        for name, row in chats[arrival].items():
            outputs = [row["tokens"] - len(prompts) + 1, *[1] * (len(prompts) - 1)]  # only their sum matters
            shares = name == "on" or (name == "on, no waiting" and arrival == "one after another")
            nothing_shared = sum(map(len, prompts)) + row["tokens"] - len(prompts)
            assert row["positions"] == (prefix.by_arithmetic(prompts, outputs, 16) if shares else nothing_shared)


def test_the_committed_turns_are_what_a_run_counts(committed):
    assert prefix.turns(CHAPTER) == committed["turns"]


def test_the_committed_hits_are_what_a_run_counts(committed):
    size = str(prefix.SIZES[1])
    pools = prefix.pools_of(CHAPTER)
    assert prefix.hits_of(CHAPTER, int(size), pools["own"]) == committed["hits"]["sizes"][size]["own"]


@pytest.mark.parametrize("one", staircase.that_differ_when_full(CHAPTERS), ids=lambda chapter: chapter.id)
def test_the_committed_crowd_counts_what_a_run_does(one):
    committed = results.cited(results.rows_of(BOOK.results / "crowded.json"))[one.id]
    engine = prefix.make_engine(one, num_blocks=workloads.CROWD_BLOCKS)
    prompts = [workloads.chat_ids(engine.tokenizer, question, workloads.SYSTEM_PROMPT) for question in workloads.CROWD]
    found = staircase.serve(one, engine, prompts)
    assert committed["tokens"] == sum(map(len, found["token_ids"]))
    assert all(committed[count] == found[count] for count in ("passes", "positions", "preemptions"))


# ---- the tables


def test_the_tables_name_ways_and_orders_and_what_is_old(tmp_path):
    book = Book(tmp_path, BOOK.chapters)
    took = {"positions": 1200, "arithmetic": 1201, "passes": 17, "ttft_ms": 1234.56, "cpu_ms": 2345.6}
    ratio = {"median": 1.0161, "low": 0.98, "high": 1.25}
    turn = {"prompt": 1045, "cached": 32, "output": 24, "positions": 36, "positions_without": 68}
    ways = {name: {"hit_share": 0.5, "positions": 2000, "passes": 30} for name in result_tables.ORDERS}
    ways["off"] = {"hit_share": 0.0, "positions": 4000, "passes": 29}
    row = {
        "command": "c",
        "machine": "a machine, Python 3",
        "date": "2000-01-01",
        "code": {BEFORE: results.code_hash(CHAPTER.previous.path), CHAPTER.id: "another"},
        "chats": {"one after another": {BEFORE: took}, "all at once": {"on, no waiting": took}},
        "turns": [turn],
        "unshared": {"on_to_off": ratio, "off_to_before": ratio, "hash_ns_per_token": 89.4},
        "hits": {"sizes": {"1000": ways}},
    }
    results.store(book.results / "prefix.json", {"avx2": row})
    old = f"*AVX2: a machine, 2000-01-01; old, since the code has changed: {CHAPTER.id}*"
    assert result_tables.prefix(book, None)[2:] == [
        f"| {old} | | | | | |",
        f"| one after another: {BEFORE} | 1,200 | 1,201 | 17 | 1,234.6 ms | 2.35 s |",
        f"| all at once: {CHAPTER.id}, prefix cache on, no waiting | 1,200 | 1,201 | 17 | 1,234.6 ms | 2.35 s |",
    ]
    assert result_tables.turns(book, None)[2:] == ["| 1 | 1,045 | 32 | 24 | 36 | 68 |"]
    assert result_tables.unshared(book, None)[2:] == [
        f"| {old} | |",
        f"| CPU time of {CHAPTER.id}, prefix cache on, over off | 1.016 (0.980 to 1.250) |",
        f"| CPU time of {CHAPTER.id}, prefix cache off, over {BEFORE} | 1.016 (0.980 to 1.250) |",
        "| hashing, per token | 89 ns |",
    ]
    assert result_tables.hits(book, None)[2:] == ["| 1,000 | 50% | 50% | 50% | 50% | 50% | 2,000 | 4,000 | 30 | 29 |"]


def test_the_table_of_the_crowd_ends_at_its_text_s_own_chapter(tmp_path):
    book = Book(tmp_path, BOOK.chapters)
    took = {"passes": 278, "tokens_per_pass": 2.04, "preemptions": 0, "positions": 3867, "ttft_ms": 628.6, "tokens_per_s": 328.9}
    row = {"command": "c", "machine": "m", "date": "d", "code": {}} | {name: took for name in (BEFORE, CHAPTER.id)}
    (book.results).mkdir(parents=True)
    (book.results / "crowded.json").write_text(json.dumps({"avx2": row}))
    cells = "278 | 2.0 | 0 | 3,867 | 629 ms | 329 |"
    assert result_tables.crowded(book, None)[3:] == [f"| {BEFORE} | {cells}", f"| {CHAPTER.id} | {cells}"]
    assert result_tables.crowded(book, CHAPTER.previous)[3:] == [f"| {BEFORE} | {cells}"]
