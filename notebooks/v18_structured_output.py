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
# # v18, followed along: between the logits and the draw
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/stepserve/stepserve/blob/main/notebooks/v18_structured_output.ipynb)
#
# You forbid most of a row of logits by hand, read an automaton of three characters, let a small vocabulary walk through it, ask pocket for
# records with and without a schema, break the end of a text, see a mask lead a model astray, punish a comma until counting stops, nest
# records deeper than any automaton can follow, and time the first and the second visit to a state. No GPU is needed. Plan about twenty
# minutes. Before each run there is a question: write your answer down first.

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
import inspect
import io
import json
import math
import re
import time
import warnings
from functools import cache
from statistics import median
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, where Jupyter has no widgets

from milestones import v18_structured_output as v18
from milestones.v18_structured_output import engine as engine_module
from milestones.v18_structured_output.automaton import DEAD, START, both, compile_node
from milestones.v18_structured_output.grammars import OwnMatcher
from milestones.v18_structured_output.json_schema import compile_schema
from milestones.v18_structured_output.logits import adjust
from milestones.v18_structured_output.masks import Masks, Vocabulary
from milestones.v18_structured_output.regex import parse_regex
from milestones.v18_structured_output.text import encode_chat
from shared.checkpoints import POCKET


def make_engine(**options):
    """An engine with pocket, without its line on stderr."""
    with contextlib.redirect_stderr(io.StringIO()):
        return v18.Engine(POCKET, device="cpu", linear="plain", **options)


engine = make_engine()
tokenizer = engine.tokenizer
end_ids = engine.config.end_ids


def spelled(token_ids):
    """Each token's text."""
    return [tokenizer.decode([token_id]) for token_id in token_ids]


def ask(text):
    """The prompt for a question."""
    return encode_chat(tokenizer, [{"role": "user", "content": text}])


# %% [markdown]
# ## 1. One row of logits
#
# Pocket is asked for a JSON record of a user. The next cell catches the row of logits for the first token of its answer, before and after
# `adjust`, which is where everything in this chapter happens. The request has a grammar: a number.
#
# **Predict.** Pocket is nearly sure that the answer begins with `{"`. What does the engine answer to a request that allows only digits? How
# many of the 2,048 tokens consist of digits?

# %%
USER = ask("Give me a JSON record of a user.")
rows = []


def caught(logits, draws):
    adjusted = adjust(logits, draws)
    rows.append((logits[0].clone(), adjusted[0].clone()))
    return adjusted


def first_rows(**params):
    """The answer to a request of one token, and its row of logits before and after `adjust`."""
    rows.clear()
    with patch.object(engine_module, "adjust", caught):
        [output] = engine.generate([USER], v18.SamplingParams(max_tokens=1, temperature=0, logprobs=1, **params))
    return output, *rows[0]


def show(logits, count=5):
    probs = logits.softmax(-1)
    for token_id in logits.topk(count).indices.tolist():
        print(f"   {spelled([token_id])[0]!r:8} logit {logits[token_id].item():8.3f}  probability {probs[token_id].item():.6f}")


output, before, after = first_rows(regex="[0-9]+")
print("the model's row:")
show(before)
print("after adjust:")
show(after)
allowed = after > -math.inf
print(f"tokens that are left: {int(allowed.sum())} of {len(after):,}; the answer: {output.text!r}")
assert all(re.fullmatch("[0-9]+", text) for text in spelled(allowed.nonzero()[:, 0].tolist()))

# %% [markdown]
# Nothing was computed anew. Forbidden tokens have minus infinity, and the softmax divides what is left by its sum. So the chosen token
# now looks quite likely, although the model thought otherwise. Which of the two numbers does a client see?
#
# **Predict.** The request asked for logprobs. Which probability of the answer's token is reported: the model's, or the one it was drawn with?

# %%
[token_id] = output.token_ids
reported = output.logprobs[0][token_id]
share = before.softmax(-1)[allowed].sum()
print(f"reported {math.exp(reported):.9f}, the model's {before.softmax(-1)[token_id].item():.9f}, drawn with {after.softmax(-1)[token_id].item():.6f}")
assert math.isclose(math.exp(reported), before.softmax(-1)[token_id].item(), rel_tol=1e-4)
assert torch.allclose(after.softmax(-1), torch.where(allowed, before.softmax(-1) / share, 0), atol=1e-6)
print(f"all allowed tokens together had {share.item():.9f}")

