"""How checkpoints write thoughts and calls, and how tools and calls come into a prompt.

No field of a config says it. But a chat template has to write the calls of earlier answers, and the model was trained to
continue in the same way. So the template is given a call, and what it writes is compared with the forms that are known here.
"""
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from uuid import uuid4

from jinja2 import Environment, TemplateError, meta, nodes
from transformers import PreTrainedTokenizerBase

from .params import RequestError
from .parts import Form, Parts
from .text import chat_text, encode_chat, special_tokens

NAME, ARGUMENTS = '{"name": "', '", "arguments": '
# The first form in which a template writes a call counts.
FORMS = {
    "hermes": Form("<tool_call>", ("\n",), NAME, ARGUMENTS, "}", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),  # and Qwen
    "mistral": Form("[TOOL_CALLS]", ("[", " ["), NAME, ARGUMENTS, "}", ", ", "]", id_size=9),
    "mistral-args": Form("[TOOL_CALLS]", ("",), "", "[ARGS]", "", "[TOOL_CALLS]", "", id_size=9),  # since November 2024
    "nemotron": Form("<TOOLCALL>", ("[",), NAME, ARGUMENTS, "}", ", ", "]</TOOLCALL>"),
    "apriel": Form("<tool_calls>", ("[",), NAME, ARGUMENTS, "}", ", ", "]</tool_calls>"),
    "minimax": Form("<tool_calls>", ("\n",), NAME, ARGUMENTS, "}", "\n", "\n</tool_calls>"),
    "llama3": Form("", ("",), NAME, '", "parameters": ', "}", "", "", is_single=True),
}
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A test.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}, "required": ["city"]},
    },
}
PROBE = [
    {"role": "user", "content": "Hello"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "probe", "arguments": {"city": "Oslo"}}}],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "probe", "content": "done"},
]
# For a template that does not know tools, which gets the first form: the text of a system message.
ABOUT = """You may call these functions:
<tools>
{tools}
</tools>
To call one, write its name and its arguments:
<tool_call>
{{"name": ..., "arguments": {{...}}}}
</tool_call>"""
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
# Names that every template knows, and that a request sets elsewhere.
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token"} | {
    "raise_exception", "strftime_now", "namespace", "continue_final_message",
}  # fmt: skip
TAIL = 64  # a prompt's last tokens, in which a thought may be opened


class Family(NamedTuple):
    """What a checkpoint's chat template shows."""

    form: Form | None  # None: calls are written in a way that is not known here
    has_tools: bool  # whether it writes tools into the prompt
    thought: tuple[str, str] | None  # the texts around a thought
    options: frozenset[str]  # the names of chat_template_kwargs
    special: tuple[str, ...]  # markers that are special tokens

    def parts(self, is_open: bool | None, **others) -> Parts:
        """The parts of an answer. is_open: whether the prompt ends within a thought; None: after one."""
        thought, form = None if is_open is None else self.thought, others.get("form")
        texts = [*(thought or ()), *(form.texts if form else ())]
        special = tuple(name for name in self.special if any(name in text for text in texts))
        return Parts(thought=thought, is_open=bool(is_open), special=special, **others)

    def new_call_id(self) -> str:
        """A random id, as long as the form wants it; else OpenAI's prefix and 24 digits."""
        size = self.form.id_size if self.form else 24
        return uuid4().hex[:size] if size < 24 else f"call_{uuid4().hex[:size]}"


def family_of(tokenizer: PreTrainedTokenizerBase) -> Family:
    """What the checkpoint's chat template shows."""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):
        template = template.get("tool_use") or template.get("default") or ""
    own = set()
    try:
        # The block {% generation %} is known only to transformers.
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
        names = meta.find_undeclared_variables(parsed)
        # What it sets itself is no option, unless it asks first whether it is there.
        tested = {test.node.name for test in parsed.find_all(nodes.Test) if test.name == "defined" and isinstance(test.node, nodes.Name)}
        own = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"} - tested
    except TemplateError:
        names = set(re.findall("[A-Za-z_]+", template))  # rendering it decides
    has_tools = "tools" in names
    form = find_form(tokenizer) if has_tools or "tool_calls" in template else FORMS["hermes"]
    # Tools are written for a template that does not do it, and that is in the form of Hermes.
    form = form if has_tools or form == FORMS["hermes"] else None
    thought = next((pair for pair in THOUGHTS if pair[1] in template), None)
    texts = [*(thought or ()), *(form.texts if form else ())]
    special = tuple(name for _, name in sorted(special_tokens(tokenizer).items()) if any(name in text for text in texts))
    return Family(form, has_tools, thought, frozenset(names - own - RESERVED), special)


