"""EAGLE-3: a trained head drafts from the target's own hidden states, as a chain or as a tree.

Li et al. 2025, "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test". Trees
grow as in EAGLE-2 (Li et al. 2024): level by level, the guesses of highest cumulated probability are gone on from,
and the best of all are proposed.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from decoding.drafting import Draft, Drafter
from decoding.engine.block import Block
from decoding.engine.sampling import SamplingColumns, draw, probabilities, uniforms
from decoding.engine.width import MOST_LEVELS
from decoding.errors import InvalidRequest
from decoding.textform import is_count
from drafters.heads.checkpoint import read_head
from drafters.heads.fitting import Sizes, require_fit, shipped_head
from drafters.heads.session import Level, Session

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.sequence import Sequence

_STREAM = 2  # of random numbers; the verifier uses others


@dataclass(eq=False)
class Eagle3(Drafter):
    """head: the folder of a trained head, in the layout of SafeAILab or of the `speculators` library; None for the
    one that comes with the project for the model.

    nodes: guesses per step and sequence in a tree; 0 for a chain. top_k: guesses per level of a tree that are gone on
    from, and how many follow each. The depth of either is the strategy's draft length. A chain of a request with a
    temperature is sampled from the head's distribution, with the request's temperature and filters; a tree holds the
    most likely tokens. Both end where the head's logits are not finite.

    Hidden states are kept for every token of the target's cache, and so are there for reused prefixes too. Text that
    was read before the drafter was attached has none: it is not reused, and where a request was running already, the
    head sees zeros for it.
    """

    head: str | None = None
    nodes: int = 0
    top_k: int = 8

    name: ClassVar[str] = "eagle3"
    summary: ClassVar[str] = "a trained head on the target's hidden states; chains, or trees with eagle3(nodes=16)"

    _session: Session = field(init=False, repr=False)
    _timed: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not is_count(self.nodes, 0):
            raise InvalidRequest(f"eagle3 needs nodes to be an integer of at least 0, not {self.nodes!r}.")
        if not is_count(self.top_k):
            raise InvalidRequest(f"eagle3 needs top_k to be an integer of at least 1, not {self.top_k!r}.")

    def attach(self, backend: LocalBackend) -> None:
        """Load the head. Raises ModelError if there is none, it is damaged, or it is made for another model."""
        runner = backend.engine.runner
        folder = self.head or shipped_head(self.name, backend)
        head = read_head(folder, int(runner.config.num_hidden_layers))
        config = head.config
        require_fit(folder, Sizes(config.target_hidden, config.vocab, config.target_layers), backend)
        self.top_k = min(self.top_k, config.draft_vocab)
        self._session = Session(head, runner, scratch=MOST_LEVELS * (self.top_k if self.nodes else 1))
        self._timed = getattr(backend, "latency", None) is not None

    def propose(self, sequences: List[Sequence], lengths: List[int]) -> list[Draft]:
        drafts = [Draft() for _ in sequences]
        asked = [i for i, length in enumerate(lengths) if length > 0]
        if asked:
            members = [sequences[i] for i in asked]
            wanted = [min(lengths[i], MOST_LEVELS) for i in asked]
            first = self._session.read(members)
            made = self._trees(members, wanted, first) if self.nodes else self._chains(members, wanted, first)
            for i, draft in zip(asked, made, strict=True):
                drafts[i] = draft
        return drafts

    def _chains(self, sequences: List[Sequence], lengths: list[int], level: Level) -> list[Draft]:
        head, ids = self._session.head, self._session.tokens
        left = list(lengths)
        tokens: list[list[int]] = [[] for _ in sequences]
        confidence: list[list[float]] = [[] for _ in sequences]
        chances: list[list[torch.Tensor]] = [[] for _ in sequences]
        active = list(range(len(sequences)))
        for depth in range(max(lengths)):
            if depth:
                still = [k for k, i in enumerate(active) if left[i] > depth]
                if not still:
                    break
                hidden = level.hidden if len(still) == len(active) else level.hidden[still]
                active = [active[k] for k in still]
                last = np.array([[tokens[i][-1]] for i in active])
                ancestors = np.zeros((len(active), 1, depth - 1), dtype=np.int64)
                level = self._session.guess([sequences[i] for i in active], last, hidden, depth - 1, ancestors)
            logits = level.logits[:, 0]  # [active, draft vocab]
            best, choice = logits.max(-1)
            finite = best.isfinite().tolist()
            sampled = [k for k, i in enumerate(active) if finite[k] and sequences[i].params.temperature > 0]
            if sampled:
                members = [sequences[active[k]] for k in sampled]
                columns = SamplingColumns.of([s.params for s in members], logits.device)
                chance = probabilities(logits[sampled], columns)
                draws = torch.tensor([s.draws for s in members], device=logits.device)
                choice[sampled] = draw(chance, uniforms(columns.seed, draws, _STREAM, depth + 1)[:, depth])
                whole = chance.new_zeros(len(sampled), head.config.vocab)
                whole[:, ids] = chance
                for k, row in zip(sampled, whole, strict=True):
                    chances[active[k]].append(row)
            sure = logits.gather(1, choice[:, None])[:, 0].float() - logits.float().logsumexp(-1)
            host = torch.stack([ids[choice].double(), sure.exp().double()]).tolist()
            for i, sound, token, confident in zip(active, finite, *host, strict=True):
                if sound:
                    tokens[i].append(int(token))
                    confidence[i].append(confident)
                else:
                    left[i] = depth
        return [
            Draft(Block(guesses), torch.stack(chance) if chance else None, confident)
            for guesses, chance, confident in zip(tokens, chances, confidence, strict=True)
        ]

    def _trees(self, sequences: List[Sequence], lengths: list[int], level: Level) -> list[Draft]:
        width, count = self.top_k, len(sequences)
        row = np.arange(count)[:, None]
        pool = _Pool(count)
        frontier = pool.add(*self._best(level, width), np.full((count, 1), -1), np.zeros((count, 1)))
        ancestors = np.zeros((count, width, 0), dtype=np.int64)
        for depth in range(max(lengths) - 1):
            # The best of the last level are gone on from, unless all that comes of them must rank too low.
            order = np.argsort(-pool.score[:, frontier], axis=1, kind="stable")[:, :width]
            chosen = frontier.start + order  # [S, width]
            if not (pool.score[row, chosen[:, :1]] > pool.least(self.nodes)).any():
                break
            hidden = level.hidden
            if depth:
                place = order // width
                ancestors = np.concatenate([ancestors[row, place], place[:, :, None]], axis=2)
                hidden = hidden[torch.from_numpy(row), torch.from_numpy(place)]
            else:
                hidden = hidden.expand(-1, width, -1)
            level = self._session.guess(sequences, pool.tokens[row, chosen], hidden, depth, ancestors)
            frontier = pool.add(*self._best(level, width), chosen, pool.score[row, chosen])
        return [pool.draft(i, self.nodes, length) for i, length in enumerate(lengths)]

    def _best(self, level: Level, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The target's ids of the `width` likeliest tokens behind each position, and their log-probabilities, minus
        infinity where the logits are not finite: both [S, K, width]."""
        logits = level.logits.float()
        best = logits.topk(width, dim=-1)
        score = best.values - logits.logsumexp(-1, keepdim=True)
        score = score.where(best.values[..., :1].isfinite(), -torch.inf)
        host = torch.stack([self._session.tokens[best.indices].double(), score.double()]).cpu().numpy()
        return host[0].astype(np.int64), host[1]

    def cost(self, levels: int, sequences: int, context: float) -> float:
        if not self._timed:
            return 0.0
        first = self._session.seconds(sequences, 1)
        more = self._session.seconds(sequences, self.top_k if self.nodes else 1) if levels > 1 else 0.0
        return first + (levels - 1) * more

    def forget(self, sequence: Sequence) -> None:
        self._session.forget(sequence)

    def unlearn(self) -> None:
        self._session.unlearn()


