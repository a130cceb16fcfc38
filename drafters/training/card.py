"""The card beside a trained head: what it was made from, how, and what it reached."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafters.training.corpus import Corpus

if TYPE_CHECKING:
    from drafters.training.fit import Run, Schedule


def write_card(
    folder: Path, kind: str, target: str, corpus: Corpus, schedule: Schedule, run: Run, options: Any
) -> None:
    """Write README.md. options: the head's, a dataclass."""
    result = run.validations[-1]
    tokens = sum(document.supervised for document in corpus.documents)
    rows = [
        ("data", f"{len(corpus.documents)} answers of {target} to its own questions, greedy; {tokens} tokens"),
        ("steps", f"{result.step} of {run.total}, {schedule.batch} answers each ({schedule.epochs} epochs in all)"),
        ("training loss", f"{run.loss:.3f}"),
        ("held-out loss", f"{result.loss:.3f}"),
        (
            "held-out acceptance length",
            f"{result.acceptance_length:.3f} (greedy chain of {schedule.draft_length} guesses, simulated on answers "
            "that were not trained on)",
        ),
        ("held-out agreement by draft step", ", ".join(f"{value:.3f}" for value in result.agreement)),
        ("options", ", ".join(f"{name}={value}" for name, value in asdict(options).items())),
        ("schedule", ", ".join(f"{name}={value}" for name, value in asdict(schedule).items())),
    ]
    lines = [f"# {kind} for {target}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
