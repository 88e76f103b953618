# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# %% [markdown]
# # v19, followed along: an answer has parts
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v19_tools.ipynb)
#
# You take an answer apart while it arrives, look at what a prompt says about tools, count which tokens may come next with each `tool_choice`,
# force pocket to call functions, give a marker a token of its own, read a call from a server's stream, and see what more tools cost. No GPU is
# needed. Plan about fifteen minutes. Before each run there is a question: write your answer down first.

# %%
import subprocess
import sys
from pathlib import Path

root = next((path for path in (Path.cwd(), *Path.cwd().parents) if (path / "milestones").is_dir()), None)
if root is None:  # on Colab: fetch the repository and what it needs
    root = Path("stepserve").resolve()
    subprocess.run(["git", "clone", "--depth", "1", "https://github.com/stepserve/stepserve", str(root)], check=True)
    subprocess.run([sys.executable, str(root / "shared" / "commands" / "install.py"), "here"], check=True)
sys.path.insert(0, str(root))

# %% [markdown]
# All of this runs on the CPU, even if there is a GPU.

# %%
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

# %%
import contextlib
import io
import itertools
import json
import re
import time
import warnings
from dataclasses import replace
from statistics import median

import matplotlib.pyplot as plt
import openai
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v19_tools as v19
from milestones.v19_tools.answers import PartedAnswer
from milestones.v19_tools.automaton import DEAD, SPECIAL, START
from milestones.v19_tools.compiler import compile_here
from milestones.v19_tools.masks import Vocabulary
from milestones.v19_tools.outputs import StepOutput
from milestones.v19_tools.parts import Parts, Splitter, Tool
from milestones.v19_tools.tools import FORMS, encode_turns, family_of
from shared.chapters import find
from shared.checkpoints import POCKET
from shared.verify.serving import serving

with contextlib.redirect_stderr(io.StringIO()):  # its line on stderr
    engine = v19.Engine(POCKET, device="cpu", linear="plain")
tokenizer = engine.tokenizer

# %% [markdown]
# ## 1. Taking an answer apart
#
# This is what a model writes that thinks and calls: Qwen3's form, which is also that of many others. It arrives in pieces, and a piece may
# end anywhere, also in the middle of a marker.

# %%
HERMES = FORMS["hermes"]
THOUGHT = ("<think>", "</think>")
RAW = """<think>
A sum. I call add.
</think>

One moment, a < b here.

<tool_call>
{"name": "add", "arguments": {"a": 17, "b": 25}}
</tool_call>"""
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name, schema):
    return Tool(name, json.dumps(schema), is_strict=True, param="tools")


TOOLS = (tool("add", ADD), tool("time", NOTHING))
thinking = Parts(thought=THOUGHT, form=HERMES, tools=TOOLS)


def split(parts, text, size):
    """The splitter after it has read a text in pieces of so many characters, the deltas, and the most that it held back."""
    ids = itertools.count(1)
    splitter, deltas, held = Splitter(parts, lambda: f"call_{next(ids)}"), [], 0
    for place in range(0, len(text), size):
        deltas += splitter.push(text[place : place + size], last=place + size >= len(text))
        held = max(held, len(splitter.held))
    return splitter, deltas, held


splitter, deltas, _ = split(thinking, RAW, 16)
for delta in deltas:
    print(f"{delta.kind:10} {delta.text!r}")
print()
print("thought:", repr(splitter.thought))
print("said:   ", repr(splitter.content))
print("calls:  ", [(call.id, call.name, call.arguments) for call in splitter.calls])

# %% [markdown]
# The markers are in no part, and neither are the empty lines around them. The name of a function comes as a whole, its arguments as they come.
#
# **Predict.** Now the same text arrives in pieces of 1, 3 and 7 characters, and at once. Do the parts differ? How many pieces reach the client? How
# many characters does the splitter hold back at most, when the text comes one by one?