# %% [markdown]
# The model's: logprobs say what the model thinks, not what you have done to it. A very small one is a good sign that a grammar asks for
# something the model would not write.
#
# A bias works in the same place. **Predict.** Two tokens have the same probability, and one of them gets a `logit_bias` of 2. How much
# likelier is it then? And of 100?

# %%
favorite, runner_up = before.topk(2).indices.tolist()
for bias in (0, 2, 10, 100):
    output, _, biased = first_rows(logit_bias={runner_up: bias})
    gain = ((biased - before)[runner_up] - (biased - before)[favorite]).item()
    print(f"bias {bias:3}: the runner-up's odds against the favorite are multiplied by {math.exp(gain):.4g}; greedy answer {output.text!r}")
    assert math.isclose(gain, bias, abs_tol=1e-4)

# %% [markdown]
# A bias b multiplies the odds by e to the power of b, whatever they were. Logits rarely differ by 100, so in practice 100 forces a token and
# -100 forbids it. This is the order in which everything is applied:

# %%
print(inspect.getsource(adjust))

# %% [markdown]
# ## 2. An automaton of three characters
#
# The regular expression `ab*c`: an a, any number of b, a c. An automaton reads a text byte by byte, and is in one state at a time. It
# is a table with a row for each state and a column for each *class* of bytes that it need not tell apart. State 0 is
# DEAD: nothing leads out of it. State 1 is START.
#
# **Predict.** How many columns does the table have? How many rows?

# %%
automaton = compile_node(parse_regex("ab*c"))
print("class of each byte:", {character: int(automaton.classes[ord(character)]) for character in "abcdz?"})
for state, row in enumerate(automaton.table.tolist()):
    name = {DEAD: "DEAD", START: "START"}.get(state, "")
    print(f"state {state} {name:5} next by class {row}", "accepts" if automaton.accepting[state] else "")
assert automaton.table.shape == (5, 4)


def path(automaton, text, state=START):
    """The states on the way through a text."""
    states = [state]
    for byte in text.encode():
        states.append(automaton.walk(states[-1], bytes([byte])))
    return states


for text in ("abbc", "ac", "abd", "ab", "acc"):
    states = path(automaton, text)
    print(f"{text:5} {' -> '.join(map(str, states)):20}", "accepted" if automaton.accepting[states[-1]] else "dead" if states[-1] == DEAD else "may still become whole")

# %% [markdown]
# Four classes: a, b, c, and all other 253 bytes. States 2 and 3 lead to the same places, so one would be enough; the construction
# makes states of sets, and does not merge equal ones. It costs a row.
#
# An engine must not go where a text can never end. The next automaton accepts what two expressions both match.
#
# **Predict.** To which state does an `a` lead, if a text must match `ab*c|d` as well as `ab*e|d`?

# %%
dead_end = both(compile_node(parse_regex("ab*c|d")), compile_node(parse_regex("ab*e|d")))
print("what both ab*c|d and ab*e|d accept:", [text for text in ("d", "abc", "abe", "a") if dead_end.accepts(text.encode())])
print(f"{len(dead_end.table)} states; a leads to state {path(dead_end, 'a')[-1]}, d to state {path(dead_end, 'd')[-1]}")
assert path(dead_end, "a")[-1] == DEAD

# %% [markdown]
# Either expression alone could go on after an a, but no text that begins with an a matches both. `trim` makes DEAD of every state from which no
# accepting one can be reached. So the a is forbidden at once; otherwise the request would write b until it is cut off.
#
# ## 3. Tokens walk
#
# The automaton reads bytes, but the model writes tokens. A token is allowed in a state if its bytes lead to a state other than
# DEAD. Here is a vocabulary of nine tokens.
#
# **Predict.** Which of them are allowed at the start of `ab*c`? Which after `a`? Is the end token allowed there?

