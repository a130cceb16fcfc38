"""What every step did, and every metric as a pure function of it.

The engine appends one `Step` per sequence and forward pass. Metrics are computed from those alone, so a
definition can change without running anything again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Frame:
    """What one sequence's block held in one step, kept on request (`Engine.filming`).

    at: new tokens the sequence had before the step. guesses, parents: the block, as in `engine.block.Block`.
    gained: the tokens it was committed.
    """

    at: int
    guesses: tuple[int, ...]
    parents: tuple[int, ...] | None
    gained: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One sequence's share of one forward pass of the target model.

    step: the engine's step number; sequences of the same batch have the same one.
    sequence: the engine's number for the sequence.
    start: seconds since the request was submitted, when the step began.
    plan, forward, commit: seconds the whole step spent choosing blocks (drafting included), in the
        model's forward pass, and confirming tokens; shared by all sequences of the step.
    batch_sequences, batch_tokens: how many sequences and tokens the forward pass ran in all.
    tokens: tokens this sequence put through the model.
    drafted: how many of those were guesses.
    accepted: guesses that were confirmed.
    committed: new tokens the sequence gained; 0 while its prompt is still being read.
    prefill: the step read prompt tokens (the last prefill step also commits the first new token).
    reused: prompt tokens whose keys and values were taken from another sequence (first step only).
    drafter: who guessed; "" if nobody did.
    written, revised: places of the block that got a token, and that lost or changed theirs (masked refinement, where
        nothing is guessed and `committed` counts finished blocks only).
    expected: tokens that the sequence was expected to gain, bonus token included; 0 if nobody estimated.
    sources: who made each confirmed guess, in order, separated by spaces, where the drafter combines several;
        "a+b" if both did. offered: how many guesses each of them made, as "a=3 b=5".
    frame: what the block held, if that was asked for; not part of records.
    """

    step: int
    sequence: int
    start: float
    plan: float
    forward: float
    commit: float
    batch_sequences: int
    batch_tokens: int
    tokens: int
    drafted: int
    accepted: int
    committed: int
    prefill: bool
    reused: int = 0
    drafter: str = ""
    written: int = 0
    revised: int = 0
    expected: float = 0.0
    sources: str = ""
    offered: str = ""
    frame: Frame | None = None

    @property
    def end(self) -> float:
        """Seconds since the request was submitted, when the step ended."""
        return self.start + self.plan + self.forward + self.commit


@dataclass(frozen=True)
class Metrics:
    """Numbers about one generation. Times are seconds, everything else counts unless it says otherwise.

    seconds: from submission to the last token, as a clock on the wall shows it (queueing included).
    first_token_seconds: from submission to the first new token.
    prompt_tokens: tokens of all prompts; reused_tokens: those not computed but taken from another
        sequence's cache; prefill_tokens: those that went through the model.
    new_tokens: tokens generated, intermediate text (an outline, say) included.
    forwards: target passes after prefill in which this generation took part. Sequences of the same
        generation that ran in the same pass count it once.
    tokens_per_forward: new tokens committed after prefill ÷ forwards.
    verifications: passes that checked at least one guess.
    acceptance_length: tokens committed per pass after prefill and sequence, bonus token included
        (Spec-Bench's convention); plain decoding has 1.
    drafted, accepted: guesses checked and confirmed; drafted − accepted were wasted.
    revised: tokens that masked refinement changed or masked again.
    plan_seconds, forward_seconds, commit_seconds: parts of the steps this generation took part in.
    """

    seconds: float = 0.0
    first_token_seconds: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefill_tokens: int = 0
    new_tokens: int = 0
    forwards: int = 0
    tokens_per_forward: float = 0.0
    verifications: int = 0
    acceptance_length: float = 0.0
    drafted: int = 0
    accepted: int = 0
    plan_seconds: float = 0.0
    forward_seconds: float = 0.0
    commit_seconds: float = 0.0
    revised: int = 0


def measure(trace: Iterable[Step], *, seconds: float, prompt_tokens: int) -> Metrics:
    """The metrics of one generation from its steps.

    `seconds` is its wall-clock time and `prompt_tokens` the length of its prompt, or of all its prompts
    together, which no step knows when everything was reused.
    """
    trace = list(trace)
    decode = [s for s in trace if not s.prefill]
    forwards = len({s.step for s in decode})
    decoded = sum(s.committed for s in decode)
    passes = {s.step: s for s in trace}.values()
    first = min((s.end for s in trace if s.committed), default=0.0)
    return Metrics(
        seconds=seconds,
        first_token_seconds=first,
        prompt_tokens=prompt_tokens,
        reused_tokens=sum(s.reused for s in trace),
        prefill_tokens=sum(s.tokens for s in trace if s.prefill),
        new_tokens=sum(s.committed for s in trace),
        forwards=forwards,
        tokens_per_forward=decoded / forwards if forwards else 0.0,
        verifications=len({s.step for s in decode if s.drafted}),
        acceptance_length=decoded / len(decode) if decode else 0.0,
        drafted=sum(s.drafted for s in trace),
        accepted=sum(s.accepted for s in trace),
        plan_seconds=sum(s.plan for s in passes),
        forward_seconds=sum(s.forward for s in passes),
        commit_seconds=sum(s.commit for s in passes),
        revised=sum(s.revised for s in trace),
    )


