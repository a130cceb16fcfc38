"""Several drafters guess, and their guesses become one tree.

Nobody knows beforehand who guesses best: prompt lookup in a summary, token recycling in free text, something else a
paragraph later. So each is held against the text as it comes (a `Calibration` of its own, per request and per
confidence it stated), and what it says is believed as far as it came true.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from decoding import drafting
from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.engine.calibration import Calibration
from decoding.engine.width import LEAST_SURVIVAL, Width, pruned
from decoding.errors import InvalidRequest
from decoding.textform import is_count, split_outside

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.block import Commit
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence

_LEFT_OUT = -2  # no node of the tree


@dataclass(eq=False)
class Mixed(Drafter):
    """Equal guesses of several drafters are one node, whose chance is the best of theirs.

    Guesses count as not sampled, whoever made them, so that sampled answers are plain decoding's for their seed. A
    drafter that takes time is asked only as far as that pays, going by the measured cost of its steps.

    drafters: names joined by "+", with options if need be, or a list of names and `Drafter` objects.
    nodes: guesses per step and sequence, at most.
    """

    drafters: str | List[str | Drafter] = "suffix+token-recycling"
    nodes: int = 24

    name: ClassVar[str] = "mixed"
    summary: ClassVar[str] = "several drafters in one tree, each trusted as far as it came true; mixed(drafters=A+B)"

    _members: list[Drafter] = field(init=False, repr=False)
    _records: list[Calibration] = field(init=False, repr=False)
    _widths: dict[int, Width] = field(default_factory=dict, init=False, repr=False)  # of members that take time
    _read: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # tokens that the records have judged

    def __post_init__(self) -> None:
        listed = split_outside(self.drafters, "+") if isinstance(self.drafters, str) else self.drafters
        self._members = [drafting.find(one) if isinstance(one, str) else one for one in listed]
        if not self._members:
            raise InvalidRequest("mixed needs at least one drafter, as in mixed(drafters=prompt-lookup+suffix).")
        if not is_count(self.nodes):
            raise InvalidRequest(f"mixed needs nodes to be an integer of at least 1, not {self.nodes!r}.")
        self._records = [Calibration() for _ in self._members]

    def attach(self, backend: LocalBackend) -> None:
        for member in self._members:
            member.attach(backend)
        self._widths = {
            place: Width(backend.live, record)
            for place, (member, record) in enumerate(zip(self._members, self._records, strict=True))
            if type(member).cost is not Drafter.cost
        }
        for place in self._widths:
            self._members[place].cost(1, 1, 0.0)  # what has to be measured is measured now, while a slot is free

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        for sequence in sequences:
            self._judge(sequence)
        trees = [_Tree() for _ in sequences]
        # Those that take time come last: what the others hold already need not be guessed again.
        for place in sorted(range(len(self._members)), key=lambda place: place in self._widths):
            member, record, width, asked = self._members[place], self._records[place], self._widths.get(place), lengths
            if width is not None:
                limits = width.lengths(member, sequences, [tree.covered() for tree in trees])
                asked = [min(a, b) for a, b in zip(lengths, limits, strict=True)]
            with nullcontext() if width is None else width.drafting():
                drafts = member.propose(sequences, asked)
            for sequence, tree, draft in zip(sequences, trees, drafts, strict=True):
                if draft.block:
                    chances, _ = record.judge(sequence.id, draft, LEAST_SURVIVAL)
                    record.watch(sequence.id, draft, chances)
                    tree.graft(draft.block, chances, member.name)
        self.weighed = sum(width.drafted for width in self._widths.values())
        return [tree.best(self.nodes) for tree in trees]

    def observe(self, sequences: List[Sequence], output: Output, commits: List[Commit]) -> None:
        for member in self._members:
            member.observe(sequences, output, commits)

    def _judge(self, sequence: Sequence) -> None:
        """Hold the drafts against what the text has gained since, some of it maybe while nobody was asked."""
        tokens = sequence.tokens[self._read.get(sequence.id, len(sequence.tokens)) :]
        self._read[sequence.id] = len(sequence.tokens)
        if tokens:
            for record in self._records:
                record.learn(sequence.id, tokens)

    def forget(self, sequence: Sequence) -> None:
        self._judge(sequence)
        del self._read[sequence.id]
        for member, record in zip(self._members, self._records, strict=True):
            member.forget(sequence)
            record.forget(sequence.id)
        for width in self._widths.values():
            width.forget(sequence)

    def unlearn(self) -> None:
        for member, record in zip(self._members, self._records, strict=True):
            member.unlearn()
            record.unlearn()
        for width in self._widths.values():
            width.unlearn()


class _Tree:
    """The union of several drafts."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.chances: list[float] = []
        self.sources: list[list[str]] = []
        self._places: dict[tuple[int, int], int] = {}  # (parent, token) → node

    def graft(self, block: Block, chances: List[float], source: str) -> None:
        """Add a draft; [guesses] chances of each if its parent is right, 0 for those that are left out."""
        nodes: list[int] = []
        for i, (token, chance) in enumerate(zip(block.tokens, chances, strict=True)):
            if not chance:
                nodes.append(_LEFT_OUT)
                continue
            above = i - 1 if block.parents is None else block.parents[i]
            parent = nodes[above] if above >= 0 else -1
            node = self._places.setdefault((parent, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(parent)
                self.chances.append(chance)
                self.sources.append([source])
            else:
                self.chances[node] = max(self.chances[node], chance)
                if source not in self.sources[node]:
                    self.sources[node].append(source)
            nodes.append(node)

    def covered(self) -> list[float]:
        """The chances that the tree holds the text's next one, two, … tokens."""
        covered: list[float] = []
        survival: list[float] = []
        depth: list[int] = []
        for parent, chance in zip(self.parents, self.chances, strict=True):
            survival.append(chance if parent < 0 else chance * survival[parent])
            depth.append(0 if parent < 0 else depth[parent] + 1)
            covered += [0.0] * (depth[-1] + 1 - len(covered))
            covered[depth[-1]] += survival[-1]  # of siblings, one is right at most
        return [min(1.0, chance) for chance in covered]

    def best(self, count: int) -> Draft:
        """The `count` nodes whose branches are most likely."""
        if not self.tokens:
            return Draft()
        draft = Draft(
            Block(self.tokens, self.parents),
            confidence=self.chances,
            sources=["+".join(names) for names in self.sources],
        )
        if len(self.tokens) <= count:
            return draft
        survival: list[float] = []
        for parent, chance in zip(self.parents, self.chances, strict=True):
            survival.append(chance if parent < 0 else chance * survival[parent])
        likely = sorted(range(len(survival)), key=lambda node: (-survival[node], node))
        return pruned(draft, sorted(likely[:count]))
