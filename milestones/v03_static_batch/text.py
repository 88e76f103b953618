"""Text to tokens, and tokens to text a whole character at a time."""
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .params import RequestError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer."""
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{model_dir} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is there")
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    # The tokenizers library raises plain Exception for a file that it cannot parse.
    except Exception as error:
        raise ValueError(f"the tokenizer of {model_dir} cannot be read: {' '.join(str(error).split())}") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text as it is, with the BOS that the tokenizer adds."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"prompt must be valid Unicode: {error}", "prompt") from None
    return tokenizer(text).input_ids


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The checkpoint's template around messages (role, content), up to where the assistant speaks.

    Encode it with `add_special_tokens=False`: the template brings its own BOS.
    """
    if not tokenizer.chat_template:
        raise RequestError("this checkpoint has no chat template; send the prompt as plain text", "messages")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A template is a program, its author's; many of them refuse an order of roles that they do not know.
    except Exception as error:
        raise RequestError(f"the checkpoint's chat template refuses these messages: {error}", "messages") from error


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation, with the BOS that the template has."""
    return tokenizer(chat_text(tokenizer, messages), add_special_tokens=False).input_ids


class TextStream:
    """The text of a growing list of tokens, in pieces that never hold a part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.token_ids = []
        self.text = ""
        # Tokens [start, end) are in text already. They are decoded again with each newcomer, because some
        # tokenizers drop the space before the first token; the window keeps the cost independent of the length.
        self.start = 0
        self.end = 0

    def push(self, token_ids: list[int], last: bool) -> str:
        """Add tokens; return the text that became certain: after the last of them, all of it."""
        self.token_ids += token_ids
        known = self.decode(self.token_ids[self.start : self.end])
        text = self.decode(self.token_ids[self.start :])
        # A character whose bytes are spread over tokens decodes to U+FFFD until its last byte is there.
        if text.endswith("\ufffd") and not last:
            return ""
        self.start, self.end = self.end, len(self.token_ids)
        self.text += text[len(known) :]
        return text[len(known) :]

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
