"""Every chapter on a GPU, on a published workload, beside Hugging Face and the limit of the memory: one call.

    make bench-gpu                                  # on a GPU: checks, then measures; four minutes at the most
    make bench-gpu ARGS=--write                     # and commits it, as far as it comes
    make bench-gpu ARGS="--shape llama-3.2-1b-shape --minutes 10"
    make bench-gpu ARGS=--dry-run                   # anywhere: the same on the CPU with a tiny model, to see that it runs

The workload is the one that nano-vllm publishes: 256 requests whose prompts and outputs are 100 to 1,024 tokens long,
all there at the start, in bfloat16. The last chapter runs all of them. The others get the first few, by what they can do:
they are there to be compared with each other, and how many they got stands in the row. The last chapter comes first, then
its decode steps, then the others from the newest to the oldest, while there is time. A decode step is set beside the time
to read all weights, and all keys and values of the sequences in it, at the bandwidth of a large copy.

Reads: the chapters. Writes: docs/results/gpu.json.
"""
import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from shared.bench.suite import num_tokens, serve
from shared.bench.timing import weight_bytes
from shared.chapters import CHAPTERS, Chapter
from shared.programs import run
from shared.results import write_row
from shared.workloads import Request, fixed, ragged


@dataclass(frozen=True)
class Setting:
    """What is run, on what: the whole measurement, or its rehearsal."""

    device: str
    dtype: str
    shape: str
    requests: int
    prompt_len: tuple[int, int]
    output_len: tuple[int, int]
    shares: tuple[tuple[str, int], ...]  # how many of the requests a chapter gets: by the first of these that it can do
    places: int  # requests that run together, from v05 on; v03 and v04 reserve a row of memory for each of theirs
    slab_places: int
    decode: tuple[tuple[int, int], ...]  # sequences, and tokens of each, whose decode step is timed
    decode_steps: int
    repeats: int


GPU = Setting(
    device="cuda",
    dtype="bfloat16",
    shape="qwen3-0.6b-shape",
    requests=256,
    prompt_len=(100, 1024),
    output_len=(100, 1024),
    shares=(("kv_bytes", 64), ("max_num_seqs", 16), ("generate", 1)),
    places=256,
    slab_places=16,
    decode=((1, 512), (16, 512), (64, 1024), (256, 1024)),
    decode_steps=16,
    repeats=1,
)
DRY_RUN = Setting(
    device="cpu",
    dtype="float32",
    shape="llama",
    requests=5,
    prompt_len=(3, 9),
    output_len=(2, 6),
    shares=(("kv_bytes", 4), ("max_num_seqs", 3), ("generate", 1)),
    places=4,
    slab_places=2,
    decode=((1, 5), (3, 8)),
    decode_steps=2,
    repeats=1,
)


def engine_of(chapter: Chapter, path: Path, setting: Setting, max_model_len: int):
    """The chapter with room for as many of the requests as it can run together."""
    limits = {"device": setting.device, "dtype": setting.dtype, "max_model_len": max_model_len}
    if "max_num_seqs" in chapter.capabilities:
        limits["max_num_seqs"] = setting.places if "kv_bytes" in chapter.capabilities else setting.slab_places
    return chapter.load().Engine(path, **limits)


def finished(device: str) -> float:
    """The time, when everything that the device was given is done."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def emptied(device: str) -> None:
    """Give back the memory of engines that are gone."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def check(setting: Setting) -> None:
    """Before anything is timed: the chapters say what v01 says, in float32, on this device."""
    from shared.checkpoints import checkpoint

    requests = ragged(4, 400, prompt_len=(3, 40), output_len=(3, 12), seed=1)
    expected = None
    for chapter in CHAPTERS:
        engine = chapter.load().Engine(checkpoint("llama"), device=setting.device, dtype="float32")
        said = serve(engine, chapter.load(), requests)
        expected = expected or said
        if said != expected:
            raise AssertionError(f"{chapter.id} on {setting.device} says {said}, {CHAPTERS[0].id} says {expected}")


def share(chapter: Chapter, setting: Setting) -> int:
    """How many of the requests a chapter gets."""
    if chapter is CHAPTERS[-1]:
        return setting.requests
    return next(number for capability, number in setting.shares if capability in chapter.capabilities)


