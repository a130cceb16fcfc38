"""How an answer came to its fixed point: iterations per block, tokens fixed by each, tokens that stood still.

Pure functions of the frames in a trace (`decoding.trace.Frame`), which the engine keeps on request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from decoding.engine.block import first_branch
from decoding.trace import Frame, Step


@dataclass(frozen=True)
class FixedPoint:
    """Means over the passes after prefill, of all sequences.

    iterations: passes. blocks: a block is what was guessed when the one before it had become text, the token that
    the model adds included; places that join later belong to the next one. Of masked refinement, it is what was filled
    in before it became text together.
    iterations_per_block: passes until all of a block was text. tokens_per_block: its length.
    fixed_per_iteration: tokens that became text in a pass.
    stationary_per_iteration: guesses that were right in the end though a wrong one stood before them (stationary
    tokens, Kou et al. 2024). Every pass that sees one counts it.
    revised_per_iteration: guesses that were another token in the pass before; of masked refinement, tokens that were
    changed or masked again.
    """

    iterations: int
    blocks: int
    iterations_per_block: float
    tokens_per_block: float
    fixed_per_iteration: float
    stationary_per_iteration: float
    revised_per_iteration: float


def fixed_point(trace: Iterable[Step]) -> FixedPoint:
    """The statistics of a trace with frames; of a trace without any, all zero."""
    trace = list(trace)
    iterations = blocks = tokens = fixed = stationary = revised = 0
    for frames in reels(trace).values():
        text = final_text(frames)
        end, last = 0, dict[int, int]()
        for frame in frames:
            if not frame.decoding:
                continue
            iterations += 1
            fixed += len(frame.gained)
            if frame.at >= end:
                end = min(frame.at + 1 + len(main_branch(frame)), len(text))
                blocks += 1
                tokens += end - frame.at
            guesses = main_branch(frame)
            stationary += sum(stationary_places(guesses, text[frame.at :]))
            places = dict(enumerate(guesses, start=frame.at))
            revised += sum(last.get(place, token) != token for place, token in places.items())
            last = places
    if any(step.written for step in trace):  # a mask that is filled in was no guess, and nothing is added to a block
        blocks = sum(bool(step.frame and step.frame.gained) for step in trace)
        tokens = fixed
        revised = sum(step.revised for step in trace)
    mean = max(1, iterations)
    return FixedPoint(
        iterations=iterations,
        blocks=blocks,
        iterations_per_block=iterations / max(1, blocks),
        tokens_per_block=tokens / max(1, blocks),
        fixed_per_iteration=fixed / mean,
        stationary_per_iteration=stationary / mean,
        revised_per_iteration=revised / mean,
    )


@dataclass(frozen=True)
class Shown(Frame):
    """A frame, and whether its pass came after prefill."""

    decoding: bool = True


def reels(trace: Iterable[Step]) -> Mapping[int, Sequence[Shown]]:
    """The frames of every sequence of a trace, in order."""
    found: dict[int, list[Shown]] = {}
    for step in trace:
        if (frame := step.frame) is not None:
            shown = Shown(frame.at, frame.guesses, frame.parents, frame.gained, decoding=not step.prefill)
            found.setdefault(step.sequence, []).append(shown)
    return found


def final_text(frames: Iterable[Frame]) -> list[int]:
    """The new tokens of one sequence."""
    return [token for frame in frames for token in frame.gained]


def branches(frame: Frame) -> list[list[int]]:
    """Every path of a frame's block from the text to a leaf, in the order of the leaves; a chain has one."""
    if frame.parents is None:
        return [list(frame.guesses)] if frame.guesses else []
    inner = set(frame.parents)
    paths = []
    for leaf in (node for node in range(len(frame.guesses)) if node not in inner):
        path, node = [], leaf
        while node >= 0:
            path.append(frame.guesses[node])
            node = frame.parents[node]
        paths.append(path[::-1])
    return paths


def main_branch(frame: Frame) -> list[int]:
    """The block itself where alternatives are verified beside it: the path that its first nodes make."""
    return first_branch(frame.guesses, frame.parents)


def stationary_places(guesses: Sequence[int], text: Sequence[int]) -> list[bool]:
    """Which guesses hold the text that follows although one before them does not."""
    wrong, places = False, []
    for place, token in enumerate(guesses):
        right = place < len(text) and text[place] == token
        places.append(right and wrong)
        wrong = wrong or not right
    return places