# %%
parts_of = lambda splitter: (splitter.thought, splitter.content, [(call.name, call.arguments) for call in splitter.calls])
for size in (1, 3, 7, len(RAW)):
    other, deltas, held = split(thinking, RAW, size)
    print(f"pieces of {size:3}: {len(deltas):3} deltas, at most {held:2} characters held back at the end of a piece")
    assert parts_of(other) == parts_of(splitter)

# %% [markdown]
# The parts never depend on the pieces. What is held back longest is the JSON before a name, since a client gets the name at once. In what is
# said, only a text that may become a marker waits. Watch the `<`:

# %%
said = Parts(form=HERMES, tools=TOOLS)
for text in ("a < b", "a <tool", "a <tool> b", "a\n\n", "a\n\nb"):
    now, _, _ = split(said, text, 1)
    waiting = Splitter(said, str)
    given = "".join(delta.text for delta in waiting.push(text, last=False))
    print(f"{text!r:14} given to the client so far {given!r:14} held back {waiting.held!r:9} if the answer ends here {now.content!r}")

# %% [markdown]
# Empty lines wait too, because a call may follow them. If the answer ends, everything that waited is part of what is said.
#
# **Predict.** An answer is cut off by `max_tokens`. What is the message's `content`, and which calls does it have, if the cut is in the thought; between
# the thought and the call; in the name; in the arguments?

# %%
for ending in ("I call", "a < b", '{"name": "ad', '{"a": 17', "</tool_call>"):
    cut = RAW[: RAW.index(ending) + len(ending)]
    answer = PartedAnswer(0, thinking, lambda: "call_1")
    answer.push_parts(StepOutput(0, 0, cut, None, "stop" if cut == RAW else "length"))
    calls = [(call.name, call.arguments) for call in answer.parts.calls]
    print(f"...{ending:14} {answer.finish_reason:10} content {answer.said!r:26} calls {calls}")

# %% [markdown]
# A call is reported as soon as its name is known, and not before. Only if the engine stopped by itself, and every call is whole, is the finish
# reason `tool_calls`. So a client that reads a call looks at the finish reason first, as with JSON in v18.
#
# ## 2. What the prompt says
#
# A checkpoint's chat template writes tools, calls and results into the prompt, in the form in which the model was trained to continue. No config says
# which form that is. So `family_of` gives the template a call, and compares what it writes with the forms in `FORMS`.

# %%
def hint(call, more=""):
    """A template that writes only the calls of a conversation, one after another."""
    return "{% if tools %}{% endif %}" + more + "{% for m in messages %}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}{% endfor %}"


THINKS = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}"
HINTS = {
    "Qwen3": hint('<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>', THINKS),
    "Llama 3": hint('{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'),
    "Mistral": hint("[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"),
    "Qwen3-Coder": hint("<tool_call>\n<function={{ c.function.name }}>{{ c.function.arguments }}</function>\n</tool_call>"),
    "pocket": tokenizer.chat_template,
}
unknown = []
template = tokenizer.chat_template
for name, text in HINTS.items():
    tokenizer.chat_template = text
    family = family_of(tokenizer)
    form = family.form and f"{family.form.marker!r}, then {family.form.opening!r}"
    unknown += [name] * (form is None)
    print(f"{name:12} writes tools: {family.has_tools!s:6} thinks: {family.thought is not None!s:6} options: {sorted(family.options)!s:20} calls: {form}")
tokenizer.chat_template = template
assert unknown == ["Qwen3-Coder"]

# %% [markdown]
# (These are only the lines that matter of four templates.) Llama's calls have no marker: there, only the beginning of an answer tells a call
# from a text. Qwen3-Coder's calls are not JSON, and tools are refused for it. Pocket's template knows no tools at all.
#
# **Predict.** What does a request with tools become for pocket? How many of its tokens are about the tools?

# %%
family = family_of(tokenizer)
QUESTION = [{"role": "user", "content": "What is 17 plus 25?"}]
DESCRIBED = [
    {"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": ADD}},
    {"type": "function", "function": {"name": "time", "description": "Get the time."}},
]


def prompt_of(messages, tools):
    prompt_ids, _ = encode_turns(tokenizer, family, messages, tools, {}, lambda text: None)
    return prompt_ids


