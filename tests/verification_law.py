"""The exact law of a verifier, for small vocabularies: every draft, every cell of the uniforms' cube.

Verifiers are taken as they are, black boxes over tensors. Each uniform but the final draw's takes part in one
comparison with a threshold that depends on what came of the others. So a verifier is constant on boxes, and
the boxes are found by bisecting one uniform after the other; their sizes are probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from decoding.engine.verify import Verdict

ALMOST_ONE = 1 - 2.0**-53
PRECISION = 2.0**-38  # of thresholds; distances are compared with 1e-9

Verify = Callable[[Tensor, Tensor], Verdict]
"""Verdict on the drafts of the given rows `[R]`, which may repeat, with uniforms `[R, columns]`."""

Path = Callable[[Tensor, Tensor], Tensor]
Text = tuple[int, ...]


@dataclass(frozen=True)
class Language:
    """A distribution over the next token behind every short text: the target, or the drafter."""

    next: dict[Text, Tensor]
    vocab: int

    @classmethod
    def of(cls, vocab: int, length: int, choose: Callable[[Text], Tensor]) -> Language:
        """`choose` gives unnormalized weights `[vocab]` for texts shorter than `length`."""
        texts = [text for n in range(length) for text in product(range(vocab), repeat=n)]
        weights = {text: choose(text).double() for text in texts}
        return cls({text: w / w.sum() for text, w in weights.items()}, vocab)

    def joint(self, text: Text, length: int) -> Iterator[tuple[Text, float]]:
        """Every continuation of `text` to `length` tokens, with its probability."""
        for rest in product(range(self.vocab), repeat=length - len(text)):
            probability = 1.0
            for i in range(len(text), length):
                probability *= float(self.next[(text + rest)[:i]][(text + rest)[i]])
            yield text + rest, probability


def cells(verify: Verify, drafts: int, columns: int) -> Iterator[tuple[int, Text, int, float]]:
    """(draft row, path, bonus token, probability given the draft) of every box.

    `columns` is the number of uniforms; column 0 must be the final draw's.
    """
    rows = torch.arange(drafts)
    u = torch.full((drafts, columns), ALMOST_ONE, dtype=torch.double)
    u[:, 0] = 0.5
    weight = torch.ones(drafts, dtype=torch.double)

    for column in range(1, columns):

        def path(entry: Tensor, value: Tensor, rows: Tensor = rows, u: Tensor = u, column: int = column) -> Tensor:
            u = u[entry]
            u[:, column] = value
            return verify(rows[entry], u).path

        every = torch.arange(len(rows))
        low = path(every, torch.zeros(len(rows), dtype=torch.double))
        splits = (low != path(every, torch.full((len(rows),), ALMOST_ONE, dtype=torch.double))).any(1)
        split = splits.nonzero()[:, 0]

        def is_low(entry: Tensor, value: Tensor, path: Path = path, low: Tensor = low, at: Tensor = split) -> Tensor:
            return (path(at[entry], value) == low[at[entry]]).all(1)

        threshold = _turning_points(is_low, len(split))
        under, over, part = u[splits], u[splits], weight[splits]
        under[:, column], over[:, column] = threshold / 2, (1 + threshold) / 2
        rows = torch.cat([rows[~splits], rows[splits], rows[splits]])
        u = torch.cat([u[~splits], under, over])
        weight = torch.cat([weight[~splits], part * threshold, part * (1 - threshold)])

    kept = weight > 1e-15
    rows, u, weight = rows[kept], u[kept], weight[kept]
    verdict = verify(rows, u)
    for row, w, nodes, share in zip(
        rows.tolist(), weight.tolist(), verdict.path.tolist(), _bonus_law(verify, rows, u), strict=True
    ):
        for token, probability in share.items():
            yield row, tuple(n for n in nodes if n >= 0), token, w * probability


def _turning_points(is_low: Callable[[Tensor, Tensor], Tensor], count: int) -> Tensor:
    """Where `is_low(entry [K], u [K])` turns from true to false as u rises from 0 to 1, per entry: `[count]`.

    Bisection, with as many points at once as make a batch worth its overhead.
    """
    points = max(1, min(255, 512 // max(count, 1)))
    entry = torch.arange(count).repeat_interleave(points)
    step = torch.arange(1, points + 1, dtype=torch.double) / (points + 1)
    low, width = torch.zeros(count, dtype=torch.double), 1.0
    while width > PRECISION and count:
        grid = low[:, None] + width * step  # [count, points]
        width /= points + 1
        low = low + width * is_low(entry, grid.flatten()).view(count, points).sum(1, dtype=torch.double)
    return low + width


def _bonus_law(verify: Verify, rows: Tensor, u: Tensor) -> list[dict[int, float]]:
    """Per row, the probability of each final token: it never falls as its uniform rises."""

    def bonus(entry: Tensor, value: Tensor) -> Tensor:
        v = u[entry]
        v[:, 0] = value
        return verify(rows[entry], v).bonus

    laws: list[dict[int, float]] = [{} for _ in rows]
    left = torch.arange(len(rows))  # cells whose law is not complete
    done = torch.zeros(len(rows), dtype=torch.double)
    token, last = bonus(left, done), bonus(left, torch.full_like(done, ALMOST_ONE))
    while len(left):
        more = token < last

        def is_low(entry: Tensor, value: Tensor, cell: Tensor = left[more], token: Tensor = token[more]) -> Tensor:
            return bonus(cell[entry], value) <= token[entry]

        end = torch.ones_like(done)
        end[more] = _turning_points(is_low, int(more.sum()))
        for cell, drawn, share in zip(left.tolist(), token.tolist(), (end - done).tolist(), strict=True):
            laws[cell][drawn] = share
        left, last, done = left[more], last[more], end[more]
        token = bonus(left, (done + PRECISION).clamp(max=ALMOST_ONE))
    return laws


@dataclass(frozen=True)
class Drafted:
    """All drafts of one shape: per row its probability and the text of each node, the root's () first."""

    probability: list[float]
    texts: list[list[Text | None]]
    parents: Sequence[int]

    @property
    def tokens(self) -> Tensor:
        """`[rows, nodes]`, -1 where nothing was left to draw."""
        width = len(self.parents)
        ids = [[-1 if t is None else t[-1] for t in texts[1:]] for texts in self.texts]
        return torch.tensor(ids, dtype=torch.long).view(len(ids), width)

    def distributions(self, language: Language) -> Tensor:
        """`[rows, nodes + 1, vocab]`."""
        blank = torch.full((language.vocab,), 1 / language.vocab, dtype=torch.double)
        return torch.stack(
            [torch.stack([blank if t is None else language.next[t] for t in texts]) for texts in self.texts]
        )