def acceptance_histogram(trace: Sequence[Step]) -> dict[int, int]:
    """How many passes after prefill committed 1, 2, 3 … tokens to a sequence."""
    counts: dict[int, int] = {}
    for step in trace:
        if not step.prefill:
            counts[step.committed] = counts.get(step.committed, 0) + 1
    return dict(sorted(counts.items()))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a token came from. step: number of the forward pass that confirmed it. drafter: who guessed it, "" for the
    model itself."""

    step: int
    drafter: str


def origins(trace: Iterable[Step]) -> list[Origin]:
    """The origin of every token of one sequence, in order."""
    found = []
    for step in trace:
        guessed = min(step.accepted, step.committed)
        names = step.sources.split() if step.sources else [step.drafter] * guessed
        found += [Origin(step.step, name) for name in names[:guessed]]
        found += [Origin(step.step, "")] * (step.committed - guessed)
    return found


@dataclass(frozen=True)
class SourceShare:
    """Guesses that one drafter made, and how many of them were confirmed; the others were wasted. A guess that two made
    counts for both."""

    drafted: int
    accepted: int


@dataclass(frozen=True)
class Speculation:
    """What guessing brought, over the passes after prefill.

    passes: sequences × passes. acceptance_length: tokens committed per pass, bonus token included. histogram: tokens
    committed → passes. by_position: for the 1st, 2nd … guess of a chain, how often one was offered that far (in a tree:
    how often there were so many guesses), and how often it and all before it were confirmed. by_source: per drafter.
    wasted: guesses verified in vain. expected: tokens expected, and measured: tokens gained, in the passes for which
    there was an expectation. draft_seconds: choosing and making guesses; verify_seconds: forward passes and
    confirmation; other_seconds: the rest of the answer's time (prompts, queueing, text).
    """

    passes: int
    acceptance_length: float
    histogram: Mapping[int, int]
    by_position: Sequence[tuple[int, int]]
    by_source: Mapping[str, SourceShare]
    wasted: int
    expected: float
    measured: int
    draft_seconds: float
    verify_seconds: float
    other_seconds: float

    def speedups(self, plain_seconds: float) -> tuple[float, float]:
        """(expected, measured) speed-up of the decoding passes if plain decoding takes so many seconds per token:
        tokens expected, or gained, times `plain_seconds` ÷ the seconds that the passes took."""
        spent = self.draft_seconds + self.verify_seconds
        if not spent:
            return 0.0, 0.0
        gained = self.acceptance_length * self.passes
        share = self.expected / self.measured if self.measured else 1.0
        return gained * share * plain_seconds / spent, gained * plain_seconds / spent


def speculation(trace: Iterable[Step], *, seconds: float = 0.0) -> Speculation:
    """What guessing brought; `seconds` is the answer's time on a clock on the wall."""
    decode = [step for step in trace if not step.prefill]
    histogram = acceptance_histogram(decode)
    committed = sum(step.committed for step in decode)
    verified = [step for step in decode if step.drafted]
    deepest = max((step.accepted for step in verified), default=0)
    longest = max((step.drafted for step in verified), default=0)
    shares: dict[str, list[int]] = {}
    for step in verified:
        for name, count in _offers(step).items():
            shares.setdefault(name, [0, 0])[0] += count
        for origin in origins([step]):
            for name in origin.drafter.split("+") if origin.drafter else ():
                shares.setdefault(name, [0, 0])[1] += 1
    foreseen = [step for step in decode if step.expected]
    once = {step.step: step for step in decode}.values()  # sequences of one pass share its time
    draft, verify = sum(step.plan for step in once), sum(step.forward + step.commit for step in once)
    return Speculation(
        passes=len(decode),
        acceptance_length=committed / len(decode) if decode else 0.0,
        histogram=histogram,
        by_position=tuple(
            (sum(step.drafted >= j for step in verified), sum(step.accepted >= j for step in verified))
            for j in range(1, min(deepest + 1, longest) + 1)
        ),
        by_source={name: SourceShare(*share) for name, share in sorted(shares.items())},
        wasted=sum(step.drafted - step.accepted for step in verified),
        expected=sum(step.expected for step in foreseen),
        measured=sum(step.committed for step in foreseen),
        draft_seconds=draft,
        verify_seconds=verify,
        other_seconds=max(0.0, seconds - draft - verify),
    )


def _offers(step: Step) -> dict[str, int]:
    if not step.offered:
        return {step.drafter: step.drafted}
    pairs = (offer.rpartition("=") for offer in step.offered.split())
    return {name: int(count) for name, _, count in pairs}


def shifted(trace: Iterable[Step], seconds: float) -> list[Step]:
    """The same steps on a clock that started `seconds` earlier."""
    return [replace(step, start=step.start + seconds) for step in trace]
