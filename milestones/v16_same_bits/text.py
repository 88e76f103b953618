"""Text to tokens, and tokens to text in whole characters."""
import codecs
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .params import RequestError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
LOOK_BACK = 64  # a prompt's last tokens to decode before its completion; special ones among them are skipped
WINDOW = 8  # the last tokens of the text so far to decode before the next ones
LONGEST_RUN = 32  # byte tokens after which a run is cut where a character ends


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer; ValueError if it is missing or cannot be read."""
    # This imports PyTorch, which the server process does without.
    from transformers import AutoTokenizer

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


def vocabulary_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes that each token adds to the text before it; for a special token, those of its name.

    A token may be part of a character, which decodes to U+FFFD.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    # A byte-level vocabulary writes each byte as one printable character. A token with other characters is plain text.
    of_character = {}
    if "ByteLevel" in str(decoder):
        of_character = {character: byte for byte, character in bytes_to_unicode().items()}
    spelled = []
    # There may be gaps in the ids.
    num_ids = max(tokenizer.get_vocab().values()) + 1
    for token in tokenizer.convert_ids_to_tokens(range(num_ids)):
        if token is None:
            text = ""
        else:
            text = f" {token}" if decoder is None else decoder.decode(["a", token])[1:]
        if "\ufffd" not in text:
            spelled.append(text.encode())
        elif of_character.keys() >= set(token):
            spelled.append(bytes(of_character[character] for character in token))
        elif byte_of(token):
            spelled.append(byte_of(token))
        else:
            spelled.append(text.encode())
    return spelled


def token_starts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The character at which each token of a text begins; part of a character begins where the character does."""
    starts, reached = [], 0
    for start, end in tokenizer(text, return_offsets_mapping=True).offset_mapping:
        # An added token, such as BOS, is not in the text, and some tokenizers leave out the space before a word.
        starts.append(reached if start == end else min(start, reached))
        reached = max(reached, end)
    return starts


def drops_first_space(tokenizer: PreTrainedTokenizerBase, vocabulary: list[bytes]) -> bool:
    """Whether decoding drops the space that begins a text's first token, as Llama 2's tokenizer does."""
    words = [token_id for token_id, raw in enumerate(vocabulary) if raw.startswith(b" ")]
    return bool(words) and not tokenizer.decode(words[0]).startswith(" ")


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


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], check_text: Callable[[str], None] = lambda _text: None
) -> list[int]:
    """The token ids of a conversation, with the template's BOS. check_text may raise to reject the text."""
    text = chat_text(tokenizer, messages)
    check_unicode(text)
    check_text(text)
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
    """The text of a growing list of tokens, in pieces that never contain part of a character or of a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int] | None = None, stop: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.special_ids = special_tokens(tokenizer).keys()
        self.has_byte_tokens = "ByteFallback" in str(tokenizer.backend_tokenizer.decoder)
        self.text = ""
        self.held = ""  # decoded text that may be the beginning of a stop string
        self.stopped_by = None  # the stop string that was found
        # A special token is never part of the text, so a stop string that names one is matched by id.
        self.stop_ids = {token_id for token_id, name in special_tokens(tokenizer).items() if name in stop}
        self.offset = 0  # the number of characters before the last token's, including those held back
        # Some tokenizers drop the space before the first token that they decode. So each new token is decoded after
        # others whose text is already returned, of this text or of the prompt that it continues.
        self.window: list[int] = []
        self.run: list[int] = []  # tokens of one byte each, after the window
        self.run_bytes = b""
        self.num_out = 0  # how many of their characters are final
        self.extend(self.last_of(prompt_ids or [], LOOK_BACK))
        self.num_out = len(self.decode(self.window + self.run))
        self.num_whole = 0  # how many complete characters follow that are not final yet

    def push(self, token_ids: list[int], last: bool) -> str:
        """Add tokens and return the text that became final; with last, all that remains."""
        cut = self.extend(token_ids)
        begin = self.num_out if cut else self.num_out + self.num_whole
        text, num_open = self.decode_end(last)
        # If an earlier character was left incomplete, the token's text begins after its U+FFFD.
        while text[begin : begin + 1] == "\ufffd" and len(text) > begin + 1:
            begin += 1
        self.offset = len(self.text) + len(self.held + cut) + begin - self.num_out
        end = max(len(text) - num_open, self.num_out)
        # Half a character is not text yet.
        next_text = text[end:] if self.run else ""
        piece, self.held = self.split(self.held + cut + text[self.num_out : end], next_text, last)
        self.num_out = end if self.run else min(end, len(text))
        self.num_whole = max(len(text) - self.num_out, 0) if self.run else 0
        self.shorten_window()
        self.text += piece
        return piece

    def split(self, text: str, next_text: str, last: bool) -> tuple[str, str]:
        """Split text into what may be sent and what must wait; once a stop string is found, nothing waits.

        With the stop string END, "a friEN" becomes "a fri" and "EN". A stop string is found in next_text too, although
        that is not final: it becomes final when the text ends here.
        """
        if not self.stop:
            return text, ""
        both = text + next_text
        matches = [(both.index(stop), stop) for stop in self.stop if stop in both]
        if matches:
            end, self.stopped_by = min(matches)
            return both[:end], ""
        if last:
            return text, ""
        longest = max(map(len, self.stop), default=1)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop):
                return text[:-size], text[-size:]
        return text, ""

    def extend(self, token_ids: list[int]) -> str:
        """Append the tokens to decode: all except special ones and ids that the tokenizer lacks.

        Returns the text of long runs, which is final. Their tokens are dropped: decoded with a bad byte that comes later,
        they would be replaced too.
        """
        cut = ""
        for token_id in token_ids:
            token = self.tokenizer.backend_tokenizer.id_to_token(token_id)
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
        return self.tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=True)
