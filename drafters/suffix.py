"""Suffix decoding: what most often followed the end of this text, in the text itself and in other answers.

Oliaro et al. 2024, "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications".

A suffix tree with counts answers one question: where did these tokens occur, and what came next? Here the same
counts are taken from the text itself: the occurrences of the last token are found in one vectorized scan, and
narrowed token by token. They are the leaves below a node of the tree, so nothing but the tokens is stored.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.errors import InvalidRequest, RecordError
from decoding.textform import is_count
from drafters.prompt_lookup import match_worth

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.sequence import Sequence

_BREAK = -1  # stands before, between and after texts; equals no token
_BREAKS = np.array([_BREAK], dtype=np.int32)
_SAMPLE = 256  # what comes next is counted over this many of the latest occurrences at most


@dataclass(eq=False)
class Suffix(Drafter):
    """For every length of match with the text's end, follows the most frequent next token; the guesses of the
    match that promises most are taken.

    Searches the prompt and answer, and the answers of other requests, ended or under way. So requests teach
    each other; what is guessed decides how soon an answer comes, not what it says.

    depth: longest match, in tokens. threshold: guesses go on while the estimated chance that all of them are
    right is at least this. factor: guesses per token of the match, at most. memory: tokens of ended answers
    that are kept, the oldest go first; 0 keeps none. path: a file (.npz, token ids) that the memory is read
    from, if it exists, when a backend is attached, and written to, with all answers since, when the drafter is let go
    or Python exits.
    """

    depth: int = 24
    threshold: float = 0.1
    factor: float = 1.0
    memory: int = 2**17
    path: str | None = None

    name: ClassVar[str] = "suffix"
    summary: ClassVar[str] = "what most often followed the text's end, in this text and in other answers"

    _texts: dict[int, _Text] = field(default_factory=dict, init=False, repr=False)
    _answers: _Answers = field(init=False, repr=False)  # that are searched
    _loaded: _Answers = field(init=False, repr=False)
    _ended: _Answers = field(init=False, repr=False)  # those that were loaded and all since, for the file
    _keeper: weakref.finalize[..., Suffix] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_count(self.depth):
            raise InvalidRequest(f"suffix needs depth to be an integer of at least 1, not {self.depth!r}.")
        if not is_count(self.memory, 0):
            raise InvalidRequest(f"suffix needs memory to be an integer of at least 0, not {self.memory!r}.")
        if not _is_number(self.threshold) or not 0 < self.threshold <= 1:
            raise InvalidRequest(f"suffix needs a threshold in (0, 1], not {self.threshold!r}.")
        if not _is_number(self.factor) or not 0 < self.factor < float("inf"):
            raise InvalidRequest(f"suffix needs factor to be a positive number, not {self.factor!r}.")
        if self.path is not None and not isinstance(self.path, str):
            raise InvalidRequest(f"suffix needs path to be the name of a file, not {self.path!r}.")
        self._answers, self._loaded, self._ended = (_Answers(self.memory) for _ in range(3))

    def attach(self, backend: LocalBackend) -> None:
        """Read the memory from `path`.

        Raises RecordError if the file is damaged, InvalidRequest if it holds ids that the model does not have.
        """
        if self.path is None or self._keeper is not None:
            return
        path = Path(self.path).expanduser()
        if path.exists():
            self.load(path)
        vocab = backend.engine.runner.vocab
        if self._answers.largest >= vocab:
            raise InvalidRequest(
                f"{path} holds token {self._answers.largest}, outside the model's vocabulary of {vocab}; "
                "give suffix another path for every tokenizer."
            )
        self._keeper = weakref.finalize(self, self._ended.save, path)

    def save(self, path: str | Path) -> None:
        """Write the memory. Raises RecordError if the file cannot be written."""
        self._answers.save(Path(path))

    def load(self, path: str | Path) -> None:
        """Add what `save` wrote to the memory. Raises RecordError if the file cannot be read."""
        for answer in _read(Path(path)):
            for memory in (self._answers, self._loaded, self._ended):
                memory.add(answer)

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        for sequence in sequences:
            self._texts.setdefault(sequence.id, _Text(len(sequence.prompt))).extend_to(sequence.tokens)
        others = np.concatenate([self._answers.tokens, *(text.answer() for text in self._texts.values()), _BREAKS])
        drafts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            text, guess = self._texts[sequence.id], _Guess()
            if length > 0:
                end = text.tokens[1 : 1 + text.size][-self.depth :][::-1]
                own = self._best(text.with_room(length), text.size, end, length, grows=True)
                shared = self._best(others, len(others) - 1, end, length, grows=False)
                guess = own if own.score >= shared.score else shared
            drafts.append(Draft(Block(guess.tokens), confidence=guess.confidence))
        return drafts

    def _best(self, text: np.ndarray, size: int, end: np.ndarray, length: int, *, grows: bool) -> _Guess:
        """The best guess over all lengths of match in text[:size] with the last tokens, `end` (last token first)."""
        after = np.flatnonzero(text[:size] == end[0]) + 1  # where occurrences continue
        if not grows:
            after = after[text[after] != _BREAK]  # they do not at the end of a text, such as this one's own
        matches: list[tuple[int, int, np.ndarray]] = []
        matched = 0
        while len(after):
            matched += 1
            if len(after) == 1:
                at = int(after[0])
                while matched < len(end) and text[at - matched - 1] == end[matched]:
                    matched += 1
                longer = after[:0]
            else:
                longer = after[text[after - matched - 1] == end[matched]] if matched < len(end) else after[:0]
            if len(longer) < len(after):  # else the longer match says the same with more confidence
                matches.append((matched, min(length, int(self.factor * matched)), after[-_SAMPLE:]))
            after = longer
        best = _Guess()
        for matched, limit, after in reversed(matches):
            if best.score >= limit:
                break  # no guess of a shorter match can promise more
            if len(after) == 1:
                guess = _copy(text, size, int(after[0]), limit, matched, grows)
            else:
                guess = self._follow(text, size, after, limit, matched, grows)
            best = guess if guess.score > best.score else best
        return best

    def _follow(self, text: np.ndarray, size: int, after: np.ndarray, limit: int, matched: int, grows: bool) -> _Guess:
        """The most frequent token, and on from where it stood, while the chance that all are right suffices.

        A text that `grows` is continued by its own guesses behind its last token, text[size], so that an
        occurrence close to the end, a repetition, goes on as well.
        """
        tokens: list[int] = []
        confidence: list[float] = []
        chance, score = 1.0, 0.0
        while len(tokens) < limit:
            following = text[after + len(tokens)]
            if not grows:
                lasting = following != _BREAK
                following, after = following[lasting], after[lasting]
                if not len(after):
                    break
            # Of equally frequent tokens the latest wins.
            ((token, count),) = Counter(following[::-1].tolist()).most_common(1)
            chance *= count / len(after)
            if chance < self.threshold:
                break
            if grows:
                text[size + 1 + len(tokens)] = token
            # The length of the match speaks for one occurrence; every further one has a vote of its own.
            confidence.append((count - 1 + 2 * match_worth(matched + len(tokens))) / (following.size + 1))
            tokens.append(token)
            after = after[following == token]
            score += chance
        return _Guess(tokens, confidence, score)

    def forget(self, sequence: Sequence) -> None:
        self._texts.pop(sequence.id, None)
        answer = np.array(sequence.new_tokens, dtype=np.int32)
        for memory in (self._answers, self._ended):
            memory.add(answer)

    def unlearn(self) -> None:
        """Search only the answers that were loaded. What is written to `path` still holds those since."""
        self._answers = self._loaded.copy()


def _copy(text: np.ndarray, size: int, at: int, limit: int, matched: int, grows: bool) -> _Guess:
    """What `Suffix._follow` says of a single occurrence, that goes on at text[at]: what stands there."""
    if grows:
        tokens = text[at : min(at + limit, size + 1)].tolist()
        period = len(tokens)
        tokens += [tokens[i % period] for i in range(period, limit)]  # behind the text's end it comes again
    else:
        tokens = text[at : at + limit].tolist()
        if _BREAK in tokens:
            tokens = tokens[: tokens.index(_BREAK)]
    return _Guess(tokens, [match_worth(matched + i) for i in range(len(tokens))], float(len(tokens)))


@dataclass(frozen=True)
class _Guess:
    """confidence: [tokens] the chance of each, given those before it. score: the expected number of right tokens, going
    by frequencies alone."""

    tokens: List[int] = ()
    confidence: List[float] = ()
    score: float = 0.0


class _Text:
    """A growing text. tokens: [≥ 1 + size] a break, then the text, then room. size: tokens in the text."""

    def __init__(self, prompt: int) -> None:
        self.tokens = np.full(64, _BREAK, dtype=np.int32)
        self.size = 0
        self._prompt = prompt

    def extend_to(self, text: List[int]) -> None:
        """Take over the tokens that are new in `text`."""
        room = self.with_room(len(text) - self.size)
        room[1 + self.size : 1 + len(text)] = text[self.size :]
        self.size = len(text)

    def with_room(self, count: int) -> np.ndarray:
        """`tokens`, with room for `count` more at least."""
        if 1 + self.size + count > len(self.tokens):
            more = np.full(self.size + count + 1, _BREAK, dtype=np.int32)
            self.tokens = np.concatenate([self.tokens, more])
        return self.tokens

    def answer(self) -> np.ndarray:
        """A break, and the text behind the prompt."""
        return np.concatenate([_BREAKS, self.tokens[1 + self._prompt : 1 + self.size]])


class _Answers:
    """Ended answers, the latest of them, up to `limit` tokens in all, breaks included."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: deque[np.ndarray] = deque()
        self._size = 0
        self._tokens: np.ndarray | None = None

    @property
    def tokens(self) -> np.ndarray:
        """[size] the answers, a break before each."""
        if self._tokens is None:
            self._tokens = np.concatenate([np.empty(0, dtype=np.int32), *self._kept])
        return self._tokens

    @property
    def largest(self) -> int:
        """The largest token id; -1 if there is none."""
        return int(self.tokens.max(initial=_BREAK))

    def copy(self) -> _Answers:
        """The same answers, to which others can be added."""
        other = _Answers(self._limit)
        other._kept, other._size = self._kept.copy(), self._size
        return other

    def add(self, answer: np.ndarray) -> None:
        """Remember an answer [tokens]; of one that is too long, its end."""
        if not len(answer) or self._limit < 2:
            return
        answer = np.concatenate([_BREAKS, answer[1 - self._limit :]])
        self._kept.append(answer)
        self._size += len(answer)
        while self._size > self._limit:
            self._size -= len(self._kept.popleft())
        self._tokens = None

    def save(self, path: Path) -> None:
        """Write to a file beside it first, so that a crash leaves the old one."""
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez_compressed(file, tokens=self.tokens)
            partial.replace(path)
        except OSError as error:
            raise RecordError(f"cannot write the answers of the suffix drafter to {path}: {error}.") from error


def _read(path: Path) -> List[np.ndarray]:
    """The answers that `_Answers.save` wrote."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            tokens = archive["tokens"]
        if tokens.ndim != 1 or tokens.dtype != np.int32 or tokens.min(initial=0) < _BREAK:
            raise ValueError("it does not hold token ids")
    except Exception as error:  # a damaged archive fails in ways of its own in every layer below
        raise RecordError(
            f"{path} is no file that the suffix drafter wrote, or is damaged ({error}); delete it or name another."
        ) from error
    return [answer[answer != _BREAK] for answer in np.split(tokens, np.flatnonzero(tokens == _BREAK))]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