def find_form(tokenizer: PreTrainedTokenizerBase) -> Form | None:
    """The form in which the chat template writes a call; None if it is not known here, or the template refuses calls."""
    try:
        text = chat_text(tokenizer, PROBE, tools=[PROBE_TOOL])
    except RequestError:
        return None
    # What comes after the arguments may have more: Mistral's templates write an id, which its models do not.
    for form in FORMS.values():
        if any(f'{form.marker}{before}{form.opening}probe{form.middle}{{"city": "Oslo"}}' in text for before in form.before):
            return form
    return None


def thought_state(family: Family, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> bool | None:
    """Whether a prompt ends within a thought; None if it ends after one, so that no other begins."""
    if family.thought is None:
        return None
    opening, closing = family.thought
    tail = tokenizer.decode(prompt_ids[-TAIL:], clean_up_tokenization_spaces=False).rstrip()
    if tail.endswith(opening):
        return True
    return None if tail.endswith(closing) else False


def check_options(family: Family, options: dict[str, Any]) -> None:
    """Raise RequestError for an option that the chat template does not have."""
    for name, value in options.items():
        # What has no effect anyway: a checkpoint that does not think is told not to.
        if name not in family.options and not (name == "enable_thinking" and value is False and family.thought is None):
            known = ", ".join(sorted(family.options)) or "none"
            raise RequestError(f"chat_template_kwargs: the chat template does not know {name[:200]!r}; it knows {known}", "chat_template_kwargs")


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    messages: list[dict],
    tools: list[dict],
    options: dict[str, Any],
    check_text: Callable[[str], None],
) -> tuple[list[int], bool | None]:
    """The token ids of a conversation, and what `thought_state` says of it. RequestError if the template refuses it, or it cannot fit."""
    check_options(family, options)
    if not family.has_tools:
        messages, tools = with_tools(messages, tools), []
    prompt_ids = encode_chat(tokenizer, messages, check_text, tools=tools or None, **options)
    return prompt_ids, thought_state(family, tokenizer, prompt_ids)


def without_thought(family: Family, options: dict[str, Any], effort: str | None, param: str) -> dict[str, Any]:
    """The options of the chat template for this reasoning effort, which may be "none". param: where the request has it."""
    if effort is None or family.thought is None:
        return options
    if "enable_thinking" in options:
        if options["enable_thinking"]:
            raise RequestError(f"{param} is {effort}, but enable_thinking in chat_template_kwargs is not false; send only one of them", param)
        return options
    if "enable_thinking" not in family.options:
        raise RequestError(f"{param} is none, but this checkpoint always thinks; leave it out", param)
    return options | {"enable_thinking": False}


def with_tools(messages: list[dict], tools: list[dict]) -> list[dict]:
    """A conversation for a template that knows no tools: calls and results become texts."""
    written: list[dict] = []
    for before, message in zip([None, *messages], messages):
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if before and before["role"] == "tool":
                written[-1]["content"] += f"\n{text}"
            else:
                written.append({"role": "user", "content": text})
        elif message.get("tool_calls"):
            calls = [f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in message["tool_calls"]]
            written.append({"role": "assistant", "content": "\n".join([*filter(None, [message["content"]]), *calls])})
        else:
            written.append(message)
    if tools:
        about = ABOUT.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
        if written and written[0]["role"] == "system":
            written[0] = written[0] | {"content": f"{written[0]['content']}\n\n{about}"}
        else:
            written.insert(0, {"role": "system", "content": about})
    return written
