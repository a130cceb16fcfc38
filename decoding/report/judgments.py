"""Verdicts of a judge on pairs of answers, kept beside a run's records in FastChat's format.

One JSON object a line, with the fields of FastChat's `model_judgment/*_pair.jsonl`, so that its tools read them:

    {"question_id": ..., "model_1": ..., "model_2": ..., "g1_winner": ..., "g2_winner": ..., "judge": [model, prompt],
     "g1_user_prompt": ..., "g1_judgment": ..., "g2_user_prompt": ..., "g2_judgment": ..., "turn": 1, "tstamp": ...}

The "models" are strategies of the run.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from decoding.errors import RecordError
from decoding.report.fields import get, get_list

JUDGMENTS = "judgments.jsonl"
"""Name of the file within a run directory."""

Winner = Literal["model_1", "model_2", "tie", "error"]
"""Who wrote the better answer; "error" if the judge gave no verdict."""

Pair = tuple[int | str, str, str, tuple[str, str]]


@dataclass(frozen=True)
class Judgment:
    """Two answers to one question, judged twice.

    In the first game (g1) model_1's answer is shown first, in the second model_2's. judge: the model that judged, and
    the name of the prompt it was given. user_prompt, judgment: what the judge read and wrote. tstamp: seconds
    since 1970.
    """

    question_id: int | str
    model_1: str
    model_2: str
    g1_winner: Winner
    g2_winner: Winner
    judge: tuple[str, str]
    g1_user_prompt: str = ""
    g1_judgment: str = ""
    g2_user_prompt: str = ""
    g2_judgment: str = ""
    turn: int = 1
    tstamp: float = 0.0

    @property
    def pair(self) -> Pair:
        """What was judged, and by whom: unique within a run."""
        return (self.question_id, self.model_1, self.model_2, self.judge)

    @property
    def failed(self) -> bool:
        """The judge gave no verdict in one game or both: the pair counts in no figure and may be judged again."""
        return "error" in (self.g1_winner, self.g2_winner)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Judgment:
        """Raises RecordError for a missing or mistyped field."""
        model, prompt, *_ = [*get_list(data, "judge", str), "", ""]
        texts = ("g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment")
        return cls(
            question_id=get(data, "question_id", (int, str)),
            model_1=get(data, "model_1", str),
            model_2=get(data, "model_2", str),
            g1_winner=_winner(data, "g1_winner"),
            g2_winner=_winner(data, "g2_winner"),
            judge=(model, prompt),
            turn=get(data, "turn", int, 1),
            tstamp=float(get(data, "tstamp", (int, float), 0.0)),
            **{name: get(data, name, str, "") for name in texts},
        )


def read_judgments(directory: str | os.PathLike[str]) -> tuple[Judgment, ...]:
    """The judgments beside a run's records; none if nothing was judged. Of a pair judged twice, the later one.

    A line that was cut off by a crash does not count: that pair is judged again. Raises RecordError for a file that
    cannot be read or is no such file.
    """
    path = Path(directory) / JUDGMENTS
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if os.path.exists(path) else []
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} could not be read ({error}).") from error
    judgments: dict[Pair, Judgment] = {}
    for number, line in enumerate(lines, 1):
        try:
            judgment = Judgment.from_json(json.loads(line))
        except ValueError:
            continue
        except (RecordError, AttributeError) as error:
            raise RecordError(f"{path}, line {number}: {error}") from None
        judgments[judgment.pair] = judgment
    return tuple(judgments.values())


def append_judgment(directory: str | os.PathLike[str], judgment: Judgment) -> None:
    """Write one judgment; when this returns, it is on disk. Raises RecordError if it cannot be written."""
    path = Path(directory) / JUDGMENTS
    line = json.dumps(dataclasses.asdict(judgment), ensure_ascii=True)
    try:
        with open(path, "ab") as file:
            torn = file.tell() > 0 and path.read_bytes()[-1:] != b"\n"
            file.write((b"\n" if torn else b"") + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RecordError(f"{path} could not be written ({error.strerror or error}); make space and go on.") from error


def _winner(data: Mapping[str, Any], name: str) -> Winner:
    value = get(data, name, str)
    if value not in get_args(Winner):
        raise RecordError(f"field {name!r} must be one of {', '.join(get_args(Winner))}, not {value!r}.")
    return cast(Winner, value)