# %%
SPELLINGS = [b"a", b"b", b"c", b"ab", b"abb", b"bc", b"abc", b"ca", b"d"]
nine = Vocabulary(SPELLINGS, left_out=set(), vocab_size=len(SPELLINGS))
for place, column in enumerate(nine.columns):
    print(f"byte {place} of the {len(column)} tokens that have one:", [chr(byte) for byte in column])
for text in ("", "a", "abb", "abc"):
    state = path(automaton, text)[-1]
    mask = nine.allowed(automaton, state)
    one_by_one = [automaton.walk(state, spelling) != DEAD for spelling in SPELLINGS]
    assert mask.tolist() == one_by_one
    print(f"after {text!r:6} state {state}: {[spelling.decode() for spelling, ok in zip(SPELLINGS, mask) if ok]}", "and the end" if automaton.accepting[state] else "")

# %% [markdown]
# All tokens walk at once: the longest stand first, so those that have a byte at some place are the first so many, and a step of all of
# them is one lookup in the table. Tokens that die leave the array.
#
# Now pocket's vocabulary. **Predict.** The answer may be `yes` or `no`. How many of 2,048 tokens are allowed at first? After `y`?

# %%
vocabulary = engine.grammars.vocabulary
yes_or_no = compile_node(parse_regex("yes|no"))
for text in ("", "y", "ye", "n", "no"):
    state = path(yes_or_no, text)[-1]
    ids = vocabulary.allowed(yes_or_no, state).nonzero()[0]
    print(f"after {text!r:5} {len(ids)} tokens: {spelled(ids)}", "and the end" if yes_or_no.accepting[state] else "")


def ways(automaton, text):
    """In how many ways tokens spell a text."""

    @cache
    def from_place(place):
        if place == len(text):
            return 1
        return sum(from_place(place + size) for size in range(1, len(text) - place + 1) if text[place : place + size] in known)

    known = set(vocabulary.spellings)
    assert automaton.accepts(text)
    return from_place(0)


print("ways to spell yes:", ways(yes_or_no, b"yes"))
record = b'{"name": "Otto", "age": 42}'
print(f"ways to spell {record.decode()}: {ways(compile_node(parse_regex('.*')), record):,}")

# %% [markdown]
# A grammar allows all of them, and the model has learned to prefer one. So the engine does not ask how a tokenizer would divide the text. It
# asks where a token's bytes lead, from the byte at which the text stands.
#
# ## 4. Twenty answers with a schema, and twenty without
#
# A user's record, at temperature 1. The schema asks for something narrower than what pocket was trained on: adults of at most 40, with a cat or a dog.
#
# **Predict.** Of 20 answers without the schema, how many are JSON, and how many are valid? And with the schema? What does pocket say with the
# schema when asked who it is?

# %%
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]+$", "maxLength": 8},
        "age": {"type": "integer", "minimum": 18, "maximum": 40},
        "pet": {
            "type": "object",
            "properties": {"kind": {"enum": ["cat", "dog"]}, "name": {"type": "string", "maxLength": 8}},
            "required": ["kind"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "pet"],
    "additionalProperties": False,
}
try:
    from jsonschema import Draft202012Validator

    is_valid = Draft202012Validator(SCHEMA).is_valid
except ImportError:
    print("jsonschema is not installed, so only JSON is counted")
    is_valid = None


def judge(text):
    """JSON that the schema allows, other JSON, or neither."""
    try:
        value = json.loads(text)
    except ValueError:
        return "not JSON"
    return "valid" if is_valid is None or is_valid(value) else "JSON"


def answers(prompt, count=20, **params):
    asked = [v18.SamplingParams(**{"max_tokens": 60, "temperature": 1.0, "seed": seed} | params) for seed in range(count)]
    return engine.generate([prompt] * count, asked)


def tally(outputs):
    judged = [judge(output.text) for output in outputs]
    return {kind: judged.count(kind) for kind in ("valid", "JSON", "not JSON")}


