"""Made-up runs for testing reports: seeded, realistic in shape, and never measurements of anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from decoding.report.environment import Environment
from decoding.report.header import RunHeader
from decoding.report.records import AnswerRecord, PartRecord
from decoding.report.runfile import Run
from decoding.trace import Step, measure

CATEGORIES = ("writing", "knowledge", "generic", "common-sense", "math", "coding", "translation", "summarization")
STRATEGIES = (
    "autoregressive",
    "speculative(drafter=prompt-lookup)",
    "jacobi(block=16)",
    "skeleton(inner=speculative(drafter=prompt-lookup))",
)
LATENCY = ((1, 0.030), (2, 0.034), (4, 0.047), (8, 0.058), (16, 0.062), (32, 0.076), (64, 0.118))

_WORDS = (
    "the of a to in is that it for as with are on by this be from or which at can more one light leaves tree water "
    "sunlight autumn green chlorophyll breaks down days shorter cold pigment yellow orange red appear because plant "
    "energy stores before winter process simple however first second often people garden season change slowly "
    "reader question answer example gives shows each part whole between over under long short town river stone"
)
_GAIN = {"summarization": 1.7, "translation": 1.5, "coding": 1.35, "math": 0.9, "writing": 0.8}


@cache
def _forward_seconds(tokens: int) -> float:
    counts, seconds = zip(*LATENCY, strict=True)
    return float(np.interp(tokens, counts, seconds))


class SyntheticLatency:
    """A latency model that nobody measured, for backends that would otherwise measure one."""

    def cost(self, tokens: npt.ArrayLike, sequences: npt.ArrayLike, context: npt.ArrayLike) -> npt.NDArray[np.float64]:
        counts, seconds = zip(*LATENCY, strict=True)
        time = np.interp(np.asarray(tokens, dtype=float), counts, seconds)
        return np.asarray(time + 1e-5 * np.asarray(sequences) + 1e-9 * np.asarray(context))


@dataclass
class _Clock:
    """One engine's step counter and the seconds since the request was submitted."""

    rng: np.random.Generator
    speed: float
    step: int = 0
    now: float = 0.004

    def forward(self, tokens: int) -> float:
        return _forward_seconds(tokens) * self.speed * min(1.3, max(0.9, self.rng.normal(1, 0.04)))

    def run(self, shares: Iterable[tuple[int, int, int, int, bool, int, str]], plan: float) -> list[Step]:
        """One step; a share is (sequence, tokens, drafted, committed, prefill, reused, drafter)."""
        shares = list(shares)
        total = sum(tokens for _, tokens, *_ in shares)
        forward, commit = self.forward(total), 0.0004
        steps = [
            Step(
                step=self.step,
                sequence=sequence,
                start=self.now,
                plan=plan,
                forward=forward,
                commit=commit,
                batch_sequences=len(shares),
                batch_tokens=total,
                tokens=tokens,
                drafted=drafted,
                accepted=committed - 1 if drafted else 0,
                committed=committed,
                prefill=prefill,
                reused=reused,
                drafter=drafter,
            )
            for sequence, tokens, drafted, committed, prefill, reused, drafter in shares
        ]
        self.step += 1
        self.now += plan + forward + commit
        return steps


def _decode(clock: _Clock, lengths: Sequence[int], prompt: int, strategy: str, gain: float, first: int) -> list[Step]:
    """Decode sequences of these lengths together, one engine step after another."""
    draft = 5 if "speculative" in strategy else 15 if "jacobi" in strategy else 0
    drafter = "prompt-lookup" if "speculative" in strategy else "jacobi" if "jacobi" in strategy else ""
    alpha = min(0.85, (0.42 if draft == 5 else 0.3) * gain)
    reused = prompt - 12 if first else 0
    trace = clock.run([(first + i, prompt - reused, 0, 1, True, reused, "") for i in range(len(lengths))], 2e-4)
    left = [length - 1 for length in lengths]
    while any(left):
        shares = []
        for i, rest in enumerate(left):
            if not rest:
                continue
            guesses = draft if draft == 15 or clock.rng.random() < 0.7 else 0
            committed = min(rest, 1 + min(guesses, int(clock.rng.geometric(1 - alpha)) - 1))
            left[i] -= committed
            shares.append((first + i, 1 + guesses, guesses, committed, False, 0, drafter if guesses else ""))
        trace += clock.run(shares, 6e-4 if draft else 1e-4)
    return trace


