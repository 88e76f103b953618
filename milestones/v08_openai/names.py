"""How tokens are written in answers."""
import codecs


class TokenNames:
    """The text and the bytes of each token."""

    def __init__(self, vocabulary: list[bytes], special_ids: set[int], drops_first_space: bool = False):
        self.vocabulary = vocabulary
        self.special_ids = special_ids  # not part of any text
        self.drops_first_space = drops_first_space  # so a text's first token is shorter there

    def bytes_of(self, token_id: int) -> bytes:
        """Nothing for a token that the model has but the tokenizer lacks."""
        return self.vocabulary[token_id] if token_id < len(self.vocabulary) else b""

    def text_of(self, token_id: int) -> str:
        """The token as text; as bytes:\\xe2, as OpenAI's completions have it, if it is a part of a character."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def offsets(self, token_ids: list[int]) -> list[int]:
        """At which character of their text each token begins; part of a character begins where the character does."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        offsets, num_characters = [], 0
        drops_space = self.drops_first_space
        for token_id in token_ids:
            raw = b"" if token_id in self.special_ids else self.bytes_of(token_id)
            said = raw.removeprefix(b" ") if drops_space else raw
            drops_space = drops_space and not raw
            # A first byte that goes on with a character begins where it does; one that breaks it off, behind the U+FFFD.
            num_characters += len(decoder.decode(said[:1]))
            ends_one = said and not decoder.getstate()[0]
            offsets.append(num_characters - 1 if ends_one else num_characters)
            num_characters += len(decoder.decode(said[1:]))
        return offsets

    def by_text(self, chosen: int, logprobs: dict[int, float]) -> dict[str, float]:
        """Logprobs by the texts of their tokens. Of tokens with one text, the chosen or else the likeliest has it.

        The others are called token_id:119, as vLLM has it.
        """
        named = {}
        for token_id in sorted(logprobs, key=lambda token_id: (token_id != chosen, -logprobs[token_id])):
            text = self.text_of(token_id)
            named[f"token_id:{token_id}" if text in named else text] = finite(logprobs[token_id])
        return named

    def of_chat(self, token: tuple, count: int) -> dict:
        """A token's logprobs as chat has them, with the count likeliest tokens of its place."""
        _, token_id, logprobs = token
        likeliest = sorted(logprobs.items(), key=lambda item: -item[1])[:count]
        return self.entry(token_id, logprobs[token_id]) | {"top_logprobs": [self.entry(*item) for item in likeliest]}

    def entry(self, token_id: int, logprob: float) -> dict:
        raw = self.bytes_of(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is next to impossible."""
    return max(logprob, -9999.0)
