"""Checkpoints whose chat templates write thoughts and calls as each family does, and engines that say what a test wants."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from shared.checkpoints import checkpoint

# ---- chat templates of our own, each in a family's manner

HEAD = "{{ bos_token }}{% if tools %}<|system|>{% for tool in tools %}{{ tool.function | tojson }}\n{% endfor %}{% endif %}"
THOUGHT = "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
HERMES_CALLS = (
    "{% for call in message.tool_calls %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>\n{% endfor %}'
)
HERMES_TURN = (
    "{% if message.role == 'tool' %}<|user|><tool_response>\n{{ message.content }}\n</tool_response>"
    "{% else %}<|{{ message.role }}|>{{ THOUGHT }}{{ message.content }}" + HERMES_CALLS + "{% endif %}<|end|>"
)


def each_turn(turn: str) -> str:
    return HEAD + "{% for message in messages %}" + turn + "{% endfor %}"


HERMES = each_turn(HERMES_TURN.replace("{{ THOUGHT }}", "")) + "<|assistant|>"
THINKS = each_turn(HERMES_TURN.replace("{{ THOUGHT }}", THOUGHT)) + "<|assistant|>"
QWEN3 = THINKS + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
R1 = THINKS + "{{ '<think>\\n' }}"
CODER = HERMES.replace('{"name": "{{ call.function.name }}"', "<function={{ call.function.name }}>")
LLAMA32 = (
    each_turn(
        "<|{{ message.role }}|>{% if message.tool_calls %}"
        '{"name": "{{ message.tool_calls[0].function.name }}", "parameters": {{ message.tool_calls[0].function.arguments | tojson }}}'
        "{% else %}{{ message.content }}{% endif %}<|end|>"
    )
    + "<|assistant|>"
)
LLAMA31 = LLAMA32.replace("{% if message.tool_calls %}", "{% if builtin_tools %}<|python_tag|>{% elif message.tool_calls %}")
CHECK_ID = "{% if call.id is not defined or call.id | length != 9 %}{{ raise_exception('an id has 9 characters') }}{% endif %}"
MISTRAL_TURN = (
    "{% if message.tool_calls %}CALLS{% elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.name }}: {{ message.content }}"
    "{% elif message.role == 'user' %}[INST]{{ message.content }}[/INST]{% else %}{{ message.content }}{% endif %}"
)
MISTRAL = each_turn(
    MISTRAL_TURN.replace(
        "CALLS",
        "{{ message.content }}{% for call in message.tool_calls %}" + CHECK_ID + "[TOOL_CALLS]{{ call.function.name }}[ARGS]"
        "{{ call.function.arguments | tojson }}{% endfor %}",
    )
)
MISTRAL_OLD = each_turn(
    MISTRAL_TURN.replace(
        "CALLS",
        "[TOOL_CALLS] [{% for call in message.tool_calls %}" + CHECK_ID + '{"name": "{{ call.function.name }}", "arguments": '
        "{{ call.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]",
    )
)
NEMOTRON = HERMES.replace("<tool_call>\n", "{% if loop.first %}<TOOLCALL>[{% endif %}").replace(
    "\n</tool_call>\n", "{% if loop.last %}]</TOOLCALL>{% else %}, {% endif %}"
)
APRIEL = NEMOTRON.replace("TOOLCALL", "tool_calls")
MINIMAX = HERMES.replace("<tool_call>\n", "{% if loop.first %}<tool_calls>\n{% endif %}").replace(
    "</tool_call>\n", "{% if loop.last %}</tool_calls>{% endif %}"
)
MAGISTRAL = MISTRAL.replace("{{ message.content }}[/INST]", "Think in [THINK] and [/THINK]. {{ message.content }}[/INST]")
NO_TOOLS = "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}<|assistant|>"


class Kind(NamedTuple):
    """A checkpoint's template, and the tokens that it adds to its base's vocabulary."""

    template: str
    plain: tuple[str, ...] = ()  # that are part of the text
    special: tuple[str, ...] = ()
    base: str = "llama-two-layers"


MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
KINDS = {
    "hermes": Kind(HERMES, plain=MARKS),
    "qwen3": Kind(QWEN3, plain=MARKS),
    "r1": Kind(R1, plain=MARKS),
    "coder": Kind(CODER, plain=MARKS),
    "llama31": Kind(LLAMA31, special=("<|python_tag|>",)),
    "llama32": Kind(LLAMA32),
    "mistral": Kind(MISTRAL, special=("[TOOL_CALLS]", "[ARGS]")),
    "mistral old": Kind(MISTRAL_OLD, special=("[TOOL_CALLS]",), base="mistral-two-layers"),
    "magistral": Kind(MAGISTRAL, special=("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")),
    "nemotron": Kind(NEMOTRON),
    "apriel": Kind(APRIEL),
    "minimax": Kind(MINIMAX),
    "no tools": Kind(NO_TOOLS),
    "all special": Kind(THINKS, special=MARKS),
    "spelled": Kind(QWEN3),  # the markers are no tokens, but spelled by others
}


def tools_tokenizer(name: str):
    """The tokenizer of one of KINDS."""
    from transformers import AddedToken, AutoTokenizer

    kind = KINDS[name]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(kind.base))
    for tokens, special in ((kind.plain, False), (kind.special, True)):
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens], special_tokens=special)
    tokenizer.chat_template = kind.template
    return tokenizer


def tools_checkpoint(name: str, path: Path) -> Path:
    """Write a random checkpoint of two layers with the tokenizer of one of KINDS to path."""
    shutil.copytree(checkpoint(KINDS[name].base), path, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    config = json.loads((path / "config.json").read_text())
    # The prompts spell tools in short tokens.
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    tools_tokenizer(name).save_pretrained(path)
    return path


# ---- engines that say what a test wants


class Script:
    """Raises the logits of the tokens of a text, one after another, and then that of the end token. Grammars may still forbid them."""

    end_id = 1

    def __init__(self, engine):
        self.engine = engine
        self.token_ids: list[int] = []
        self.draws: list = []
        self.choose_tokens, self.compute_logits = engine.choose_tokens, engine.model.compute_logits
        engine.choose_tokens, engine.model.compute_logits = self.choose, self.raise_logits

    def say(self, text: str, in_pieces: bool = False) -> list[int]:
        """Let all requests from now on say this; in_pieces: in the shortest tokens. Returns the tokens, without the end token."""
        tokenizer = self.engine.tokenizer
        self.token_ids = tokenizer(text, add_special_tokens=False).input_ids
        if in_pieces:
            self.token_ids = [token_id for each in text for token_id in tokenizer(each, add_special_tokens=False).input_ids]
        # A text's first space, which decoding drops again, is no token that a grammar allows.
        if self.token_ids and tokenizer.convert_ids_to_tokens(self.token_ids[0]) == "▁":
            del self.token_ids[0]
        return self.token_ids

    def choose(self, hidden, draws):
        self.draws = draws
        return self.choose_tokens(hidden, draws)

    def raise_logits(self, hidden):
        logits = self.compute_logits(hidden)
        for row, (seq, position) in enumerate(self.draws):
            place = position - seq.num_prompt
            if place >= 0:
                logits[row, self.token_ids[place] if place < len(self.token_ids) else self.end_id] += 1000
        return logits


@contextmanager
def compiled_here(module):
    """Compile grammars in this process, which takes a tenth of the time of a process of their own."""
    grammars = module("grammars")
    with patch.object(grammars, "compile_apart", module("compiler").compile_here), patch.object(grammars, "try_library"):
        yield


# ---- streams


def message_of(events: list[dict]) -> dict:
    """The message, finish reason and usage that a stream's events add up to, as OpenAI's clients add them."""
    message, finish_reason, usage = {}, None, None
    for event in events:
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            finish_reason = choice["finish_reason"] or finish_reason
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    for piece in value:
                        add_call(message.setdefault("tool_calls", []), piece)
                elif name == "role" or value is None:
                    message.setdefault(name, value)
                else:
                    message[name] = (message.get(name) or "") + value
    return {"message": message, "finish_reason": finish_reason, "usage": usage}


def add_call(calls: list[dict], piece: dict) -> None:
    """Add a piece of a call; only its first has an id, a type and a name, and none is empty without being the first."""
    if piece["index"] == len(calls):
        assert piece["id"] and piece["type"] == "function" and piece["function"]["name"], piece
        calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
        return
    assert piece["index"] == len(calls) - 1 and set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"}, piece
    assert piece["function"]["arguments"], piece
    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
