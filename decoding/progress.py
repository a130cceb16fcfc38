"""What a comparison shows while it runs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from decoding.comparison import Comparison
from decoding.questions import Question
from decoding.report import AnswerRecord
from decoding.strategies import Strategy


class Live:
    """One bar for the whole run, and one line per strategy with its speed so far."""

    def __init__(self, comparison: Comparison, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=0.5,  # drawing takes time from the answers; between them it is done at once
        )
        answers = len(comparison.questions) * comparison.schedule.repeats
        self._all = self._progress.add_task("all answers", total=answers * len(comparison.strategies), note="")
        self._rows = {
            str(strategy): self._progress.add_task(str(strategy), total=answers, note="", start=False)
            for strategy in comparison.strategies
        }
        self._tokens = dict.fromkeys(self._rows, 0)
        self._seconds = dict.fromkeys(self._rows, 0.0)

    def update(self, question: Question | None, strategy: Strategy, record: AnswerRecord | None) -> None:
        """See `decoding.comparison.Progress`."""
        name = str(strategy)
        row = self._rows[name]
        if question is None:
            self._progress.update(row, note="warming up")
        elif record is None:
            self._progress.start_task(row)
            self._progress.update(self._all, note=f"{question.category} · {question.id}", refresh=True)
        else:
            self._tokens[name] += record.metrics.new_tokens
            self._seconds[name] += record.metrics.seconds
            speed = self._tokens[name] / self._seconds[name] if self._seconds[name] else 0.0
            self._progress.update(row, advance=1, note=f"{speed:.1f} tokens/s")
            self._progress.update(self._all, advance=1, refresh=True)

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
