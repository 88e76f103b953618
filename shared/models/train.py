"""Train the bundled models on the text of `corpus` or, for pocket-tools, of `tools_corpus`.

    python -m shared.models.train                          # pocket
    python -m shared.models.train --model pocket-draft
    python -m shared.models.train --model pocket-tools

One CPU thread is enough. An interrupted training resumes from its state in .cache/train.

Reads: shared/models/corpus/*. Writes: shared/models/pocket, shared/models/pocket-draft, shared/models/pocket-tools.
"""
import argparse
import itertools
import json
import math
import random
import re
import shutil
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shared.chapters import ROOT
from shared.machine import machine, today
from shared.models import corpus, tools_corpus
from shared.programs import run

HERE = Path(__file__).parent
STATE = ROOT / ".cache" / "train"
SPECIAL = [corpus.BOS, corpus.END, corpus.EOT, corpus.USER, corpus.ASSISTANT, corpus.SYSTEM]
VOCAB_SIZE = {"pocket": 2048, "pocket-draft": 2048, "pocket-tools": 1024}

# No two dimensions are equal, so that swapped axes cause an error.
SHAPES = {
    "pocket": dict(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
    ),
    "pocket-draft": dict(
        hidden_size=96,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    ),
    "pocket-tools": dict(
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
    ),
}
# Steps of each phase, in order; corpus.SHARES and tools_corpus.ECHOES have each phase's mix of texts. pocket-tools first learns
# to repeat words: from whole conversations it learns to copy only slowly.
STEPS = {
    "pocket": {"learn": 1500, "polish": 800, "copy": 700},
    "pocket-draft": {"learn": 900, "polish": 300},
    "pocket-tools": {"echo": 600, "learn": 1000, "answer": 2600},
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Rows are short, except in the last tenth of each phase's steps, so that late positions are trained too.
ROW, LONG_ROW, TOKENS_PER_STEP = 256, 1024, 2048
TOOLS_ROW = 512
LEARNING_RATE = 2e-3
SAVE_EVERY = 100
# The label of a token that is not to be predicted.
IGNORE = -100


def texts(name: str):
    """The module that generates the model's training text."""
    return tools_corpus if name == "pocket-tools" else corpus


def make_tokenizer(name: str = "pocket") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the corpus, which adds <|begin|>; its alphabet is all 256 bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tools = name == "pocket-tools"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if tools:
        # What has to be copied has the same tokens everywhere: numbers digit by digit, and names without the space before them.
        # A newline is a token of its own, so that a prompt that ends with one has the same tokens as the whole text.
        split = pre_tokenizers.Split(Regex(r"\n| (?=\p{Lu})"), "isolated")
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, digits, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE[name] - (len(tools_corpus.MARKS) if tools else 0),
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        # Only common pairs become tokens, so rare characters have one token per byte.
        min_frequency=20 if tools else 60,
        show_progress=False,
    )
    stream = texts(name).documents(seed=0)
    if tools:
        stream = (re.sub(r"</?[a-z_|]+>", "\n", text) for text in stream)
    tokenizer.train_from_iterator(itertools.islice(stream, 20_000), trainer)
    if tools:
        tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in tools_corpus.MARKS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BOS} $A",
        special_tokens=[(corpus.BOS, SPECIAL.index(corpus.BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=corpus.BOS,
        eos_token=corpus.END,
        pad_token=corpus.END,
        additional_special_tokens=SPECIAL[2:],
        chat_template=tools_corpus.CHAT_TEMPLATE if tools else CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(name: str) -> LlamaForCausalLM:
    """The untrained model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[name],
        head_dim=32,
        vocab_size=VOCAB_SIZE[name],
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index(corpus.BOS),
        eos_token_id=SPECIAL.index(corpus.END),
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def place(step: int, phases: dict[str, int]) -> tuple[str, float]:
    """A step's phase, and the share of that phase that is done."""
    for name, length in phases.items():
        if step < length:
            return name, step / length
        step -= length
    raise ValueError(f"step {step} is past the last of {phases}")


def batches(name: str, tokenizer: PreTrainedTokenizerFast, first_step: int, phases: dict[str, int]):
    """Each step's token ids, [rows, row + 1]: documents end to end, generated from the step's own seed.

    A row of pocket-tools begins with a document's beginning, since the rest of a conversation means little without its tools.
    """
    for step in range(first_step, sum(phases.values())):
        phase, done = place(step, phases)
        row = LONG_ROW if done >= 0.9 else ROW
        if phase == "answer":
            row = LONG_ROW if done >= 0.9 else TOOLS_ROW
        rng = random.Random(step + 1)
        size = TOKENS_PER_STEP + TOKENS_PER_STEP // row
        ids = []
        while len(ids) < size:
            new = tokenizer(texts(name).document(rng, phase), add_special_tokens=False).input_ids
            ids += new[: row + 1 - len(ids) % (row + 1)] if name == "pocket-tools" else new
        yield torch.tensor(ids[:size]).view(-1, row + 1)


def labels(name: str, tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> torch.Tensor:
    """What each position is to predict: the next token, but in pocket-tools only what the model itself writes.

    That is what follows <|assistant|>, but not an empty thought, which is the prompt's, nor the first token of an earlier turn,
    which has lost its thought.
    """
    following = ids[:, 1:].clone()
    if name != "pocket-tools":
        return following
    assistant, end = SPECIAL.index(corpus.ASSISTANT), SPECIAL.index(corpus.EOT)
    empty = tokenizer(tools_corpus.NO_THOUGHT, add_special_tokens=False).input_ids
    for row, targets in zip(ids.tolist(), following):
        own, start = [False] * len(row), None
        for i, token in enumerate(row):
            own[i] = start is not None and i >= start
            if token == assistant:
                start = i + 1
                if row[start : start + len(empty)] == empty:
                    start += len(empty)
                elif row[start : start + 1] != empty[:1]:
                    start += 1
            elif token == end:
                start = None
        targets[~torch.tensor(own[1:])] = IGNORE
    return following


def rate(step: int, phases: dict[str, int]) -> float:
    """The learning rate's factor: in each phase a short warm-up, then a cosine to a fiftieth; halved in pocket's later phases."""
    phase, done = place(step, phases)
    rise = min(1.0, (round(done * phases[phase]) + 1) / 100)
    top = 0.5 if phase in ("polish", "copy") else 1.0
    return top * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train(name: str, out: Path) -> None:
    """Train, or resume training, and write the model, its tokenizer and its figures to out."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(name)
    model = make_model(name)
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    STATE.mkdir(parents=True, exist_ok=True)
    state_file = STATE / f"{name}.pt"
    phases = STEPS[name]
    steps = sum(phases.values())
    first, minutes = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, minutes = state["step"], state["minutes"]
    start = time.monotonic()
    bar = tqdm(batches(name, tokenizer, first, phases), initial=first, total=steps, mininterval=2)
    for step, ids in enumerate(bar, first):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate(step, phases)
        logits = model(ids[:, :-1]).logits
        targets = labels(name, tokenizer, ids)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            spent = minutes + (time.monotonic() - start) / 60
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "minutes": spent,
            }
            draft = state_file.with_suffix(".tmp")
            torch.save(state, draft)
            draft.replace(state_file)
            write(name, model, tokenizer, out, step + 1, spent)


def write(name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, step: int, minutes: float):
    """Write the checkpoint in bfloat16, replacing the old one only when the new one is complete."""
    draft = out.with_name(out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(
        bos_token_id=SPECIAL.index(corpus.BOS),
        eos_token_id=[SPECIAL.index(corpus.END), SPECIAL.index(corpus.EOT)],
        pad_token_id=SPECIAL.index(corpus.END),
    )
    stored.to(torch.bfloat16).save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    figures = {
        "parameters": sum(p.numel() for p in stored.parameters()),
        "vocabulary": len(tokenizer),
        "bytes": (draft / "model.safetensors").stat().st_size,
        "held_out_loss": round(held_out_loss(draft, name), 4),
        "steps": step,
        "tokens": step * TOKENS_PER_STEP,
        "minutes": round(minutes, 1),
        "command": f"python -m shared.models.train --model {name}",
        "machine": machine() + ", one thread",
        "date": today(),
    }
    (draft / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    (draft / "README.md").write_text(card(name, figures))
    old = out.with_name(out.name + ".old")
    if out.exists():
        out.rename(old)
    draft.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def card(name: str, figures: dict) -> str:
    """The model card, with the figures of figures.json."""
    about, held_out, text = TOOLS_CARD if name == "pocket-tools" else POCKET_CARD
    return f"""\
# {name}

{about}

| | |
|---|---|
| parameters | {figures["parameters"]:,} |
| vocabulary | {figures["vocabulary"]:,} tokens, byte-level BPE |
| weights | {figures["bytes"]:,} bytes, bfloat16 |
| held-out loss | {figures["held_out_loss"]} nats per token, on {held_out} |
| training | {figures["steps"]:,} steps, {figures["tokens"]:,} tokens, {figures["minutes"]} minutes |
| machine | {figures["machine"]} |
| date | {figures["date"]} |
| command | `{figures["command"]}` |

{text}

To make the mistakes possible that real models allow, it has a BOS token that both the tokenizer and the chat template add,
and two end tokens (`<|end|>` after a text, `<|eot|>` after a turn).
"""


# What a card says about the model, about the text of its held-out loss, and about its training text.
POCKET_CARD = (
    """\
A small Llama model bundled with this repository, so that every test and example runs without a download. It knows only
what it was trained on: questions and answers about serving language models, short stories, small JSON records, a few words
in other scripts, and counting. Anything else it generates is noise. It is meant only for testing engines.""",
    "`corpus/heldout.jsonl`",
    """\
`shared/models/corpus.py` generates the text from the tables in `corpus/`. The held-out text comes from the same generator
with another seed. Most of its questions are in the training text, most of its stories and records are not, so the loss
measures how well the model has learned the form of the text, not how well it would do on other text.""",
)
TOOLS_CARD = (
    """\
A small Llama model bundled with this repository that thinks, answers and calls functions, in the form of Hermes and Qwen3.
It knows four functions: `add` and `multiply` (integers `a` and `b`), `weather` (a string `city`) and `time` (no parameters).
It calls one or two of them and tells what they returned. It does not always notice that the one it needs is missing from its
list of tools, and often misspells a city that is in no training text. It also repeats what follows "Say:", and knows a
little small talk. It copies numbers and names rather than knowing them: a wrong result is told as it came. Anything else it
generates is noise. It is meant only for testing engines.""",
    "held-out conversations, only the tokens that the model itself writes",
    """\
`shared/models/tools_corpus.py` generates the conversations. The held-out ones come from the same generator with another
seed, and half of their cities are in no training text; the other half are made up, like half of the training text's.

The lengths of the phases and the learning rate were changed while it was trained, and the training was resumed. The command
trains a model like this one, but not these weights.

An example, as the chat template renders it. After the first `<|assistant|>` and after the last one the model writes; with
`enable_thinking=False` the template adds an empty thought, and the model writes none.

    <|begin|><|system|>Tools:
    <tools>
    {"name": "add", "description": "Add two numbers.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}}
    </tools><|eot|><|user|>What is 17 plus 25?<|eot|><|assistant|><think>
    The user asks for a sum. I call add.
    </think>

    <tool_call>
    {"name": "add", "arguments": {"a": 17, "b": 25}}
    </tool_call><|eot|><|user|><tool_response>
    42
    </tool_response><|eot|><|assistant|><think>
    The tool says 42.
    </think>

    17 plus 25 is 42.<|eot|>""",
)


@torch.inference_mode()
def held_out_loss(model_dir: Path, name: str = "pocket") -> float:
    """The stored checkpoint's mean cross-entropy on the held-out text, in nats per token, computed in float32."""
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    total, count = 0.0, 0
    for text in texts(name).held_out():
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        logits = model(ids[:, :-1]).logits[0]
        targets = labels(name, tokenizer, ids)[0]
        total += F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum").item()
        count += (targets != IGNORE).sum().item()
    return total / count


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.models.train")
    parser.add_argument("--model", choices=SHAPES, default="pocket")
    parser.add_argument("--out", type=Path, help="directory to write (default: the committed one)")
    args = parser.parse_args(argv)
    train(args.model, args.out or HERE / args.model)
    return 0


if __name__ == "__main__":
    run(main)