for question in ("Give me a JSON record of a user.", "Who are you?"):
    for schema in (None, SCHEMA):
        outputs = answers(ask(question), json_schema=schema)
        print(f"{question:34} {'with' if schema else 'without':7} the schema: {tally(outputs)}")
        for output in outputs[:3]:
            print("     ", output.text)
        if schema:
            assert tally(outputs)["valid"] == 20

# %% [markdown]
# Twenty of twenty. But valid is not true: asked who it is, pocket makes up a person, because nothing else was allowed. And the first answers
# hardly differ between the two questions: the schema has taken the lead.
#
# **Predict.** Now `max_tokens` is 12. How many of the 20 answers with the schema are valid, and how do you know without parsing them?

# %%
outputs = answers(USER, json_schema=SCHEMA, max_tokens=12)
print(tally(outputs), {output.finish_reason for output in outputs}, outputs[0].text)
whole = answers(USER, json_schema=SCHEMA)
assert {output.finish_reason for output in outputs} == {"length"} and {output.finish_reason for output in whole} == {"stop"}
print("the last token of whole answers:", sorted({spelled(output.token_ids[-1:])[0] for output in whole}))

# %% [markdown]
# A grammar promises that an answer *can still become* valid. Whoever reads it must look at `finish_reason` first: `length` means cut
# off. A whole answer ends with its own last token: after the last brace nothing may follow, so the engine
# finishes it there, and does not spend a step on an end token.
#
# ## 5. Where a text may end
#
# The line that decides it is in `make_mask`:

# %%
print(inspect.getsource(OwnMatcher.make_mask))

# %% [markdown]
# **Predict.** Suppose that the end tokens were always allowed, since they add no bytes to a text. Of 20 answers to the request for a record,
# how many would still be valid? To "Who are you?"? And if the schema wants the pet before the name?

# %%
PET_FIRST = SCHEMA | {"properties": {name: SCHEMA["properties"][name] for name in ("pet", "name", "age")}}


def ends_anywhere(self):
    allowed = self.vocabulary.allowed(self.grammar.automaton, self.state)
    allowed[self.grammar.grammars.end_ids] = True
    return np.packbits(allowed, bitorder="little")


for question in ("Give me a JSON record of a user.", "Who are you?"):
    for order, schema in (("name first", SCHEMA), ("pet first", PET_FIRST)):
        engine.grammars.masks = Masks()  # none is kept from before
        with patch.object(OwnMatcher, "make_mask", ends_anywhere):
            outputs = answers(ask(question), json_schema=schema)
        engine.grammars.masks = Masks()
        print(f"{question:33} {order}: {tally(outputs)}  {outputs[0].text!r}")
        assert tally(answers(ask(question), json_schema=schema))["valid"] == 20

# %% [markdown]
# With the question and the form that it was trained on, the model ends a record where it ends, and the bug hides. It shows when the model is asked
# for what it would not write. Then the likeliest thing left is to stop.
#
# ## 6. A mask does not look ahead
#
# Pocket continues "Once upon a time there was" with one of two texts. The next cell asks for each text alone, to add up the model's logprobs, and then lets
# it choose, greedily.
#
# **Predict.** Which of the two does it choose: the one that is likelier as a whole, or the one that begins likelier?

# %%
START_TEXT = "Once upon a time there was"
CHOICES = (" a brave keyboard.", " a KV cache")


def total(text):
    """The model's logprob of a continuation, token by token."""
    [output] = engine.generate([START_TEXT], v18.SamplingParams(max_tokens=30, temperature=0, choice=(text,), logprobs=1))
    assert output.text == text
    return [(spelling, logprobs[token_id]) for spelling, token_id, logprobs in zip(spelled(output.token_ids), output.token_ids, output.logprobs)]


totals = {}
for text in CHOICES:
    tokens = total(text)
    totals[text] = sum(value for _, value in tokens)
    print(f"{text!r:22} logprob {totals[text]:7.2f}:", "  ".join(f"{spelling!r} {value:.2f}" for spelling, value in tokens))
[chosen] = engine.generate([START_TEXT], v18.SamplingParams(max_tokens=30, temperature=0, choice=CHOICES))
print("chosen:", chosen.text)
assert chosen.text == CHOICES[0] and totals[CHOICES[0]] < totals[CHOICES[1]] - 50