PROMPT = prompt_of(QUESTION, DESCRIBED)
print(tokenizer.decode(PROMPT))
print(f"\n{len(PROMPT)} tokens with tools, {len(prompt_of(QUESTION, []))} without")

# %% [markdown]
# A call and its result come back in the next request, and go into the prompt in the same form:

# %%
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 17, "b": 25}}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "add", "content": "42"}
turns = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]
print(tokenizer.decode(prompt_of(turns, [])))

# %% [markdown]
# ## 3. What may come next
#
# One automaton describes all answers that a request may get. The next cell compiles four of them, lets each read a few beginnings of an answer, and
# counts which of pocket's 2,048 tokens are allowed then.
#
# **Predict.** At which of these beginnings does `none` differ from `auto`, and by how many tokens? How many tokens may follow `{"name": "` if `add`
# and `time` are there? Which beginnings are impossible with `required`? Where may the answer end?

# %%
MODES = {
    "none": Parts(form=HERMES),
    "auto": Parts(form=HERMES, tools=TOOLS),
    "required": Parts(form=HERMES, tools=TOOLS, is_required=True),
    "named: add": Parts(form=HERMES, tools=TOOLS[:1], is_required=True, is_single=True),
}
vocabulary = engine.grammars.vocabulary
automata = {mode: compile_here("parts", parts) for mode, parts in MODES.items()}
OPENED = '<tool_call>\n{"name": "'
WHOLE = f'{OPENED}add", "arguments": {{"a": 17, "b": 25}}}}\n</tool_call>'


def may_follow(automaton, text):
    """The tokens that may follow a text, and whether it may end there; None if it cannot begin an answer."""
    state = automaton.walk(START, text.encode())
    return None if state == DEAD else (vocabulary.allowed(automaton, state).nonzero()[0], automaton.accepting[state])


print(f"{'':32}" + "".join(f"{mode:>14}" for mode in MODES))
for text in ("", "Hello", "1 <", "<tool_call", OPENED, f'{OPENED}add', f'{OPENED}add", "arguments": {{"a": ', WHOLE, f"{WHOLE}\n"):
    row = []
    for automaton in automata.values():
        following = may_follow(automaton, text)
        row.append("-" if following is None else f"{len(following[0]):,}{' or end' if following[1] else ''}")
    print(f"{text[-30:]!r:32}" + "".join(f"{cell:>14}" for cell in row))
print("after the opening:", [tokenizer.decode([token_id]) for token_id in may_follow(automata["auto"], OPENED)[0]])
print("rows of the tables:", {mode: len(automaton.table) for mode, automaton in automata.items()})
none, auto = (set(may_follow(automata[mode], "<tool_call")[0]) for mode in ("none", "auto"))
assert [tokenizer.decode([token_id]) for token_id in auto - none] == [">"]

# %% [markdown]
# One token: the `>` that would complete the marker. Everything before it is text like any other. With `required`, an answer begins with the marker, or with
# empty lines before it, and nothing can be said. A named function is called once; then nothing may follow, so the engine stops there by itself.
#
# ## 4. A model that never learned it
#
# Pocket was not trained to call anything. Each `tool_choice` gets eight answers at temperature 1.
#
# **Predict.** With `auto`, how many of the eight answers call a function? With a named one, how many calls have arguments that the schema allows? How many
# have the numbers of the question, 17 and 25?

# %%
def answers(mode, count=8, **options):
    parts = options.pop("parts", MODES.get(mode))
    params = [v19.SamplingParams(parts=parts, max_tokens=options.get("max_tokens", 80), temperature=1.0, seed=seed) for seed in range(count)]
    outputs = engine.generate([PROMPT] * count, params)
    return outputs, [split(parts, output.text, len(output.text) or 1)[0] for output in outputs]


for mode in MODES:
    outputs, splitters = answers(mode)
    calls = [call for each in splitters for call in each.calls]
    whole = [call for call in calls if call.is_whole]
    print(f"{mode:10} {sum(bool(each.calls) for each in splitters)} of 8 answers call, {len(whole)} of {len(calls)} calls are whole; e.g.", " ".join(outputs[0].text.split())[:64])
    for call in whole:
        arguments = json.loads(call.arguments)
        assert arguments.keys() == ({"a", "b"} if call.name == "add" else set()) and all(0 <= value <= 99 for value in arguments.values())