class _Pool:
    """All guesses considered for each of S sequences, level by level, so that parents come before children.

    tokens, parents: [S, guesses], -1 for children of the root. score: [S, guesses] cumulated log-probability.
    """

    def __init__(self, count: int) -> None:
        self.tokens = np.zeros((count, 0), dtype=np.int64)
        self.parents = np.zeros((count, 0), dtype=np.int64)
        self.score = np.zeros((count, 0))
        self._own = np.zeros((count, 0))  # log-probability given the parent
        self._depth = np.zeros(0, dtype=np.int64)

    def add(self, tokens: np.ndarray, own: np.ndarray, parents: np.ndarray, score: np.ndarray) -> slice:
        """Children [S, K, width] of the guesses `parents` [S, K], whose scores are given. Where they stand."""
        count, _, width = tokens.shape
        before = self.tokens.shape[1]
        self.tokens = np.concatenate([self.tokens, tokens.reshape(count, -1)], axis=1)
        self._own = np.concatenate([self._own, own.reshape(count, -1)], axis=1)
        self.parents = np.concatenate([self.parents, np.repeat(parents, width, axis=1)], axis=1)
        self.score = np.concatenate([self.score, (own + score[:, :, None]).reshape(count, -1)], axis=1)
        level = 1 + (int(self._depth[-1]) if before else 0)
        self._depth = np.concatenate([self._depth, np.full(self.tokens.shape[1] - before, level)])
        return slice(before, self.tokens.shape[1])

    def least(self, nodes: int) -> np.ndarray:
        """[S, 1] the score that a guess must exceed to be among the best `nodes`."""
        if self.score.shape[1] < nodes:
            return np.full((len(self.score), 1), -np.inf)
        return -np.partition(-self.score, nodes - 1, axis=1)[:, nodes - 1 : nodes]

    def draft(self, i: int, nodes: int, length: int) -> Draft:
        """The best `nodes` guesses of sequence i that are possible at all, at most `length` levels deep."""
        inside = np.nonzero((self._depth <= length) & np.isfinite(self.score[i]))[0]
        kept = np.sort(inside[np.argsort(-self.score[i, inside], kind="stable")[:nodes]])
        index = {int(node): place for place, node in enumerate(kept)}
        parents = [index.get(int(parent), -1) for parent in self.parents[i, kept]]
        confidence = np.exp(np.minimum(self._own[i, kept], 0.0)).tolist()
        return Draft(Block(self.tokens[i, kept].tolist(), parents), None, confidence)
