"""Text to tokens, and tokens to text a whole character at a time."""
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .params import RequestError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
CHARACTER_BYTES = 4  # of UTF-8, at most
RUN_END = 3 * CHARACTER_BYTES  # tokens kept of each end of a run of broken bytes
LOOK_BACK = 64  # tokens of a prompt that are searched for its last character; special tokens may follow it


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


def num_broken(text: str) -> int:
    """The number of U+FFFD that a text ends with."""
    return len(text) - len(text.rstrip("\ufffd"))


class TextStream:
    """The text of a growing list of tokens, in pieces that never hold a part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int] | None = None):
        self.tokenizer = tokenizer
        self.text = ""
        # Some tokenizers drop the space before the first token that they decode. So each new token is decoded behind
        # tokens whose text is out already, of this text or of the prompt that it continues.
        self.window = self.end_of(prompt_ids or [])
        self.num_known = len(self.window)  # tokens of the window whose text is out
        self.num_chars = len(self.decode(self.window)) if self.window else 0  # characters of the window's text
        self.num_sent = self.num_chars  # of these, those that are out

    def push(self, token_ids: list[int], last: bool) -> str:
        """Add tokens; return the text that became certain: after the last of them, all of it."""
        self.window += [token_id for token_id in token_ids if self.has_text(token_id)]
        text = self.decode(self.window)
        end = len(text)
        # A character whose bytes are spread over tokens decodes to U+FFFD until its last byte is there. Where each byte
        # has one, a shorter text ends with a U+FFFD that is meant.
        is_broken = text.endswith("\ufffd") and len(text) >= self.num_chars and not last
        if is_broken:
            if len(self.window) - self.num_known < CHARACTER_BYTES:
                self.num_chars = len(text)
                return ""
            # So many tokens have the bytes of a whole character. These make none, except perhaps the last three.
            num_open = num_broken(self.decode(self.window[1 - CHARACTER_BYTES :]))
            end = max(end - min(num_open, num_broken(text)), self.num_sent)
        piece = text[self.num_sent : end]
        if is_broken:
            # The start of a run of broken bytes shows that it is broken; its end may still become a character.
            self.window = self.window[:RUN_END] + self.window[RUN_END:][-RUN_END:]
        elif len(self.window) > self.num_known:
            self.window = self.window[self.num_known :][-CHARACTER_BYTES:]
            self.num_known = len(self.window)
        self.num_chars = len(self.decode(self.window))
        self.num_sent = self.num_chars - (len(text) - end)
        self.text += piece
        return piece

    def has_text(self, token_id: int) -> bool:
        """Whether a token is decoded at all: special ones are not. Of two, a dropped space leaves one."""
        return self.decode([token_id, token_id]) != ""

    def end_of(self, prompt_ids: list[int]) -> list[int]:
        """The prompt's last character or more, in whole tokens; nothing if it ends within a character."""
        window = []
        for token_id in reversed(prompt_ids[-LOOK_BACK:]):
            if self.has_text(token_id) and len(window) < CHARACTER_BYTES:
                window.insert(0, token_id)
                if "\ufffd" not in self.decode(window):
                    return window
        return []

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
