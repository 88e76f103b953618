"""Run requests that use every feature at once on a small cache, and compare each with the same request running alone.

    python -m shared.verify.product                          # every chapter with the features that it needs
    python -m shared.verify.product v11 --seed 40 --rounds 1
"""
import argparse
import contextlib
import importlib
import io
import json
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from shared.bench.timing import progress
from shared.chapters import CHAPTERS, Chapter, find
from shared.checkpoints import checkpoint
from shared.programs import run
from shared.verify.findable import uncached, watch
from shared.verify.soak import audit
from shared.workloads import random_ids

NEEDS = ("num_blocks", "abort", "prompt_logprobs", "stop_strings")
# The capability that adds an option, for options that the first of these chapters lacks.
ADDED_BY = dict.fromkeys(("priority", "swap_bytes", "reserve_tokens"), "preemption")
ADDED_BY |= dict.fromkeys(("cache_salt", "enable_prefix_caching"), "prefix_cache")
ADDED_BY["max_num_batched_tokens"] = "chunked_prefill"
ADDED_BY["linear"] = "linear"
ADDED_BY["exact"] = "exact"
ADDED_BY["parts"] = "tools"
# The rounds from this seed on use what stands between the logits and the draw. Other texts have other lengths, and the
# earlier rounds were chosen for what happens in them.
SHAPED = 100
# And those from this one on have tools, too.
TOOLED = 200
# Two random ones, whose tokenizers differ, and a trained one, which ends its texts.
MODELS = ("llama", "mistral", "pocket")
# Common enough to end many texts; some of them begin in one token and end in another.
STOP_STRINGS = ("at", "e", "en", "ok", "s ", " t", "th", "?!")
# Grammars of both backends: some end soon, some go on until max_tokens, one nests.
SHAPES = (
    {"regex": "[a-f ]{3,12}[.!]|(no )+"},
    {"choice": ("yes", "no", "yes, but éñ")},
    {"json_schema": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3}},
    {"json_object": True},
)
# The schemas of functions that may be called. No automaton can follow the last one.
TOOLS = {
    "add": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "now": {"type": "object", "properties": {}, "additionalProperties": False},
    "tree": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}, "required": ["kids"], "additionalProperties": False},
}
# Logprobs are sums of float32 in an order that depends on the batch, unless the engine is exact.
TOLERANCE = 2e-4
# Far more steps than a round takes.
MOST_STEPS = 5000
WAITING = "waiting to start"
MID_PROMPT = "in the middle of its prompt"
PREEMPTED = "preempted, swapped out", "preempted, to be computed again"


# ---- the plan


@dataclass(frozen=True)
class Planned:
    """One request, and when it arrives and is aborted."""

    prompt_ids: list[int]
    params: object  # the chapter's SamplingParams
    arrival_step: int  # the step before which it is added
    abort_step: int | None  # the step before which it is aborted, unless it has finished
    abort_preempted: bool  # whether it is aborted once it is preempted


@dataclass(frozen=True)
class Plan:
    """One round: its requests, the options of the engine that runs them, and the steps that fail."""

    requests: list[Planned]
    options: dict[str, int | str | bool]
    faults: dict[int, str]  # by step: the method that raises in it


