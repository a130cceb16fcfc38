"""Consistency training: trajectories packed into one sequence, and the loss that makes iterates jump to their end.

Kou et al. 2024, "CLLMs" (global consistency loss beside the autoregressive one); many iterates of one answer are
packed behind it with an attention mask of their own, as in Jacobi forcing (Hu et al. 2025). Pure functions of tensors.

An iterate, from its first wrong guess on, is a branch of the answer: its tokens stand at the answer's positions, and
see the answer before the branch, and the branch up to themselves. Behind each of them the model shall say what it
says at the same place of the answer itself. Before the first wrong guess it does so anyway.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from decoding.errors import ModelError


@dataclass(frozen=True)
class Branch:
    """What an iterate held from its first wrong guess on. start: the index of that place in the trajectory's tokens."""

    start: int
    guesses: List[int]


@dataclass(frozen=True)
class Trajectory:
    """One answer and the iterates that led to it. tokens: prompt and answer; prompt: tokens of the prompt."""

    tokens: List[int]
    prompt: int
    branches: List[Branch]


@dataclass(frozen=True)
class Packed:
    """B trajectories, padded to T tokens.

    tokens, positions: [B, T]. mask: [B, 1, T, T] who sees whom. rows: [N, 2] (trajectory, place) from which the
    answers' tokens, targets [N], are predicted. students, teachers: [M, 2] places of guesses, and of the answer's
    token at the same position.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    targets: Tensor
    students: Tensor
    teachers: Tensor

    def to(self, device: torch.device) -> Packed:
        """A copy on another device."""
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Losses:
    """total: what is minimised. answer: cross entropy of the answers' tokens, consistency: of the iterates against the
    answers' distributions; nats per token. jumps: how often a guess is followed by the answer's own choice."""

    total: Tensor
    answer: float
    consistency: float
    jumps: float


def choose(trajectory: Trajectory, guesses: int, random: Random, depth: int = 0) -> Trajectory:
    """The trajectory with a random choice of its branches, of about so many guesses in all. depth: guesses that are
    kept of each branch (0: all)."""
    order = [Branch(b.start, b.guesses[: depth or None]) for b in trajectory.branches]
    random.shuffle(order)
    chosen: list[Branch] = []
    for branch in order:
        if sum(len(b.guesses) for b in chosen) >= guesses:
            break
        chosen.append(branch)
    return Trajectory(trajectory.tokens, trajectory.prompt, chosen)


def pack(trajectories: List[Trajectory]) -> Packed:
    """Put every trajectory's branches behind its answer."""
    width = max(len(t.tokens) + sum(len(b.guesses) for b in t.branches) for t in trajectories)
    tokens = torch.zeros(len(trajectories), width, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(trajectories), 1, 1)  # padding sees itself: no empty softmax
    rows: list[tuple[int, int]] = []
    targets: list[int] = []
    students: list[tuple[int, int]] = []
    teachers: list[tuple[int, int]] = []
    for i, trajectory in enumerate(trajectories):
        text = torch.tensor(trajectory.tokens)
        n = len(text)
        tokens[i, :n], positions[i, :n] = text, torch.arange(n)
        mask[i, :n, :n] = torch.ones(n, n, dtype=torch.bool).tril()
        rows += [(i, place) for place in range(trajectory.prompt - 1, n - 1)]
        targets += trajectory.tokens[trajectory.prompt :]
        at = n
        for branch in trajectory.branches:
            end = at + len(branch.guesses)
            tokens[i, at:end] = torch.tensor(branch.guesses)
            positions[i, at:end] = branch.start + torch.arange(end - at)
            mask[i, at:end, : branch.start] = True
            mask[i, at:end, at:end] = torch.ones(end - at, end - at, dtype=torch.bool).tril()
            inside = range(min(end - at, n - 1 - branch.start))  # behind the answer's end there is nothing to learn
            students += [(i, at + place) for place in inside]
            teachers += [(i, branch.start + place) for place in inside]
            at = end
    return Packed(
        tokens,
        positions,
        mask[:, None],
        torch.tensor(rows).view(-1, 2),
        torch.tensor(targets),
        torch.tensor(students).view(-1, 2),
        torch.tensor(teachers).view(-1, 2),
    )


class ConsistencyLoss(nn.Module):
    """The model with its loss, as one module for distributed training.

    answer_weight: of the autoregressive loss against the consistency loss (10 in the paper).
    """

    def __init__(self, model: PreTrainedModel, answer_weight: float = 10.0) -> None:
        super().__init__()
        kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
        if "sliding_attention" in kinds:
            raise ModelError(
                f"this {model.config.model_type} model has layers with a sliding window, which packed iterates do not "
                "respect; train a model with full attention."
            )
        self.model = model
        self.answer_weight = answer_weight

    def forward(self, packed: Packed) -> Losses:
        hidden = self._hidden(packed)
        head = self.model.get_output_embeddings()
        assert head is not None
        answer_logits = head(hidden[packed.rows[:, 0], packed.rows[:, 1]]).float()
        answer = F.cross_entropy(answer_logits, packed.targets)
        if not len(packed.students):
            return Losses(self.answer_weight * answer, answer.item(), 0.0, 1.0)
        logits = head(hidden[packed.students[:, 0], packed.students[:, 1]]).float()
        # Every teacher is a row from which an answer's token is predicted, so its logits are there already.
        teacher = answer_logits.detach()[_index(packed.rows, packed.teachers, packed.tokens.shape[1])]
        consistency = F.cross_entropy(logits, teacher.softmax(-1))
        jumps = (logits.argmax(-1) == teacher.argmax(-1)).float().mean()
        total = self.answer_weight * answer + consistency
        return Losses(total, answer.item(), consistency.item(), jumps.item())

    def _hidden(self, packed: Packed) -> Tensor:
        """[B, T, hidden]"""
        dtype = self.model.dtype
        bias = torch.zeros(packed.mask.shape, dtype=dtype, device=packed.mask.device)
        bias.masked_fill_(~packed.mask, torch.finfo(dtype).min)
        out: Tensor = self.model.get_decoder()(
            input_ids=packed.tokens, attention_mask=bias, position_ids=packed.positions, use_cache=False
        ).last_hidden_state
        return out


def _index(rows: Tensor, wanted: Tensor, width: int) -> Tensor:
    """[M] where each wanted place is among the rows, which are in order."""
    return torch.searchsorted(rows[:, 0] * width + rows[:, 1], wanted[:, 0] * width + wanted[:, 1])