# %% [markdown]
# A mask forbids what is impossible now. It does not know that a likely word can only go on in an unlikely way. So answers drawn with
# masks are not drawn from the model's own valid answers with their probabilities; for that, one would have to draw freely and throw invalid answers
# away. The closer a grammar is to what the model writes anyway, the less it matters.
#
# ## 7. Penalties
#
# Pocket can count. Each penalty below runs for 120 tokens, greedily.
#
# **Predict.** A frequency penalty takes its amount from a token's logit for each time that the token was generated. Numbers are
# different tokens. What stops the counting? Why does a presence penalty of the same size not stop it as early?

# %%
COUNTING = "Count: 1, 2, 3, 4,"
comma = tokenizer(",", add_special_tokens=False).input_ids[0]
counted = {}
for params in ({}, {"frequency_penalty": 0.5}, {"frequency_penalty": 1.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.3}, {"repetition_penalty": 2.0}):
    [output] = engine.generate([COUNTING], v18.SamplingParams(max_tokens=120, temperature=0, ignore_eos=True, **params))
    numbers = re.match(r"( \d+,?)*", output.text)[0]
    last = int(re.findall(r"\d+", numbers)[-1])
    name = ", ".join(f"{key} {value}" for key, value in params.items()) or "no penalty"
    counted[name] = last
    print(f"{name:23} counts to {last:3}; {len(set(output.token_ids)):3} different tokens of 120; goes on {output.text[len(numbers):][:48]!r}")
assert counted["frequency_penalty 2.0"] < counted["frequency_penalty 0.5"] < counted["presence_penalty 2.0"]

# %% [markdown]
# The comma. With a frequency penalty of 2, each comma makes the next one's logit 2 lower, until another token wins. A presence penalty is
# taken only once, and a repetition penalty does not add up either; but it divides logits, and it also counts the prompt, which has
# four commas. What a text needs often (commas, quotes, braces) is what these parameters punish most.
#
# **Predict.** Now the same penalty of 2 beside a grammar of numbers and commas. What can it still do?

# %%
[output] = engine.generate([COUNTING], v18.SamplingParams(max_tokens=60, temperature=0, frequency_penalty=2.0, regex=" [0-9]+(, [0-9]+)*"))
print(output.finish_reason, repr(output.text))
assert re.fullmatch(" [0-9]+(, [0-9]+)*", output.text)

# %% [markdown]
# A grammar comes last, so no penalty and no bias can break it. Within the grammar, they have their usual effect: in the end the comma had
# lost so much that another digit won, and then an end token.
#
# ## 8. What an automaton cannot follow
#
# A record whose pet is a record again, to any depth. An automaton has a fixed number of states, and cannot remember how many braces are
# open. `llguidance` is an optional library with a parser that can.
#
# **Predict.** What does the engine say without the library? With it, how deep do eight records at temperature 1 nest, and do all of them end?

# %%
NESTED = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}, "pet": {"$ref": "#"}},
    "required": ["name"],
    "additionalProperties": False,
}
own = make_engine(grammar_backend="own")
try:
    own.generate([USER], v18.SamplingParams(json_schema=NESTED))
except v18.RequestError as error:
    print("refused:", error)
try:
    import llguidance  # noqa: F401

    outputs = answers(USER, count=8, json_schema=NESTED, max_tokens=120)
except ImportError:
    print("llguidance is not installed; pip install llguidance")
    outputs = []
for output in outputs:
    print(f"{output.finish_reason:6} depth {output.text.count('{')}: {output.text[:100]}")
    if output.finish_reason == "stop":
        json.loads(output.text)

# %% [markdown]
# The library promises the same as the automaton: what has been written can still become valid. An answer that was cut off is no JSON, and nothing
# in this schema makes an answer end. A schema with a bounded depth would, and an automaton could follow it.
#
# Not everything that a schema can say is obeyed, and nothing is ignored. **Predict.** Which of these are refused: by the automaton, and by both?