def throughput(chapter: Chapter, path: Path, requests: list[Request], setting: Setting) -> dict:
    """A chapter's row; or why it cannot run here."""
    longest = max(len(each.prompt_ids) + each.max_tokens for each in requests)
    emptied(setting.device)
    try:
        engine = engine_of(chapter, path, setting, longest)
        return measure(partial(serve, engine, chapter.load()), requests[: share(chapter, setting)], setting)
    except REFUSED as error:
        return {"error": " ".join(str(error).split())[:200]}
    finally:
        engine = None
        emptied(setting.device)


def peer(path: Path, requests: list[Request], setting: Setting) -> dict:
    """The row of Hugging Face's continuous batching, with as many requests as a chapter that is not the last."""
    from shared.bench.peers import ContinuousBatching

    requests = requests[: setting.shares[0][1]]
    emptied(setting.device)
    try:
        # As many positions as all requests together have: who waits for memory here would wait for nothing else.
        positions = sum(len(each.prompt_ids) + each.max_tokens for each in requests) + 256 * setting.places
        batching = ContinuousBatching(path, positions, setting.device, setting.dtype, setting.places)
        try:
            return measure(partial(batching.generate, seconds=PEER_S), requests, setting)
        finally:
            batching.stop()
    except REFUSED as error:
        return {"error": " ".join(str(error).split())[:200]}
    finally:
        batching = None
        emptied(setting.device)


PEER_S = 40.0  # that Hugging Face may take

# A machine that is too small for one contestant still measures the others.
REFUSED = (ValueError, MemoryError, RuntimeError)  # torch's out of memory is a RuntimeError


def measure(run, requests: list[Request], setting: Setting) -> dict:
    """The row of one contestant: its best run, after one of the same requests cut short, which compiles what there is to."""
    run([Request(each.prompt_ids, 2) for each in requests])
    seconds = []
    for _ in range(setting.repeats):
        start = finished(setting.device)
        run(requests)
        seconds.append(finished(setting.device) - start)
    return {
        "requests": len(requests),
        "tokens": num_tokens(requests),
        "seconds": [round(each, 4) for each in seconds],
        "tokens_per_s": round(num_tokens(requests) / min(seconds), 1),
    }


def decode_steps(path: Path, setting: Setting, bytes_per_s: float) -> list[dict]:
    """The last chapter's decode step beside its floor: every weight, key and value read once."""
    chapter = CHAPTERS[-1]
    emptied(setting.device)
    longest = max(context for _, context in setting.decode) + setting.decode_steps + 2
    engine = engine_of(chapter, path, setting, longest)
    rows = []
    for size, context in setting.decode:
        row = {"sequences": size, "context": context}
        try:
            row |= decode_step(engine, chapter.load(), size, context, setting, bytes_per_s)
        except REFUSED as error:
            row["error"] = " ".join(str(error).split())[:200]
            for request_id in list(engine.seqs):
                engine.abort_request(request_id)
        rows.append(row)
    return rows


def decode_step(engine, package, size: int, context: int, setting: Setting, bytes_per_s: float) -> dict:
    """The time of a step in which each of size sequences of this length gets a token, and the least that it could be."""
    params = package.SamplingParams(max_tokens=setting.decode_steps + 2, ignore_eos=True)
    for request in fixed([(context, 0)] * size, engine.config.vocab_size):
        engine.add_request(request.prompt_ids, params)
    # The first step feeds the prompts, the second is one like those that are timed.
    engine.step()
    engine.step()
    running = engine.stats().running
    start = finished(setting.device)
    for _ in range(setting.decode_steps):
        engine.step()
    step_s = (finished(setting.device) - start) / setting.decode_steps
    while engine.has_unfinished_requests():
        engine.step()
    if running < size:
        return {"error": f"only {running} have room"}
    # A timed step reads, on average over them, so many positions of each sequence.
    mean_context = context + 2 + (setting.decode_steps - 1) / 2
    token_bytes = engine.cache.kv_bytes // (engine.pool.num_blocks * engine.pool.block_size)
    floor_s = (weight_bytes(engine.model) + size * mean_context * token_bytes) / bytes_per_s
    return {"step_ms": round(1e3 * step_s, 4), "floor_ms": round(1e3 * floor_s, 4), "share": round(floor_s / step_s, 3)}