def draw_drafts(drafter: Language, parents: Sequence[int], *, replacement: bool) -> Drafted:
    """Every outcome of drawing a tree's tokens from the drafter, siblings with or without replacement."""
    rows: list[tuple[float, list[Text | None]]] = [(1.0, [()])]
    for node, parent in enumerate(parents):
        grown: list[tuple[float, list[Text | None]]] = []
        for probability, texts in rows:
            above = texts[parent + 1]
            q = drafter.next[above].clone() if above is not None else torch.zeros(drafter.vocab)
            if not replacement:
                for elder in range(node):
                    text = texts[elder + 1]
                    if parents[elder] == parent and text is not None:
                        q[text[-1]] = 0
            if above is None or q.sum() == 0:
                grown.append((probability, [*texts, None]))
                continue
            q = q / q.sum()
            grown += [(probability * float(q[x]), [*texts, (*above, x)]) for x in range(len(q)) if q[x] > 0]
        rows = grown
    return Drafted([p for p, _ in rows], [t for _, t in rows], parents)


@dataclass(frozen=True)
class Outcome:
    """distance: total variation between what is generated and the target. accepted: expected draft tokens kept."""

    distance: float
    accepted: float


def outcome(verify: Verify, drafted: Drafted, target: Language, length: int) -> Outcome:
    """What comes out if a verified draft is continued to `length` tokens by the target itself."""
    emitted: dict[Text, float] = {}
    accepted = 0.0
    for row, path, bonus, weight in cells(verify, len(drafted.texts), len(drafted.parents) + 1):
        weight *= drafted.probability[row]
        text = drafted.texts[row][path[-1] + 1] if path else ()
        assert text is not None and len(text) == len(path), "a path must follow the tree from its root"
        emitted[(*text, bonus)] = emitted.get((*text, bonus), 0.0) + weight
        accepted += weight * len(path)
    law = dict.fromkeys(product(range(target.vocab), repeat=length), 0.0)
    for text, weight in emitted.items():
        for whole, probability in target.joint(text, length):
            law[whole] += weight * probability
    distance = sum(abs(law[whole] - probability) for whole, probability in target.joint((), length)) / 2
    return Outcome(distance, accepted)


def _weights(kind: str, vocab: int, generator: torch.Generator) -> Tensor:
    weights = torch.rand(vocab, generator=generator, dtype=torch.double) + 0.02
    if kind == "peaked":
        return weights**8
    if kind == "zeros":
        weights[int(torch.randint(vocab, (1,), generator=generator))] = 0
    elif kind == "one-hot":
        token = int(torch.randint(vocab, (1,), generator=generator))
        weights = torch.nn.functional.one_hot(torch.tensor(token), vocab).double()
    elif kind == "low half":
        weights[vocab // 2 :] = 0
    elif kind == "high half":
        weights[: vocab // 2] = 0
    return weights


_KINDS = {
    "random": ("random", "random"),
    "peaked": ("peaked", "peaked"),
    "zeros": ("zeros", "zeros"),
    "disjoint": ("low half", "high half"),
    "one-hot target": ("one-hot", "random"),
    "one-hot drafter": ("random", "one-hot"),
    "one-hot both": ("one-hot", "one-hot"),
}
LANGUAGES = [*_KINDS, "equal", "nearly equal"]


def languages(name: str, vocab: int, length: int) -> tuple[Language, Language]:
    """A target and a drafter for texts of up to `length` tokens, one of `LANGUAGES`."""
    generator = torch.Generator().manual_seed(len(name) + vocab)
    if name in _KINDS:
        kind, other = _KINDS[name]
        target = Language.of(vocab, length, lambda _: _weights(kind, vocab, generator))
        return target, Language.of(vocab, length, lambda _: _weights(other, vocab, generator))
    target = Language.of(vocab, length, lambda _: _weights("random", vocab, generator))
    if name == "equal":
        return target, target
    noise = {text: 1 + 1e-6 * torch.rand(vocab, generator=generator, dtype=torch.double) for text in target.next}
    return target, Language.of(vocab, length, lambda text: target.next[text] * noise[text])
