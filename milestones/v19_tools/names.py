"""How answers spell tokens and report their logprobs."""
import codecs


class TokenNames:
    """Spells tokens as bytes or text, and formats their logprobs."""

    def __init__(self, vocabulary: list[bytes], special_ids: set[int], drops_first_space: bool = False):
        self.vocabulary = vocabulary
        self.special_ids = special_ids  # these decode to no text
        self.drops_first_space = drops_first_space  # whether decoding drops a text's first space

    def bytes_of(self, token_id: int) -> bytes:
        """Return the token's bytes; none for an id that the model has but the tokenizer lacks."""
        return self.vocabulary[token_id] if token_id < len(self.vocabulary) else b""

    def text_of(self, token_id: int) -> str:
        """Return the token's text, or bytes:\\xe2, as in OpenAI's completions, if it is only part of a character."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, token_ids: list[int]) -> list[int]:
        """Return the character of their text at which each token begins; for part of a character, where that begins."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        offsets, num_characters = [], 0
        drops_space = self.drops_first_space
        for token_id in token_ids:
            raw = b"" if token_id in self.special_ids else self.bytes_of(token_id)
            decoded = raw.removeprefix(b" ") if drops_space else raw
            drops_space = drops_space and not raw
            # A token that continues a character begins where that does; one that interrupts it begins after its U+FFFD.
            num_characters += len(decoder.decode(decoded[:1]))
            ends_one = decoded and not decoder.getstate()[0]
            offsets.append(num_characters - 1 if ends_one else num_characters)
            num_characters += len(decoder.decode(decoded[1:]))
        return offsets

    def by_text(self, chosen: int, logprobs: dict[int, float]) -> dict[str, float]:
        """Return logprobs by token text. If tokens share one, the chosen token, or else the likeliest, gets it.

        The others are listed as token_id:122, as in vLLM.
        """
        named = {}
        for token_id in sorted(logprobs, key=lambda token_id: (token_id != chosen, -logprobs[token_id])):
            text = self.text_of(token_id)
            named[f"token_id:{token_id}" if text in named else text] = finite(logprobs[token_id])
        return named

    def of_chat(self, token: tuple, count: int) -> dict:
        """Return a token's logprobs in chat's format, with the `count` likeliest tokens at its position."""
        _, token_id, logprobs = token
        likeliest = sorted(logprobs.items(), key=lambda item: -item[1])[:count]
        return self.entry(token_id, logprobs[token_id]) | {"top_logprobs": [self.entry(*item) for item in likeliest]}

    def entry(self, token_id: int, logprob: float) -> dict:
        raw = self.bytes_of(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """Return logprob, but at least -9999: JSON has no infinity, and OpenAI reports -9999 for very unlikely tokens."""
    return max(logprob, -9999.0)