def _words(rng: np.random.Generator, count: int) -> list[str]:
    chosen = rng.choice(_WORDS.split(), count)
    pieces = [f" {word}" if i else str(word).capitalize() for i, word in enumerate(chosen)]
    for i in range(9, count, 11):
        pieces[i] = "," if i % 22 != 9 else "."
    return pieces


def _ids(pieces: Sequence[str]) -> list[int]:
    return [sum(ord(c) * 31**k for k, c in enumerate(piece)) % 50000 for piece in pieces]


def _answer(
    rng: np.random.Generator, strategy: str, pieces: list[str], prompt: int, gain: float, speed: float
) -> tuple[list[str], list[Step], dict[str, PartRecord]]:
    """Text pieces, trace and parts of one answer."""
    clock = _Clock(rng, speed)
    if not strategy.startswith("skeleton"):
        return pieces, _decode(clock, [len(pieces)], prompt, strategy, gain, 0), {}
    count = int(rng.integers(3, 7))
    outline = [piece for i in range(count) for piece in (f"{i + 1}.", *_words(rng, 3), "\n")]
    bodies = [_words(rng, int(len(pieces) * 1.25 / count * rng.uniform(0.6, 1.3)) + 3) for _ in range(count)]
    trace = _decode(clock, [len(outline)], prompt, strategy, gain, 0)
    trace += _decode(clock, [len(body) for body in bodies], prompt + len(outline), strategy, gain, 1)
    parts = {}
    for i, (label, body) in enumerate([("outline", outline), *((f"point {k + 1}", b) for k, b in enumerate(bodies))]):
        steps = [step for step in trace if step.sequence == i]
        metrics = measure(steps, seconds=steps[-1].end, prompt_tokens=prompt)
        parts[label] = PartRecord("".join(body), _ids(body), metrics, "eos", [i], body)
    return [piece for part in parts.values() for piece in part.pieces], trace, parts


def synthetic_run(
    questions: int = 24,
    strategies: Sequence[str] = STRATEGIES,
    *,
    repeats: int = 1,
    seed: int = 0,
    failures: int = 0,
    tokens: tuple[int, int] = (40, 140),
    drift: float = 0.0,
) -> Run:
    """A run of `questions` × `strategies` × `repeats`; `drift` slows the machine by that share until the end."""
    rng = np.random.default_rng(seed)
    records: list[AnswerRecord] = []
    total = questions * len(strategies) * repeats
    started = 0.0
    for repeat in range(repeats):
        for q in range(questions):
            category = CATEGORIES[q * len(CATEGORIES) // questions]
            content = np.random.default_rng([seed, q])
            plain = _words(content, int(content.integers(*tokens)))
            prompt = int(content.integers(20, 120))
            for strategy in strategies:
                speed = 1 + drift * len(records) / total
                gain = _GAIN.get(category, 1.0)
                pieces, trace, parts = _answer(rng, strategy, list(plain), prompt, gain, speed)
                seconds = trace[-1].end + 0.002
                score = float(np.clip(content.normal(0.7, 0.12) - (0.06 if parts else 0), 0, 1))
                records.append(
                    AnswerRecord(
                        question_id=q + 1,
                        category=category,
                        question=f"Question {q + 1}: why do leaves change color in autumn, and what does it cost?",
                        strategy=strategy,
                        repeat=repeat,
                        text="".join(pieces).strip(),
                        tokens=_ids(pieces),
                        finish_reason="eos",
                        metrics=measure(trace, seconds=seconds, prompt_tokens=prompt),
                        trace=tuple(trace),
                        parts=parts,
                        pieces=pieces,
                        lossless=not strategy.startswith("skeleton"),
                        peak_memory=int(620e6 + 40e6 * len(parts)),
                        quality={"reference overlap": score},
                        started=started,
                        order=len(records),
                    )
                )
                started += seconds
    for i in range(failures):
        broken = records[-1 - i]
        records[-1 - i] = replace(broken, finish_reason="error", error="the context is full.", text="", tokens=[])
    header = RunHeader(
        config={"model": "synthetic-model", "strategies": list(strategies), "params": {"max_new_tokens": 160}},
        config_hash="0123456789abcdef",
        environment=Environment(python="3.11", processor="synthetic", cores=2, threads=2, device="cpu"),
        created="2026-01-02T03:04:05+00:00",
        latency=LATENCY,
    )
    return Run(header, tuple(records), "synthetic")
