"""How tokens are written in answers."""
import codecs

from .protocol import CompletionLogprobs, TokenLogprob, TopLogprob


class TokenNames:
    """The text and the bytes of each token."""

    def __init__(self, vocabulary: list[bytes], special_ids: set[int]):
        self.vocabulary = vocabulary
        self.special_ids = special_ids  # not part of any text

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
        decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        offsets, num_characters = [], 0
        for token_id in token_ids:
            offsets.append(num_characters)
            raw = b"" if token_id in self.special_ids else self.bytes_of(token_id)
            num_characters += len(decoder.decode(raw))
        return offsets

    def of_completion(self, tokens: list) -> CompletionLogprobs:
        """Logprobs as completions have them; of each token its offset in the text, its id, and logprobs or None."""
        said = CompletionLogprobs()
        for offset, token_id, logprobs in tokens:
            said.tokens.append(self.text_of(token_id))
            said.token_logprobs.append(None if logprobs is None else finite(logprobs[token_id]))
            top = None if logprobs is None else {self.text_of(each): finite(value) for each, value in logprobs.items()}
            said.top_logprobs.append(top)
            said.text_offset.append(offset)
        return said

    def of_chat(self, tokens: list, count: int) -> list[TokenLogprob]:
        """Logprobs as chat has them, with the count likeliest tokens of each place."""
        return [
            TokenLogprob(
                **self.entry(token_id, logprobs[token_id]),
                top_logprobs=[
                    TopLogprob(**self.entry(each, logprob))
                    for each, logprob in sorted(logprobs.items(), key=lambda item: -item[1])[:count]
                ],
            )
            for _, token_id, logprobs in tokens
        ]

    def entry(self, token_id: int, logprob: float) -> dict:
        raw = self.bytes_of(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is next to impossible."""
    return max(logprob, -9999.0)
