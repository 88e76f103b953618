"""Command line of the engine: python -m CHAPTER generate "Once upon a time"."""
from __future__ import annotations

import argparse
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .params import SamplingParams, check_integer

if TYPE_CHECKING:
    from .engine import Engine

POCKET = Path(__file__).resolve().parents[2] / "shared" / "models" / "pocket"

# Every keyword argument of Engine is a flag of every command.
ENGINE_FLAGS = {
    "device": dict(help="cpu, cuda or cuda:N (default: cuda if available)"),
    "dtype": dict(choices=("float32", "bfloat16", "float16"), help="(default: the checkpoint's on a GPU, float32 on a CPU)"),
    "max_model_len": dict(type=int, metavar="N", help="most tokens of prompt plus output (default: the model's limit)"),
    "max_num_seqs": dict(type=int, default=64, metavar="N", help="most requests in one batch (default: 64)"),
    "num_blocks": dict(type=int, metavar="N", help="number of cache blocks (default: as many as fit into kv_bytes)"),
    "block_size": dict(type=int, default=16, metavar="N", help="tokens per block (default: 16)"),
    "kv_bytes": dict(type=int, metavar="N", help="cache size (default: at most 1 GiB; on a GPU, 60 %% of free memory)"),
    "attention": dict(choices=("auto", "torch", "triton"), default="auto", help="(default: triton on a GPU, torch on a CPU)"),
    "linear": dict(choices=("auto", "plain", "joined", "blocks", "halves"), default="auto", help="how weights are stored (default: measured on a CPU, joined on a GPU)"),
    "graphs": dict(action=argparse.BooleanOptionalAction, help="record decode steps (default: on a GPU with attention by triton)"),
    "exact": dict(action="store_true", help="the same bits for a request whatever else runs (default: the same up to rounding)"),
    "reserve_tokens": dict(type=int, default=16, metavar="N", help="tokens reserved for each request's growth; 0: none (default: 16)"),
    "swap_bytes": dict(type=int, default=0, metavar="N", help="CPU memory for preempted requests (default: 0, compute them again)"),
    "max_num_batched_tokens": dict(type=int, metavar="N", help="most tokens in a step, at least max_num_seqs (default: 512 or max_num_seqs if that is more; on a GPU, 2048)"),
    "enable_prefix_caching": dict(action=argparse.BooleanOptionalAction, default=True, help="reuse the keys and values of equal beginnings (default: on)"),
    "grammar_backend": dict(choices=("auto", "own", "llguidance"), default="auto", help="(default: our automaton, or llguidance where that cannot follow)"),
}
SERVER_FLAGS = {
    "engine": dict(choices=("process", "thread"), default="process", help="where the engine runs (default: in a process of its own)"),
    "host": dict(default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"),
    "port": dict(type=int, default=8000, help="port to listen on; 0 picks a free one (default: 8000)"),
    "api_key": dict(metavar="KEY", action="append", help="key that clients must send; repeatable (default: none)"),
    "keep_alive": dict(type=int, default=120, metavar="S", help="seconds until an idle connection is closed (default: 120; proxies use 60 to 90)"),
    "served_model_name": dict(metavar="NAME", help="name for clients (default: its directory's or hub repository's)"),
    "max_waiting": dict(type=int, default=256, metavar="N", help="most waiting requests; more get 429 (default: 256)"),
    "default_max_tokens": dict(type=int, metavar="N", help="cap for requests without max_tokens, which get 16, or in chat all that fits"),
    "allow_priority": dict(action="store_true", help="let clients set priority (default: reject it)"),
    "dev_mode": dict(action="store_true", help="serve POST /reset_prefix_cache (default: do not)"),
    "slo_ttft_ms": dict(type=float, metavar="MS", help="a request meets the goals if its first token takes at most this long (default: any time)"),
    "slo_itl_ms": dict(type=float, metavar="MS", help="and no two of its tokens are further apart than this (default: any time)"),
    "metrics_key": dict(metavar="KEY", help="key for GET /metrics and, if there is no api_key, for the page's data and traces (default: none, anybody may read them)"),
    "log_format": dict(choices=("text", "json", "none"), default="text", help="a line in the log for each HTTP request (default: text)"),
    "drain_seconds": dict(type=float, default=30.0, metavar="S", help="seconds from SIGTERM to exit, at least 5 (default: 30)"),
}
SAMPLING_FLAGS = {
    "max_tokens": dict(type=int, default=128, metavar="N", help="most tokens to generate per prompt (default: 128)"),
    "temperature": dict(type=float, default=0.0, metavar="T", help="0 always takes the likeliest token (default: 0)"),
    "top_k": dict(type=int, default=0, metavar="K", help="sample from the K likeliest (default: 0, all)"),
    "top_p": dict(type=float, default=1.0, metavar="P", help="sample from the likeliest that add up to P (default: 1)"),
    "seed": dict(type=int, metavar="S", help="the same seed gives the same text (default: a fresh one)"),
    "min_p": dict(type=float, default=0.0, metavar="P", help="sample from tokens at least P times as likely as the likeliest (default: 0)"),
    "repetition_penalty": dict(type=float, default=1.0, metavar="R", help="above 1: tokens that are there already are less likely (default: 1)"),
    "regex": dict(metavar="PATTERN", help="the text matches it as a whole"),
    "choice": dict(metavar="TEXT", action="append", help="the text is one of these; repeatable"),
    "json_schema": dict(metavar="JSON", help="the text is JSON that this schema allows"),
    "grammar": dict(metavar="LARK", help="the text follows this grammar, by llguidance"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return 0, 1 if output was cut off, 130 after Ctrl-C, or 2 after an error message on stderr."""
    args = build_parser().parse_args(argv)
    try:
        status = args.command(args)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe: discard what is still in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=__package__, description="An inference engine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="complete prompts")
    generate.set_defaults(command=run_generate)
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--chat", action="store_true", help="put each prompt into the model's chat template")
    generate.add_argument("--stream", action="store_true", help="print text as it is generated, prompts in order")
    generate.add_argument("--stats", action="store_true", help="print tokens, time and forward passes to stderr")
    add_flags(generate, SAMPLING_FLAGS)
    add_engine_flags(generate)
    serve = commands.add_parser("serve", help="serve OpenAI clients over HTTP")
    serve.set_defaults(command=run_serve)
    add_flags(serve, SERVER_FLAGS)
    add_engine_flags(serve)
    return parser


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the model and configure the engine."""
    parser.add_argument("--model", metavar="DIR", help="checkpoint (default: $STEPSERVE_MODEL, else the bundled model)")
    add_flags(parser, ENGINE_FLAGS)


def add_flags(parser: argparse.ArgumentParser, flags: dict[str, dict]) -> None:
    for name, options in flags.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)


def chosen(args: argparse.Namespace, flags: dict[str, dict]) -> dict:
    """The values of a table's flags, as keyword arguments."""
    return {name: getattr(args, name) for name in flags}


def choose_model(args: argparse.Namespace) -> str | Path:
    """The checkpoint directory from --model, STEPSERVE_MODEL or the bundled model; ValueError if there is none."""
    model_dir = args.model or os.environ.get("STEPSERVE_MODEL") or (POCKET if POCKET.is_dir() else None)
    if model_dir is None:
        raise ValueError("no model: give --model DIR, or set STEPSERVE_MODEL to a checkpoint directory")
    return model_dir


def make_engine(args: argparse.Namespace) -> Engine:
    """The engine that the flags describe; ValueError if its checkpoint is not named or not found."""
    from .engine import Engine

    return Engine(choose_model(args), **chosen(args, ENGINE_FLAGS))


def run_generate(args: argparse.Namespace) -> int:
    """Complete the prompts and print their texts, one after another; return 1 if any was cut off, else 0."""
    from .text import encode_chat

    params = SamplingParams(**chosen(args, SAMPLING_FLAGS), new_text=args.chat)
    engine = make_engine(args)
    prompts = args.prompts
    if args.chat:
        prompts = [encode_chat(engine.tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    start = time.perf_counter()
    if args.stream:
        num_tokens, num_failed = stream_texts(engine, prompts, params)
    else:
        completions = engine.generate(prompts, params)
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        num_failed = sum(completion.finish_reason == "error" for completion in completions)
        for completion in completions:
            print(completion.text)
    if args.stats:
        print(describe_run(engine, num_tokens, time.perf_counter() - start), file=sys.stderr)
    if num_failed:
        print(f"{num_failed} of {len(prompts)} texts are cut off: the model's logits were not finite numbers", file=sys.stderr)
    return 1 if num_failed else 0


def run_serve(args: argparse.Namespace) -> NoReturn:
    """Serve the model until a signal stops the process."""
    from .engine_process import EngineProcess, load_engine
    from .engine_thread import EngineThread

    check_integer("port", args.port, 0, 65535)
    check_integer("keep_alive", args.keep_alive, 1)
    check_integer("max_waiting", args.max_waiting, 1)
    check_integer("default_max_tokens", args.default_max_tokens, 1, optional=True)
    if not args.drain_seconds >= 5:
        raise ValueError(f"drain_seconds must be at least 5, got {args.drain_seconds}")
    if not all(re.fullmatch("[!-~]+", key) for key in args.api_key or ()):
        raise ValueError("api_key must be non-empty ASCII without spaces")
    if args.metrics_key is not None and not re.fullmatch("[!-~]+", args.metrics_key):
        raise ValueError("metrics_key must be non-empty ASCII without spaces")
    for name in ("slo_ttft_ms", "slo_itl_ms"):
        limit = getattr(args, name)
        if limit is not None and not 0 < limit < float("inf"):
            raise ValueError(f"{name} must be a number of milliseconds above 0, got {limit}")
    if args.served_model_name is not None and not (args.served_model_name and args.served_model_name.isprintable()):
        raise ValueError(f"served_model_name must be printable and not empty, got {args.served_model_name!r}")
    # The engine process loads the model while this process imports the server.
    started = EngineProcess(partial(load_engine, choose_model(args), **chosen(args, ENGINE_FLAGS))) if args.engine == "process" else None
    from .metrics import Goal
    from .process import bind, serve
    from .service import Service

    goal = Goal(*(float("inf") if limit is None else limit / 1e3 for limit in (args.slo_ttft_ms, args.slo_itl_ms)))
    bound = bind(args.host, args.port)
    if started:
        runner = started.wait_until_ready()
    else:
        engine = make_engine(args)
        engine.warm_up()
        runner = EngineThread(engine)
    service = Service(
        runner,
        args.served_model_name or runner.name,
        api_keys=tuple(args.api_key or ()),
        max_waiting=args.max_waiting,
        default_max_tokens=args.default_max_tokens,
        drain_seconds=args.drain_seconds,
        allow_priority=args.allow_priority,
        dev_mode=args.dev_mode,
        goal=goal,
        metrics_key=args.metrics_key,
        log_format=args.log_format,
    )
    serve(service, bound, args.keep_alive)


def stream_texts(engine: Engine, prompts: list, params: SamplingParams) -> tuple[int, int]:
    """Print each text as it is generated, in the order of prompts; return the numbers of tokens and failed texts."""
    request_ids = [engine.add_request(prompt, params) for prompt in prompts]
    pieces = {request_id: [] for request_id in request_ids}
    ended = set()
    num_tokens = num_failed = 0
    for request_id in request_ids:
        while request_id not in ended:
            for output in engine.step():
                num_tokens += output.finish_reason != "error"
                num_failed += output.finish_reason == "error"
                pieces[output.request_id].append(output.text)
                if output.finish_reason:
                    ended.add(output.request_id)
            print(*pieces[request_id], sep="", end="", flush=True)
            pieces[request_id].clear()
        print(*pieces[request_id], sep="")
    return num_tokens, num_failed


def describe_run(engine: Engine, num_tokens: int, seconds: float) -> str:
    """The tokens, time and forward passes of a run, in one line."""
    return (
        f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s; "
        f"{engine.num_steps} forward passes over {engine.num_positions} positions"
    )


if __name__ == "__main__":
    sys.exit(main())