outputs, splitters = answers("named: add")
print([call.arguments for each in splitters for call in each.calls])

# %% [markdown]
# Every call that is whole can be run, and none makes sense: a grammar says what may be written, not what is meant. `auto` is honest about it, since
# pocket says what it would have said anyway. With `required`, some answers are cut off: after a call another one may follow, and pocket does not
# know when to stop. `parallel_tool_calls: false` allows one.
#
# **Predict.** What changes if the arguments of `add` may be any integers?

# %%
unbounded = json.loads(json.dumps(ADD))
for schema in unbounded["properties"].values():
    del schema["minimum"], schema["maximum"]
parts = Parts(form=HERMES, tools=(tool("add", unbounded),), is_required=True, is_single=True)
outputs, splitters = answers("", parts=parts)
for output, each in list(zip(outputs, splitters))[:4]:
    print(output.finish_reason, each.calls[0].is_whole, each.calls[0].arguments[:80])
print("cut off:", sum(output.finish_reason == "length" for output in outputs), "of 8")

# %% [markdown]
# Digits without end are a valid beginning of an integer. A model that knows what it does stops; for others, a schema should have bounds.
#
# ## 5. A marker with a token of its own
#
# Mistral's markers, `[TOOL_CALLS]` and `[ARGS]`, are special tokens: each is one token, which other tokens cannot spell in an answer. In the automaton, a special token is
# spelled with a byte that UTF-8 does not have, and then its name. Here is a vocabulary of ten tokens, two of them special.
#
# **Predict.** May an answer that has no tools to call have the characters `[TOOL_CALLS]`, from ordinary tokens? May one that has? Which tokens are
# allowed after the special `[TOOL_CALLS]`?

# %%
SPELLINGS = [b"a", b"[", b"TOOL_CALLS", b"]", b"time", b"add", b"{}", b"{", SPECIAL + b"[TOOL_CALLS]", SPECIAL + b"[ARGS]"]
ten = Vocabulary(SPELLINGS, vocab_size=len(SPELLINGS))
MISTRAL = FORMS["mistral-args"]
marked = Parts(form=MISTRAL, tools=(tool("time", NOTHING),), special=("[TOOL_CALLS]", "[ARGS]"))
name_of = lambda raw: f"<{raw[1:].decode()}>" if raw.startswith(SPECIAL) else raw.decode()
for mode, parts in (("none", replace(marked, tools=())), ("auto", marked), ("required", replace(marked, is_required=True))):
    automaton = compile_here("parts", parts)
    for text in (b"", b"a[TOOL_CALLS", SPECIAL + b"[TOOL_CALLS]", SPECIAL + b"[TOOL_CALLS]time", SPECIAL + b"[TOOL_CALLS]time" + SPECIAL + b"[ARGS]{}"):
        state = automaton.walk(START, text)
        allowed = "-" if state == DEAD else [name_of(raw) for raw, ok in zip(SPELLINGS, ten.allowed(automaton, state)) if ok]
        spelled = re.sub(SPECIAL + rb"(\[\w+\])", rb"<\1>", text).decode()
        print(f"{mode:9} {spelled:34} {allowed} {'or end' if automaton.accepting[state] else ''}")

# %% [markdown]
# The characters are forbidden as well, in both cases. The splitter reads text, in which both look the same, so only one of them may occur. And a client
# should never see something in a text that looks like a call but is none.
#
# ## 6. The same from a server
#
# The request below forces a call of `add` and streams it. OpenAI's client gets it from the chapter's server.
#
# **Predict.** How many chunks have the name of the function? How many have a piece of its arguments? What is in the last one?

# %%
@contextlib.contextmanager
def a_client():
    """A client of the chapter's server, which runs until the block ends. (The lines that it prints are discarded.)"""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        server = stack.enter_context(serving(find("v19"), engine))
        yield stack.enter_context(openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0))


