"""What every step did, and every metric as a pure function of it.

The engine appends one `Step` per sequence and forward pass. Metrics are computed from those alone, so a
definition can change without running anything again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


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
    )


def acceptance_histogram(trace: Sequence[Step]) -> dict[int, int]:
    """How many passes after prefill committed 1, 2, 3 … tokens to a sequence."""
    counts: dict[int, int] = {}
    for step in trace:
        if not step.prefill:
            counts[step.committed] = counts.get(step.committed, 0) + 1
    return dict(sorted(counts.items()))


def shifted(trace: Iterable[Step], seconds: float) -> list[Step]:
    """The same steps on a clock that started `seconds` earlier."""
    return [replace(step, start=step.start + seconds) for step in trace]
