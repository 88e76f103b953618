"""Text to tokens, and tokens to text in whole characters."""
import codecs
import re
import sys
from functools import lru_cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .params import RequestError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
LOOK_BACK = 64  # a prompt's last tokens to decode before its completion; special ones among them are skipped
WINDOW = 8  # the last tokens of the text so far to decode before the next ones
LONGEST_RUN = 32  # byte tokens after which a run is cut where a character ends


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer; ValueError if it is missing or cannot be read."""
    if not any((model_dir / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{model_dir} has no tokenizer: it has none of {', '.join(TOKENIZER_FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    # The tokenizers library raises plain Exception for a file that it cannot parse.
    except Exception as error:
        raise ValueError(f"the tokenizer of {model_dir} cannot be read: {' '.join(str(error).split())}") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        hint = "; remove tekken.json, or uninstall mistral-common" if (model_dir / "tekken.json").is_file() else ""
        raise ValueError(f"the tokenizer of {model_dir} is a {type(tokenizer).__name__}, which is not supported{hint}")
    # transformers uses it only to warn about long prompts, which the engine itself rejects.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text as is, with the BOS that the tokenizer adds."""
    check_unicode(text)
    return tokenizer(text).input_ids


def check_unicode(text: str) -> None:
    """Raise RequestError for half a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"prompt must be valid Unicode: {error}", "prompt") from None


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """Messages (role, content) in the checkpoint's template, up to where the assistant's answer begins.

    Encode it with `add_special_tokens=False`, because the template contains its own BOS.
    """
    if not tokenizer.chat_template:
        raise RequestError("this checkpoint has no chat template; send the prompt as plain text", "messages")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A template is a program that may raise anything; many reject an order of roles that they do not know.
    except Exception as error:
        raise RequestError(f"the checkpoint's chat template rejects these messages: {error}", "messages") from error


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The token ids of a conversation, with the template's BOS."""
    text = chat_text(tokenizer, messages)
    check_unicode(text)
    return tokenizer(text, add_special_tokens=False).input_ids


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The names of all special tokens by id. They are not text, also if they have no role such as BOS or EOS."""
    return {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def byte_of(token: str) -> bytes:
    """The byte of a byte token, such as <0x0A> in a vocabulary with byte fallback; b"" for any other token."""
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(match[1]) if match else b""


class TextStream:
    """The text of a growing list of tokens, in pieces that never contain part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int] | None = None):
        self.tokenizer = tokenizer
        self.special_ids = special_tokens(tokenizer).keys()
        self.has_byte_tokens = "ByteFallback" in str(tokenizer.backend_tokenizer.decoder)
        self.text = ""
        # Some tokenizers drop the space before the first token that they decode. So each new token is decoded after
        # others whose text is already returned, of this text or of the prompt that it continues.
        self.window: list[int] = []
        self.run: list[int] = []  # tokens of one byte each, after the window
        self.run_bytes = b""
        self.num_out = 0  # how many of their characters are final
        self.extend(self.last_of(prompt_ids or [], LOOK_BACK))
        self.num_out = len(self.decode(self.window + self.run))

    def push(self, token_ids: list[int], last: bool) -> str:
        """Add tokens and return the text that became final; with last, all that remains."""
        cut = self.extend(token_ids)
        text, num_open = self.decode_end(last)
        end = max(len(text) - num_open, self.num_out)
        piece = cut + text[self.num_out : end]
        self.num_out = end if self.run else min(end, len(text))
        self.shorten_window()
        self.text += piece
        return piece

    def extend(self, token_ids: list[int]) -> str:
        """Append the tokens to decode: all except special ones and ids that the tokenizer lacks.

        Returns the text of long runs, which is final. Their tokens are dropped: decoded with a bad byte that comes later,
        they would be replaced too.
        """
        cut = ""
        for token_id in token_ids:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            if token is None or token_id in self.special_ids:
                continue
            byte = byte_of(token) if self.has_byte_tokens else b""
            # Cut a long run only where a character ends, and not before a space, which may be dropped where a text begins.
            is_whole = self.run_bytes.decode(errors="ignore").encode() == self.run_bytes
            is_long = len(self.run) >= LONGEST_RUN and is_whole and byte != b" "
            if not byte:
                self.window += self.run
            elif is_long:
                cut += self.decode(self.window + self.run)[self.num_out :]
                self.num_out = len(self.decode(self.window))
            if not byte or is_long:
                self.run, self.run_bytes = [], b""
            (self.run if byte else self.window).append(token_id)
            self.run_bytes += byte
        return cut

    def decode_end(self, last: bool) -> tuple[str, int]:
        """The text of window and run, and the number of characters at its end that the next token may change."""
        if last or not self.run:
            text = self.decode(self.window + self.run)
            # A character whose bytes are spread over tokens decodes to U+FFFD until its last byte arrives.
            return text, int(text.endswith("\ufffd") and not last)
        # A run is decoded as a whole: to characters or, if any byte is invalid, to one U+FFFD per byte.
        before = self.decode(self.window)
        try:
            _, size = codecs.utf_8_decode(self.run_bytes)
        except UnicodeDecodeError:
            return before + "\ufffd" * len(self.run), 0
        text = self.decode(self.window + self.run[:size])
        return text, len(text) - len(before)

    def shorten_window(self) -> None:
        """Drop tokens on which the text of the next one does not depend."""
        if len(self.window) > 2 * WINDOW:
            kept = self.last_of(self.window, WINDOW)
            self.num_out += len(self.decode(kept)) - len(self.decode(self.window))
            self.window = kept

    def last_of(self, token_ids: list[int], size: int) -> list[int]:
        """At most size of the last tokens, beginning where a character begins."""
        for start in range(max(len(token_ids) - size, 0), len(token_ids)):
            token = self.tokenizer.convert_ids_to_tokens(token_ids[start]) or ""
            if start == 0 or not b"\x80" <= byte_of(token) < b"\xc0":
                return token_ids[start:]
        return []

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