BODY = dict(model="pocket", messages=QUESTION, tools=DESCRIBED, max_tokens=80, temperature=0)
FORCED = {"type": "function", "function": {"name": "add"}}
with a_client() as client:
    chunks = list(client.chat.completions.create(**BODY, tool_choice=FORCED, stream=True))
    [choice] = client.chat.completions.create(**BODY, tool_choice=FORCED).choices
    [first] = choice.message.tool_calls
    turns = [*QUESTION, choice.message.model_dump(include={"role", "content", "tool_calls"}), {"role": "tool", "tool_call_id": first.id, "content": "42"}]
    [after] = client.chat.completions.create(**BODY | {"messages": turns}).choices
    try:
        client.chat.completions.create(**BODY, tool_choice={"type": "function", "function": {"name": "subtract"}})
    except openai.BadRequestError as error:
        refusal = error.body["message"]
begun, *pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or ()]
print("name:     ", begun.function.name, begun.type, "id" if begun.id else "no id", repr(begun.function.arguments))
print("arguments:", " ".join(repr(piece.function.arguments) for piece in pieces))
print("last:     ", chunks[-1].choices[0].delta.model_dump(exclude_none=True), chunks[-1].choices[0].finish_reason)
print("whole:    ", choice.finish_reason, choice.message.content, first.function.name, first.function.arguments)
print("after the result:", after.finish_reason, repr(after.message.content))
print("refused:  ", refusal)
assert "".join(piece.function.arguments for piece in pieces) == first.function.arguments and first.id != begun.id

# %% [markdown]
# A call begins with its name and its id, and then only its arguments grow. The id is the server's; it tells a result to which call it belongs. The
# server keeps nothing: the client sends the call back together with its result.
#
# ## 7. What more tools cost
#
# **Predict.** A request has 1, 2, 4, ... 32 tools like `add`. Does the table grow in proportion, or faster?

# %% tags=["varies"]
def milliseconds(function, repeats=3):
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - began))
    return median(times)


counts, rows, compile_ms = (1, 2, 4, 8, 16, 32), [], []
for count in counts:
    parts = Parts(form=HERMES, tools=tuple(tool(f"function_{number}", ADD) for number in range(count)))
    rows.append(len(compile_here("parts", parts).table))
    compile_ms.append(milliseconds(lambda parts=parts: compile_here("parts", parts)))
    print(f"{count:3} tools: {rows[-1]:5} rows, compiled in {compile_ms[-1]:6.1f} ms")
splitting = milliseconds(lambda: split(thinking, RAW, 4)) / (len(RAW) / 4)
print(f"taking apart: {1e3 * splitting:.1f} us for each piece of 4 characters")

# %% tags=["varies"]
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.4))
left.plot(counts, rows, "o-")
left.set(xlabel="tools", ylabel="rows of the table")
right.plot(counts, compile_ms, "o-")
right.set(xlabel="tools", ylabel="ms to compile")
figure.tight_layout()
plt.show()

# %% [markdown]
# In proportion: each name leads to rows of its own. The table is compiled once, and kept for all requests with the same tools and the same choice. To take an answer apart costs microseconds; a step takes milliseconds.
#
# ## To try
#
# 1. In part 1, add a second call to `RAW`, and a text after it. What does the splitter make of the text, and why is it never generated?
# 2. In part 1, write a splitter that looks for `<tool_call>` in each piece alone. For which sizes of pieces does it lose the call?
# 3. In part 3, add a tool `adder`. Which tokens may follow `add` then? When does the automaton know which of the two it is?
# 4. In part 4, give the named function a third argument with `"enum": ["plus", "minus"]`. Does pocket prefer one?
# 5. In part 6, send `chat_template_kwargs={"foo": 1}` by `extra_body`, then `{"enable_thinking": False}`. Which is refused, and why not the other?
#
# The chapter's text is [milestones/v19_tools/README.md](../milestones/v19_tools/README.md). `make test-v19` runs its tests, `make traps-v19`
# plants its seeded bugs, and `make diff-v19` shows everything that the chapter changed.
