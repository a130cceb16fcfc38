"""From token ids to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class TextStream:
    """Turns the tokens of one answer into text as they come, and finds stop strings.

    A piece is released once it is final: never half a character, and nothing that may be the beginning
    of a stop string. `text` is everything so far, cut before a stop string; released pieces joined are a
    prefix of it, and after `finish` all of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._prefix = 0  # tokens before this are no longer needed to decode what follows
        self._read = 0  # tokens before this are in `text`
        self._released = 0
        self.text = ""
        self.stopped = False

    def feed(self, tokens: Sequence[int]) -> int | None:
        """Add tokens. If a stop string appears, return how many of them were needed to complete it."""
        if not self._stop:
            self._tokens += tokens
            self._advance(final=False)
            return None
        for count, token in enumerate(tokens, start=1):
            self._tokens.append(token)
            searched = max(0, len(self.text) - max(map(len, self._stop)))
            self._advance(final=False)
            if self._cut(searched):
                return count
        return None

    def release(self) -> str:
        """The text that has become final since the last call."""
        end = len(self.text)
        if not self.stopped and self._stop:
            end -= max(
                (n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0
            )
        piece = self.text[self._released : end]
        self._released = max(self._released, end)
        return piece

    def finish(self) -> str:
        """No more tokens will come: the rest of the text."""
        if not self.stopped:
            searched = max(0, len(self.text) - max(map(len, self._stop), default=0))
            self._advance(final=True)
            self._cut(searched)
            self.stopped = True
        return self.release()

    def _cut(self, searched: int) -> bool:
        found = [at for stop in self._stop if (at := self.text.find(stop, searched)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
        return bool(found)

    def _advance(self, final: bool) -> None:
        known = self._decode(self._tokens[self._prefix : self._read])
        now = self._decode(self._tokens[self._prefix :])
        if not final and now.endswith("\N{REPLACEMENT CHARACTER}"):
            return  # the last token ends inside a character
        if len(now) > len(known):
            self.text += now[len(known) :]
            self._prefix, self._read = self._read, len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def token_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The text that each token of an answer adds; joined they are the answer. A character that is spread over
    several tokens belongs to the last of them."""
    stream, pieces, written = TextStream(tokenizer), [], 0
    for token in tokens:
        stream.feed([token])
        pieces.append(stream.text[written:])
        written = len(stream.text)
    stream.finish()
    if pieces:
        pieces[-1] += stream.text[written:]
    return pieces
