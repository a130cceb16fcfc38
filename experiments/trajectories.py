"""Jacobi trajectories: the iterates on the way to the model's own greedy answers, collected by the engine or made up.

All prompts decode together, block after block, from the guesses that decoding makes, too. One shard of prompts is one
safetensors file, written whole or not at all, so an interrupted collection goes on where it stopped. It says of which
model and prompts it was made, and is made again for others.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence as List
from pathlib import Path
from random import Random

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from decoding.backends.local import LocalBackend
from decoding.report.fixed_point import final_text, main_branch, reels
from decoding.strategies.adapter import fingerprint
from decoding.strategies.jacobi import JacobiDecoder
from decoding.types import SamplingParams
from experiments.consistency import Branch, Trajectory

_SHARD = 64  # prompts
_REPEATS = 10  # an answer in which a run of four tokens comes so often is of no use


def collect(
    lm: LocalBackend,
    prompts: List[List[int]],
    folder: Path,
    *,
    block_size: int,
    max_new_tokens: int,
    schedule: str = "gauss-seidel",
) -> list[Trajectory]:
    """The trajectories of all prompts; whatever `folder` has already of this model and these prompts is read."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    model = json.dumps(fingerprint(lm.model))
    shards = [prompts[at : at + _SHARD] for at in range(0, len(prompts), _SHARD)]
    for number, shard in enumerate(track(shards, "trajectories", disable=len(shards) < 2)):
        file = folder / f"trajectories-{block_size}-{schedule}-{max_new_tokens}-{number:05}.safetensors"
        origin = {"model": model, "prompts": digest(shard)}
        if not file.exists() or _origin(file) != origin:
            _save(follow(lm, shard, block_size, max_new_tokens, schedule), file, origin)
        found += _load(file)
    return found


def follow(
    lm: LocalBackend, prompts: List[List[int]], block_size: int, max_new_tokens: int, schedule: str = "gauss-seidel"
) -> list[Trajectory]:
    """Decode prompts greedily by Jacobi iteration and keep every iterate from its first wrong guess on."""
    decoder = JacobiDecoder(block_size, schedule=schedule, initial="iterate", recycle=False)
    params = SamplingParams(max_new_tokens=max_new_tokens)
    filming, lm.engine.filming = lm.engine.filming, True
    try:
        sequences = [lm.engine.submit(prompt, params, decoder, lm.eos) for prompt in prompts]
        while lm.engine.busy:
            lm.engine.step()
    finally:
        lm.engine.filming = filming
    trajectories = []
    for sequence in sequences:
        frames = reels(sequence.trace).get(sequence.id, ())
        answer = final_text(frames)
        if sequence.error is not None or len(answer) < 2 or repetitive(answer):
            continue
        branches: dict[tuple[int, tuple[int, ...]], None] = {}  # a stuck iterate counts once
        for frame in frames:
            guesses = main_branch(frame)
            wrong = next((j for j, g in enumerate(guesses) if answer[frame.at + j : frame.at + j + 1] != [g]), None)
            if wrong is not None and frame.at + wrong < len(answer) - 1:
                branches[frame.at + wrong, tuple(guesses[wrong:])] = None
        start = len(sequence.prompt)
        kept = [Branch(start + at, list(guesses)) for at, guesses in branches]
        trajectories.append(Trajectory([*sequence.prompt, *answer], start, kept))
    return trajectories


def corrupt(tokens: List[int], prompt: int, depth: int, random: Random) -> Trajectory:
    """An answer with made-up iterates, which take no decoding: at every place of it, `depth` guesses of which the first
    is wrong, each a token of the text, the one before its place or the one behind it (an iterate that lags or leads by
    one). tokens: prompt and answer; prompt: tokens of the prompt."""
    kept = []
    for start in range(prompt, len(tokens) - 1):
        guesses: list[int] = []
        for place in range(start, min(start + depth, len(tokens) - 1)):
            near = tokens[place + random.choice((-1, 1))]
            guesses.append(near if random.random() < 0.5 else random.choice(tokens))
        if guesses[0] != tokens[start]:
            kept.append(Branch(start, guesses))
    return Trajectory(list(tokens), prompt, kept)


def repetitive(tokens: List[int]) -> bool:
    """Whether an answer turns in a circle."""
    runs = Counter(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return max(runs.values(), default=0) >= _REPEATS


def digest(data: object) -> str:
    """Something short by which plain data are known again."""
    return hashlib.sha256(repr(data).encode()).hexdigest()


def _save(trajectories: List[Trajectory], file: Path, origin: dict[str, str]) -> None:
    branches = [(i, branch) for i, trajectory in enumerate(trajectories) for branch in trajectory.branches]

    def column(values: List[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    tensors = {
        "tokens": column([token for t in trajectories for token in t.tokens]),
        "lengths": column([len(t.tokens) for t in trajectories]),
        "prompts": column([t.prompt for t in trajectories]),
        "owners": column([i for i, _ in branches]),
        "starts": column([branch.start for _, branch in branches]),
        "widths": column([len(branch.guesses) for _, branch in branches]),
        "guesses": column([token for _, branch in branches for token in branch.guesses]),
    }
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata=origin)
    part.replace(file)


def _origin(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() or {}


def _load(file: Path) -> list[Trajectory]:
    table = {name: tensor.tolist() for name, tensor in load_file(file).items()}
    branches: dict[int, list[Branch]] = {}
    at = 0
    for owner, start, width in zip(table["owners"], table["starts"], table["widths"], strict=True):
        branches.setdefault(owner, []).append(Branch(start, table["guesses"][at : at + width]))
        at += width
    trajectories, at = [], 0
    for i, (length, prompt) in enumerate(zip(table["lengths"], table["prompts"], strict=True)):
        trajectories.append(Trajectory(table["tokens"][at : at + length], prompt, branches.get(i, [])))
        at += length
    return trajectories