# %%
for schema in (
    {"type": "string", "format": "date"},
    {"type": "string", "format": "email"},
    {"type": "number", "multipleOf": 0.5},
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"type": "string", "patern": "^a"},
):
    print(json.dumps(schema))
    for name, each in (("own", own), ("auto", engine)):
        try:
            each.generate([USER], v18.SamplingParams(max_tokens=1, json_schema=schema))
            print(f"   {name:4} follows it")
        except v18.RequestError as error:
            print(f"   {name:4} {str(error)[:110]}")

# %% [markdown]
# The last one is a spelling mistake. The standard has validators ignore keywords that they do not know, so every string would be valid, and nobody
# would notice.
#
# ## 9. The first and the second visit
#
# A mask is computed when a request is the first to reach a state, and kept, a bit for each token.
#
# **Predict.** The schema of part 4 has how many states? How many of them have 20 answers visited? How much faster is the second visit?

# %%
automaton = compile_schema(SCHEMA)
engine.grammars.masks = Masks()
answers(USER, json_schema=SCHEMA)
masks = engine.grammars.masks
visited = len(masks.kept)
print(f"{len(automaton.table)} states, {visited} visited by 20 answers; {masks.nbytes:,} bytes of masks, {masks.nbytes // visited} each")
answers(USER, json_schema=SCHEMA)
print("visited after the same answers again:", len(masks.kept))
assert len(masks.kept) == visited < len(automaton.table)

# %% tags=["varies"]
def microseconds(function, repeats):
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(1e6 * (time.perf_counter() - began))
    return median(times)


# Real vocabularies have 128,000 tokens and more: pocket's own, and pairs of its tokens.
whole = [raw for raw in vocabulary.spellings if raw]
pairs = [whole[number % len(whole)] + whole[number // len(whole) * 31 % len(whole)] for number in range(128_000 - len(whole))]
large = Vocabulary(whole + pairs, set(), 128_000)
in_a_string = path(automaton, '{"name": "Otto", "age": 30, "pet": {"kind": "cat", "name": "M')[-1]
states = {"start": START, "in a string": in_a_string}
firsts = {}
for size, each in (("2,048 tokens", vocabulary), ("128,000 tokens", large)):
    for name, state in states.items():
        make = lambda each=each, state=state: np.packbits(each.allowed(automaton, state), bitorder="little")
        kept = Masks()
        firsts[size, name] = microseconds(make, 20)
        second = microseconds(lambda: kept.get((1, state, False), make), 200)
        count = int(each.allowed(automaton, state).sum())
        print(f"{size:15} {name:12} {count:6} allowed; first visit {firsts[size, name]:7.0f} us, second {second:5.2f} us")
        assert firsts[size, name] > second

# %% tags=["varies"]
plt.figure(figsize=(6, 2.4))
for offset, size in enumerate(("2,048 tokens", "128,000 tokens")):
    plt.barh([place + 0.4 * offset for place in range(2)], [firsts[size, name] for name in states], height=0.35, label=size)
plt.yticks([0.2, 1.2], list(states))
plt.xscale("log")
plt.xlabel("us for a first visit")
plt.legend()
plt.show()

# %% [markdown]
# A state in which few tokens survive their first byte is cheap, even in a large vocabulary. In a string, most tokens walk to their
# end. And all requests with the same grammar share its masks, so a server pays for a state once.
#
# ## To try
#
# 1. In part 2, change the table by hand so that it also accepts `abd`, but not `abbd`, and let `nine` walk through it. How many states and
#    classes does it need?
# 2. In part 4, allow white space: compile `[ \n\t]*` between all parts of a record, as a regular expression. At temperature 1.3, how long do answers
#    get? Why does the chapter allow one spelling only?
# 3. In part 6, throw away and draw again: sample freely until a text is among the choices. How many draws does it take, and which choice wins?
# 4. In part 7, find the smallest frequency penalty that spoils a JSON record without a schema. What breaks first?
# 5. In part 9, sample 200 answers at temperature 1.3. Do 20 more answers still visit new states?
#
# The chapter's text is [milestones/v18_structured_output/README.md](../milestones/v18_structured_output/README.md). `make test-v18` runs its tests, `make traps-v18`
# plants its seeded bugs, and `make diff-v18` shows everything that the chapter changed.