def make_plan(seed: int, chapter: Chapter, roomy) -> Plan:
    """A random plan that uses what the chapter has, for the checkpoint of the engine roomy.

    The same seed makes the same plan for each chapter, except for what the chapter lacks.
    """
    rng = random.Random(seed)
    block_size = rng.choice((1, 3, 4, 7, 16))
    shaped = seed >= SHAPED and "grammars" in chapter.capabilities
    answers = make_answers(chapter) if seed >= TOOLED and "tools" in chapter.capabilities else ()
    requests = make_requests(rng, chapter, roomy.config.vocab_size, block_size, shaped, answers)
    requests += [continued(rng, chapter, request, roomy, shaped, answers) for request in requests[:3]]
    # A request's last token is never fed, so it needs no slot.
    smallest = max(-(-(len(each.prompt_ids) + each.params.max_tokens - 1) // block_size) for each in requests)
    block_bytes = roomy.cache.kv_bytes // (roomy.pool.num_blocks * roomy.pool.block_size) * block_size
    options = {
        "block_size": block_size,
        "num_blocks": smallest + rng.choice((0, 1, 3, smallest)),
        "max_num_seqs": rng.choice((2, 4, 8)),
        # The default is one token too short for the largest request in the smallest cache.
        "max_model_len": 128,
        # No swap space, one that is often full, and one that never is.
        "swap_bytes": rng.choice((0, -(-smallest // 2), 100 * smallest)) * block_bytes,
        "reserve_tokens": rng.choice((0, 0, 0, 2, 10**6)),
        "enable_prefix_caching": rng.random() < 0.9,
    }
    faults = {step: rng.choice(("forward", "commit", "accept")) for step in rng.sample(range(60), 2)}
    # One token for each request, a few more, and more than any step needs.
    options["max_num_batched_tokens"] = options["max_num_seqs"] + rng.choice((0, 1, 3, 8, 10**6))
    if "linear" in chapter.capabilities:
        options["linear"] = rng.choice(forms(chapter, roomy))
    return Plan(requests, available(options, chapter), faults)


def forms(chapter: Chapter, roomy) -> list[str]:
    """The forms in which this machine can store the weights of the engine roomy, which stores them plain."""
    storage = importlib.import_module(f"{chapter.load().__name__}.storage")
    possible = ["plain"]
    for form in reversed(storage.FORMS):
        with contextlib.suppress(ValueError):
            storage.check_form(roomy.model, form)
            possible.append(form)
    return possible


def make_answers(chapter: Chapter) -> tuple:
    """The chapter's Parts of answers that call functions: in each form, with and without a thought, of their own accord or not."""
    parts, forms = (importlib.import_module(f"{chapter.load().__name__}.{name}") for name in ("parts", "tools"))
    tools = {name: parts.Tool(name, json.dumps(schema), True, "tools") for name, schema in TOOLS.items()}
    hermes, mistral, old, llama = (forms.FORMS[name] for name in ("hermes", "mistral-args", "mistral", "llama3"))
    few = tools["add"], tools["now"]
    return (
        parts.Parts(form=hermes, tools=few, thought=("<think>", "</think>")),
        parts.Parts(form=hermes, tools=few, thought=("<think>", "</think>"), is_open=True, content=("choice", ("yes", "no"))),
        parts.Parts(form=hermes, tools=()),
        parts.Parts(form=mistral, tools=few, content=("regex", "[a-f ]{3,12}[.!]")),
        parts.Parts(form=mistral, tools=few, is_required=True, is_single=True),
        parts.Parts(form=mistral, tools=(tools["tree"],), is_required=True, is_single=True),
        parts.Parts(form=old, tools=few[1:], is_required=True),
        parts.Parts(form=llama, tools=few, is_required=True, is_single=True),
    )


def make_requests(
    rng: random.Random,
    chapter: Chapter,
    vocab_size: int,
    block_size: int,
    shaped: bool,
    answers: tuple,
) -> list[Planned]:
    """About 20 requests. Their prompts share beginnings that end before, at and after the end of a block; some are equal."""
    choices = importlib.import_module(f"{chapter.load().__name__}.params").choices
    shared = random_ids(2 * block_size + 1, vocab_size, rng)
    lengths = 0, 1, block_size - 1, block_size, block_size + 1, 2 * block_size, 2 * block_size + 1
    requests = []
    while len(requests) < 20:
        tail = random_ids(rng.choice((0, 1, 2, 5, 9)), vocab_size, rng)
        prompt_ids = shared[: rng.choice(lengths)] + tail or shared[:1]
        params = chapter.load().SamplingParams(**available(make_options(rng, vocab_size, shaped, answers), chapter))
        arrival_step = rng.choice((0, rng.randint(1, 40), rng.randint(1, 40)))
        for choice in choices(params, rng.choice((1, 1, 1, 3))):
            abort_step = arrival_step + rng.randint(0, 40) if rng.random() < 0.2 else None
            requests.append(Planned(prompt_ids, choice, arrival_step, abort_step, abort_preempted=rng.random() < 0.1))
    return requests


def continued(rng: random.Random, chapter: Chapter, request: Planned, roomy, shaped: bool, answers: tuple) -> Planned:
    """The next turn of a conversation: a request's prompt, its answer and a few more tokens."""
    [answer] = roomy.generate([request.prompt_ids], request.params)
    tail = random_ids(rng.choice((0, 1, 3)), roomy.config.vocab_size, rng)
    params = replace(request.params, **available(make_options(rng, roomy.config.vocab_size, shaped, answers), chapter))
    if "prefix_cache" in chapter.capabilities:
        params = replace(params, cache_salt=request.params.cache_salt)
    arrival_step = request.arrival_step + rng.randint(1, 40)
    return Planned(request.prompt_ids + answer.token_ids + tail, params, arrival_step, abort_step=None, abort_preempted=False)


def make_options(rng: random.Random, vocab_size: int, shaped: bool, answers: tuple) -> dict[str, object]:
    """The arguments of one request's SamplingParams. shaped: also those between the logits and the draw. answers: also one of these."""
    logprobs = rng.choice((None, 0, 3))
    options = {
        "max_tokens": rng.choice((1, 2, rng.randint(3, 30), rng.randint(3, 30), rng.randint(3, 30))),
        "temperature": rng.choice((0.0, 0.7, 1.0)),
        "top_k": rng.choice((0, 0, 5, 40)),
        "top_p": rng.choice((1.0, 1.0, 0.9, 0.5)),
        "seed": rng.getrandbits(63),
        "stop_token_ids": tuple(rng.sample(range(vocab_size), vocab_size // 30)) if rng.random() < 0.3 else (),
        "stop": tuple(rng.sample(STOP_STRINGS, 2)) if rng.random() < 0.3 else (),
        "ignore_eos": rng.random() < 0.5,
        "new_text": rng.random() < 0.3,
        "logprobs": logprobs,
        "prompt_logprobs": logprobs is not None and rng.random() < 0.6,
        "priority": rng.randint(-1, 1),
        "cache_salt": rng.choice((None, None, "a", "b")),
    }
    # By random numbers of its own, so that chapters without these have the same plan otherwise.
    shape = make_shape(random.Random(options["seed"]), vocab_size, options["max_tokens"], answers) if shaped else {}
    return options | shape


def make_shape(rng: random.Random, vocab_size: int, max_tokens: int, answers: tuple) -> dict[str, object]:
    """The arguments for what stands between the logits and the draw, all of them: the earlier turn may have had others."""
    none = dict.fromkeys(("logit_bias", "regex", "choice", "json_schema", "parts")) | {"bad_words": (), "json_object": False, "repetition_penalty": 1}
    none |= dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens"), 0)
    return none | choose_shape(rng, vocab_size, max_tokens, answers)


def choose_shape(rng: random.Random, vocab_size: int, max_tokens: int, answers: tuple) -> dict[str, object]:
    kind = rng.choice(("free", "free", "penalties", "bias", "grammar", "grammar", *("parts",) * len(answers)))
    if kind == "penalties":
        return {
            "frequency_penalty": rng.choice((0, 0.5, 2)),
            "presence_penalty": rng.choice((0, -1, 1.5)),
            "repetition_penalty": rng.choice((1, 1.3, 0.8)),
            "min_p": rng.choice((0, 0.1)),
        }
    if kind == "bias":
        ids = rng.sample(range(vocab_size), 5)
        return {"logit_bias": dict(zip(ids, (100, 5, -5, -100, 2))), "min_tokens": min(3, max_tokens), "bad_words": ("the", "an o")}
    if kind == "grammar":
        return {"ignore_eos": False} | rng.choice(SHAPES)
    if kind == "parts":
        # A call has more tokens than most answers here.
        return {"ignore_eos": False, "max_tokens": 2 * max_tokens, "parts": rng.choice(answers)}
    return {}


def available(options: dict[str, object], chapter: Chapter) -> dict[str, object]:
    """Those of the options that the chapter has."""
    return {name: value for name, value in options.items() if ADDED_BY.get(name, NEEDS[0]) in chapter.capabilities}


# ---- running it


@dataclass
class Result:
    """What the steps returned for one request; the fields are those of RequestOutput."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[int, float] | None] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0

    def add(self, output) -> None:
        """Add one StepOutput."""
        assert self.finish_reason is None, f"a token after the request finished: {self.finish_reason}"
        assert output.finish_reason != "error", f"the logits of token {len(self.token_ids)} are not finite"
        if output.prompt_logprobs is not None:
            assert not self.token_ids, f"prompt logprobs with token {len(self.token_ids)}; they belong to the first"
            self.prompt_logprobs = output.prompt_logprobs
        num_cached = getattr(output, "num_cached", 0)
        assert not self.token_ids or num_cached == self.num_cached, f"{num_cached} cached tokens, earlier {self.num_cached}"
        self.num_cached = num_cached
        self.token_ids.append(output.token_id)
        self.text += output.text
        self.logprobs.append(output.logprobs)
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason

    def fail(self) -> None:
        """The request was in a step that failed."""
        assert self.finish_reason is None, f"failed after it finished: {self.finish_reason}"
        self.finish_reason = "error"


class Fault(Exception):
    """Raised in a step on purpose."""


def run_plan(engine, plan: Plan) -> tuple[list[Result], Counter]:
    """The results of a plan's requests, in order, and how often each event occurred; audits the engine after every step."""
    with watch(engine) as model:
        return run_watched(engine, plan, model)


def run_watched(engine, plan: Plan, model) -> tuple[list[Result], Counter]:
    results, events, states = [Result() for _ in plan.requests], Counter(), {}
    added: dict[int, tuple[Planned, Result]] = {}  # by request id
    last_arrival = max(request.arrival_step for request in plan.requests)
    for step in range(MOST_STEPS):
        for request, result in zip(plan.requests, results, strict=True):
            if request.arrival_step == step:
                added[engine.add_request(request.prompt_ids, request.params)] = request, result
        for request_id, (request, result) in added.items():
            state = states.get(request_id, WAITING)
            is_due = request.abort_step == step or (request.abort_preempted and state in PREEMPTED)
            if is_due and abort(engine, request_id, result):
                events[f"aborted while {state}"] += 1
        outputs, failed_ids = step_with_fault(engine, plan.faults.get(step))
        for output in outputs:
            added[output.request_id][1].add(output)
        for request_id in failed_ids:
            added[request_id][1].fail()
        audit(engine)
        if model is not None:
            model.check()
        before, states = states, {request_id: state_of(engine, seq) for request_id, seq in engine.seqs.items()}
        for request_id, state in states.items():
            if state in PREEMPTED and state != before.get(request_id):
                events[state] += 1
                events[f"{state}, {MID_PROMPT}"] += before.get(request_id) == MID_PROMPT
        events[f"steps after which a request is {MID_PROMPT}"] += MID_PROMPT in states.values()
        if failed_ids:
            events["steps failed"] += 1
            events[f"steps failed with a request {MID_PROMPT}"] += MID_PROMPT in before.values()
            events["steps failed while preempted requests waited"] += any(state in PREEMPTED for state in states.values())
        if step >= last_arrival and not states:
            break
    assert not states, f"after {MOST_STEPS} steps, requests {list(states)} are unfinished"
    events.update(f"finished: {ending(result)}" for result in results)
    if model is not None:
        events += model.events
    return results, events


def abort(engine, request_id: int, result: Result) -> bool:
    """Abort a request; return False if it had finished."""
    was_unfinished = result.finish_reason is None
    assert engine.abort_request(request_id) is was_unfinished
    if was_unfinished:
        result.finish_reason = "abort"
    return was_unfinished


def step_with_fault(engine, method: str | None) -> tuple[list, list[int]]:
    """Run a step, in which the method raises unless it is None; return the outputs and the ids of the requests that failed.

    `accept` raises for the last request of the step, after the others have got their tokens. A step that fails leaves
    NaN in its requests' blocks.
    """
    if method is None:
        return engine.step(), []
    owner = engine.model if method == "forward" else engine
    correct, took_part = getattr(owner, method), []

    def fault(*args):
        if method == "accept" and args[0] is not engine.scheduler.running[-1]:
            return correct(*args)
        took_part.extend(seq.seq_id for seq in engine.in_step)
        for seq in engine.scheduler.running:
            engine.cache.k[:, seq.block_table] = math.nan
            engine.cache.v[:, seq.block_table] = math.nan
        raise Fault

    setattr(owner, method, fault)
    try:
        # If no request can run, nothing raises.
        return engine.step(), []
    except Fault:
        failed_ids = engine.fail_step()
    finally:
        delattr(owner, method)
    assert sorted(failed_ids) == sorted(took_part), f"{failed_ids} have failed, but {took_part} were in the step"
    return [], failed_ids


def state_of(engine, seq) -> str:
    """What an unfinished request does: it runs, its prompt finished or not, waits to start, or is preempted, in one of two ways."""
    if seq in engine.scheduler.running:
        return "running" if seq.num_computed >= seq.num_prompt else MID_PROMPT
    if not getattr(seq, "preempted", False):
        return WAITING
    return PREEMPTED[0 if seq.swap_table else 1]


def ending(result: Result) -> str:
    """The finish reason and, for stop, what stopped it."""
    by = {str: " string", int: " token"}.get(type(result.stop_reason), "")
    return result.finish_reason + by


# ---- comparing it


def compare(result: Result, alone, tolerance: float = TOLERANCE) -> None:
    """AssertionError unless a request's result is what it generates alone or, if it was cut short, the beginning of it."""
    count = len(result.token_ids)
    tokens = f"tokens {result.token_ids}, alone {alone.token_ids}"
    assert result.token_ids == alone.token_ids[:count], tokens
    if result.finish_reason in ("abort", "error"):
        assert count < len(alone.token_ids), f"{result.finish_reason} after the last token"
        assert alone.text.startswith(result.text), f"text {result.text!r}, alone {alone.text!r}"
    else:
        assert count == len(alone.token_ids), tokens
        assert result.text == alone.text, f"text {result.text!r}, alone {alone.text!r}"
        reasons = [(each.finish_reason, each.stop_reason) for each in (result, alone)]
        assert reasons[0] == reasons[1], f"finished by {reasons[0]}, alone by {reasons[1]}"
    compare_logprobs(result.logprobs, (alone.logprobs or [None] * count)[:count], tolerance)
    compare_logprobs(result.prompt_logprobs or [], alone.prompt_logprobs or [], tolerance)


def compare_logprobs(result: list[dict[int, float] | None], alone: list[dict[int, float] | None], tolerance: float) -> None:
    """AssertionError unless both have the same logprobs at each position, up to the tolerance; with 0, the same bits.

    The likeliest tokens may differ in the last one, if another is as likely.
    """
    assert len(result) == len(alone), f"{len(result)} positions with logprobs, alone {len(alone)}"
    for position, (ours, its) in enumerate(zip(result, alone)):
        message = f"logprobs at {position}: {ours}, alone {its}"
        assert (ours is None) == (its is None), message
        if not tolerance:
            assert ours == its, message
        elif ours is not None:
            assert len(ours) == len(its), message
            least = min(ours.values()), min(its.values())
            for token_id in ours.keys() | its.keys():
                assert abs(ours.get(token_id, least[0]) - its.get(token_id, least[1])) <= tolerance, message


def count_calls(chapter: Chapter, request: Planned, result: Result) -> int:
    """The number of a result's whole calls, whose arguments must be what their function takes."""
    parts = getattr(request.params, "parts", None)
    if parts is None:
        return 0
    splitter = importlib.import_module(f"{chapter.load().__name__}.parts").Splitter(parts, lambda: "")
    splitter.push(result.text, last=True)
    calls = [call for call in splitter.calls if call.is_whole]
    for call in calls:
        arguments, schema = json.loads(call.arguments), TOOLS[call.name]
        assert arguments.keys() == schema["properties"].keys(), f"{call.name} is called with {call.arguments}"
    return len(calls)


# ---- rounds


def rounds(chapter: Chapter, seeds: Iterable[int], names: tuple[str, ...] = MODELS) -> Counter:
    """Run a round per seed, with the checkpoints in turn; how often each event occurred. An exception has a note with the seed."""
    events, roomy = Counter(), {}
    for seed in seeds:
        name = names[seed % len(names)]
        try:
            events += run_round(chapter, seed, name, roomy)
        except Exception as error:
            error.add_note(f"to see it again: python -m shared.verify.product {chapter.id} --seed {seed} --rounds 1")
            raise
    return events


def roomy_engine(chapter: Chapter, name: str, roomy: dict, **options):
    """An engine for requests that run alone, on a cache that is large enough and finds nothing; kept in roomy."""
    key = name, *options.items()
    if key not in roomy:
        roomy[key] = make_engine(chapter, name, **available({"num_blocks": 64} | options, chapter), **uncached(chapter))
    return roomy[key]


def run_round(chapter: Chapter, seed: int, name: str, roomy: dict) -> Counter:
    """Run one plan, and once more exactly where that exists, and compare each request with itself alone in an engine of roomy."""
    plain = roomy_engine(chapter, name, roomy, linear="plain")
    plan = make_plan(seed, chapter, plain)
    events = compare_plan(chapter, name, plan, plain, TOLERANCE)
    if "exact" in chapter.capabilities:
        # An exact engine chooses the form itself.
        options = {option: value for option, value in plan.options.items() if option != "linear"} | {"exact": True}
        events += compare_plan(chapter, name, replace(plan, options=options), roomy_engine(chapter, name, roomy, exact=True), 0)
    return events


def compare_plan(chapter: Chapter, name: str, plan: Plan, reference, tolerance: float) -> Counter:
    """Run one plan, and compare each of its requests with itself alone in the engine reference."""
    engine = make_engine(chapter, name, **plan.options)
    results, events = run_plan(engine, plan)
    events["exact engines"] += plan.options.get("exact", False)
    if "linear" in chapter.capabilities:
        events[f"engines with linear layers {engine.linear}"] += 1
    for index, (request, result) in enumerate(zip(plan.requests, results)):
        if not result.token_ids:
            continue  # aborted or failed before its first token
        [alone] = reference.generate([request.prompt_ids], request.params)
        try:
            compare(result, alone, tolerance)
        except AssertionError as error:
            error.add_note(f"request {index}: {request}, in an engine with {plan.options}")
            raise
        events["whole calls"] += count_calls(chapter, request, result)
    return events


def make_engine(chapter: Chapter, name: str, **options: int | str):
    with contextlib.redirect_stderr(io.StringIO()):
        return chapter.load().Engine(checkpoint(name), device="cpu", **options)


def main(argv: list[str]) -> int:
    able = [chapter for chapter in CHAPTERS if chapter.capabilities.issuperset(NEEDS)]
    parser = argparse.ArgumentParser(prog="python -m shared.verify.product")
    parser.add_argument("chapters", nargs="*", metavar="vNN", help=f"default: {able[0].id} and all later ones")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each of the others has the next")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args(argv)
    try:
        chapters = [find(text) for text in args.chapters] or able
        for chapter in chapters:
            if lacks := [name for name in NEEDS if name not in chapter.capabilities]:
                raise ValueError(f"{chapter.id} lacks {', '.join(lacks)}; the first chapter with all that is needed is {able[0].id}")
    except ValueError as error:
        parser.error(str(error))
    for chapter in chapters:
        events = rounds(chapter, progress(range(args.seed, args.seed + args.rounds), chapter.id))
        print(f"{chapter.name}: in {args.rounds} rounds, every request generates what it generates alone")
        for event, count in sorted(events.items()):
            print(f"{count:8,} {event}")
    return 0


if __name__ == "__main__":
    run(main)