def copy_rate(device: str) -> float:
    """Bytes a second that a large copy reads and writes."""
    import torch

    source = torch.ones(2**31 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        start = finished(device)
        target.copy_(source)
        best = min(best, finished(device) - start)
    return 2 * source.nbytes / best


def bench_gpu(setting: Setting, seconds: float, keep: Callable[[dict, list[Chapter]], None]) -> dict:
    """Check, then measure while there is time.

    Args:
        keep: is given what there is after each measurement, and the chapters in it.
    """
    from shared.checkpoints import checkpoint

    deadline = time.monotonic() + seconds
    check(setting)
    bytes_per_s = copy_rate(setting.device)
    print(f"a copy moves {bytes_per_s / 1e9:,.0f} GB/s")
    path = checkpoint(setting.shape)
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    requests = ragged(setting.requests, vocab_size, prompt_len=setting.prompt_len, output_len=setting.output_len, seed=0)
    rows, measured = {}, []
    found = {"copy_gb_per_s": round(bytes_per_s / 1e9, 1), setting.shape: {"throughput": rows}}
    newest_first = CHAPTERS[::-1]
    report_head(setting.shape)
    for chapter in newest_first:
        if time.monotonic() > deadline:
            left = [each.id for each in newest_first if each not in measured]
            print(f"not measured, since the time is up: {', '.join(left)}; give it more with --minutes")
            break
        rows[chapter.id] = throughput(chapter, path, requests, setting)
        measured.append(chapter)
        report_row(chapter.id, rows[chapter.id])
        keep(found, measured)
        if chapter is CHAPTERS[-1]:
            rows["HF continuous"] = peer(path, requests, setting)
            report_row("HF continuous", rows["HF continuous"])
            found[setting.shape]["decode"] = decode_steps(path, setting, bytes_per_s)
            keep(found, measured)
    report_decode(found[setting.shape].get("decode", []))
    return found


def report_head(shape: str) -> None:
    print(f"\n{shape}\n{'':16}{'requests':>10}{'tokens':>10}{'seconds':>10}{'tokens/s':>12}")


def report_row(name: str, row: dict) -> None:
    if "error" in row:
        print(f"{name:16}{row['error']}", flush=True)
        return
    cells = f"{row['requests']:10,}{row['tokens']:10,}{min(row['seconds']):10.2f}{row['tokens_per_s']:12,.0f}"
    print(f"{name:16}{cells}", flush=True)


def report_decode(rows: list[dict]) -> None:
    print(f"\n{'decode step of':16}{'context':>10}{'ms':>10}{'floor ms':>10}{'share':>8}")
    for row in rows:
        told = row.get("error") or f"{row['step_ms']:10.2f}{row['floor_ms']:10.2f}{row['share']:8.0%}"
        print(f"{row['sequences']:16,}{row['context']:10,}{told}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.bench.gpu", description="Measure every chapter on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a tiny model: see that it runs; nothing is worth reading")
    parser.add_argument("--shape", default=GPU.shape, help=f"a checkpoint's name (default: {GPU.shape})")
    parser.add_argument("--minutes", type=float, default=4.0, help="how long it may take: nothing is begun after three quarters of it (default: 4)")
    parser.add_argument("--write", action="store_true", help="write the result under docs/results/, after each measurement")
    args = parser.parse_args(argv)
    if args.dry_run and args.write:
        parser.error("--write commits what a GPU took; leave out --dry-run")
    if args.write and args.shape != GPU.shape:
        parser.error(f"--write commits {GPU.shape}: another shape would take its place; leave out --shape")
    if not args.minutes > 0:
        parser.error(f"--minutes must be above 0, got {args.minutes}")
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        parser.error("this needs a GPU, and torch sees none; --dry-run checks the command without one")
    command = " ".join(["python -m shared.bench.gpu", *argv])

    def keep(found: dict, measured: list[Chapter]) -> None:
        if args.write:
            print(f"wrote {write_row('gpu', found, command, measured, gpu=True)}")

    # The last measurement that is begun has to end as well.
    bench_gpu(DRY_RUN if args.dry_run else replace(GPU, shape=args.shape), 60 * args.minutes * 0.75, keep)
    return 0


if __name__ == "__main__":
    run(main)
