"""What a reader should know before believing a run's figures, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from decoding.report.pace import pace
from decoding.report.records import BASELINE
from decoding.report.runfile import Run

if TYPE_CHECKING:
    from decoding.report.summary import StrategySummary


def notices(run: Run, rows: Sequence[StrategySummary]) -> tuple[str, ...]:
    """Missing baseline, failures, broken promises of losslessness, a change of place, drift and disturbances of the
    machine."""
    return (
        *_missing_baseline(rows),
        *_failures(run, rows),
        *_broken_promises(rows),
        *_moved(run),
        *_disturbances(run),
    )


def _missing_baseline(rows: Sequence[StrategySummary]) -> Iterator[str]:
    if not any(row.baseline and row.questions for row in rows):
        yield f"No complete answer of plain decoding ({BASELINE!r}) is in this run, so there are no speed-ups."


def _failures(run: Run, rows: Sequence[StrategySummary]) -> Iterator[str]:
    for row in rows:
        if row.failures:
            error = next((r.error for r in run.records if r.strategy == row.strategy and r.failed and r.error), None)
            cause = f", the first with: {error.rstrip('.')}" if error else ""
            yield f"{row.strategy}: {row.failures} of {row.answers} answers failed{cause}."


def _broken_promises(rows: Sequence[StrategySummary]) -> Iterator[str]:
    for row in rows:
        if row.lossless and row.comparison and row.comparison.differences:
            differences = row.comparison.differences
            yield (
                f"{row.strategy} promises plain decoding's tokens, but {len(differences)} of {row.comparison.compared} "
                f"answers differ, the first from token {differences[0].position} on "
                f"(question {differences[0].question_id})."
            )


def _moved(run: Run) -> Iterator[str]:
    """Resumed elsewhere: with other code, packages or hardware. The load at the moment is no change, nor is it one that
    compiled code was there already."""
    first, *others = (
        replace(there, load=0.0, compile_seconds=0.0)
        for there in (run.header.environment, *(session.environment for session in run.resumed))
    )
    changed = [f.name for f in fields(first) if any(getattr(o, f.name) != getattr(first, f.name) for o in others)]
    if changed:
        yield (
            f"The run was resumed in another environment (different: {', '.join(changed)}): answers from before and "
            "after are paired within questions only where a question fell wholly on one side."
        )


def _disturbances(run: Run) -> Iterator[str]:
    """Drift and outliers of plain decoding's pace."""
    found = pace(run)
    moved = found.drift
    if moved.flagged:
        yield (
            f"Plain decoding's steps got {abs(moved.change):.0%} {'slower' if moved.change > 0 else 'faster'} from "
            f"start to end (p = {moved.p_value:.2g}): the machine drifted. Ratios are paired within questions and "
            "hold; absolute times hold less."
        )
    odd = list(dict.fromkeys(str(found.answers[i].question_id) for i in found.odd))
    if odd:
        yield (
            f"Plain decoding's steps were far from their usual time on question {', '.join(odd[:8])}"
            f"{' …' if len(odd) > 8 else ''}: something else may have used the machine."
        )
