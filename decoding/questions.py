"""Questions to run strategies on, read from files.

The shipped suites have names (`suites()` lists them). Files may be in any of these formats, told apart by their
extension and content:

    .jsonl  FastChat and Spec-Bench   {"question_id", "category", "turns": ["…"], "reference": ["…"]}
            Arena-Hard                {"question_id", "turns": [{"content": "…"}]} or {"uid", "prompt"}
            WizardLM                  {"idx", "Skill", "Instruction"}
    .json   AlpacaEval                [{"instruction": "…", "input": "…", "dataset": "…"}, …]
    .csv    router labels             a header with "request" and, if known, "label" (1: a list of points suits it)
    other   plain text                one question a line

Two keys of our own may be added to the JSON formats: "check" (how an answer is scored, see `Check`) and "list"
(whether the best answer is a list of independent points, which is what Skeleton-of-Thought is for).
"""

from __future__ import annotations

import csv
import importlib.resources
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal, NoReturn, cast, get_args

from decoding.errors import InvalidRequest, UnknownName
from decoding.quality import has_number
from decoding.types import is_text

Check = Literal["numeric", "exact", "contains", "rouge-l", "chrf"]
"""How an answer is compared with its reference; `decoding.quality.score` says what each of them means."""

UNCATEGORIZED = "uncategorized"

# Spec-Bench names no checks, but the references of these categories only make sense with one of them.
_SPEC_BENCH_CHECKS: Mapping[str, Check] = {
    "translation": "chrf",
    "summarization": "rouge-l",
    "math_reasoning": "numeric",
    "qa": "contains",
    "rag": "contains",
}


@dataclass(frozen=True)
class Question:
    """One question, of one or more user turns.

    id: unique within its file.
    category: what figures are grouped by; "uncategorized" if the file does not say.
    turns: what the user says, one text per turn.
    reference: known good answers. With one turn, all of them are good answers to it; with several, entry i
        belongs to turn i, and "" means that there is none.
    check: how answers are scored against the reference; None if they are not.
    list_type: whether a list of independent points answers it best; None if nobody said.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    check: Check | None = None
    list_type: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.turns, str):  # one turn, and not one for each of its characters
            object.__setattr__(self, "turns", (self.turns,))
        if not self.turns:
            raise InvalidRequest(f"question {self.id!r} has no turns; it needs at least one.")
        for turn in self.turns:
            if not is_text(turn):
                raise InvalidRequest(
                    f"question {self.id!r}: a turn must be text that has a UTF-8 form, not {turn!r:.60}."
                )

    def references(self, turn: int = 0) -> tuple[str, ...]:
        """The known good answers to one turn; empty if there are none."""
        if len(self.turns) == 1:
            return tuple(r for r in self.reference if r)
        return tuple(r for r in self.reference[turn : turn + 1] if r)


def suites() -> dict[str, Path]:
    """The shipped suites: their names and files."""
    folder = Path(str(importlib.resources.files("experiments") / "suites"))
    return {f.stem: f for f in sorted(folder.iterdir()) if f.suffix in (".jsonl", ".csv")}


def load_questions(
    path_or_name: str | PathLike[str],
    *,
    limit: int | None = None,
    categories: Iterable[str] | None = None,
) -> list[Question]:
    """The questions of a shipped suite or a file, in file order.

    categories: keep only these. limit: keep the first so many, counted after `categories`.

    Raises `UnknownName` for a suite or category that does not exist, and `InvalidRequest`, with file and line,
    for a file that is missing, unreadable, empty or malformed.
    """
    if limit is not None and limit < 1:
        raise InvalidRequest(f"limit must be at least 1, not {limit!r}.")
    questions = _read(_find(path_or_name))
    if categories is not None:
        known = {q.category for q in questions}
        wanted = {categories} if isinstance(categories, str) else set(categories)
        for name in sorted(wanted - known):
            raise UnknownName("category", name, known)
        questions = [q for q in questions if q.category in wanted]
    return questions[:limit]


def _find(path_or_name: str | PathLike[str]) -> Path:
    """A shipped suite if it is the name of one, else a file."""
    if isinstance(path_or_name, str):
        shipped = suites()
        if path_or_name in shipped:
            return shipped[path_or_name]
        path = Path(path_or_name)
        if not os.path.exists(path) and path.name == path_or_name and not path.suffix:
            raise UnknownName("question suite", path_or_name, shipped)
    path = Path(path_or_name)
    if not os.path.exists(path):  # not Path.exists, which raises an OSError for a name that is too long
        raise InvalidRequest(f"question file {str(path)!r} does not exist; shipped suites: {', '.join(suites())}.")
    if os.path.isdir(path):
        raise InvalidRequest(f"{str(path)!r} is a folder; give one question file in it.")
    return path


@dataclass(frozen=True)
class _Place:
    """Where something was read, for error messages."""

    file: str
    line: int

    def fail(self, what: str) -> NoReturn:
        raise InvalidRequest(f"{self.file}, line {self.line}: {what}")


def _read(file: Path) -> list[Question]:
    text = _text(file)
    extension = file.name.rpartition(".")[2].lower()
    if not text.strip():
        raise InvalidRequest(f"{file}: the file is empty; it needs at least one question.")
    if extension == "csv":
        found = _table(file, text)
    elif extension == "jsonl" or (extension == "json" and not text.lstrip().startswith("[")):
        found = _json_lines(file, text)
    elif extension == "json":
        found = _json_list(file, text)
    else:
        found = _plain_text(file, text)

    questions: list[Question] = []
    first_seen: dict[str, int] = {}
    for place, question in found:
        if question.id in first_seen:
            place.fail(f"the question id {question.id!r} was already used in line {first_seen[question.id]}.")
        first_seen[question.id] = place.line
        questions.append(question)
    if not questions:
        raise InvalidRequest(f"{file}: there are no questions in the file; it needs at least one.")
    return questions


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"question file {str(file)!r} cannot be read: {error.strerror or error}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _Place(str(file), data[: error.start].count(b"\n") + 1)
        place.fail(f"byte {data[error.start]:#04x} is not valid UTF-8; save the file as UTF-8.")
    return text.replace("\r\n", "\n")


def _plain_text(file: Path, text: str) -> Iterator[tuple[_Place, Question]]:
    # Not splitlines: it would also break at form feeds and Unicode line separators.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _Place(str(file), number), Question(str(number), UNCATEGORIZED, (line.strip(),))


def _json_lines(file: Path, text: str) -> Iterator[tuple[_Place, Question]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = _Place(str(file), number)
            yield place, _question(place, _parse(place, line), default_id=str(number))


def _json_list(file: Path, text: str) -> Iterator[tuple[_Place, Question]]:
    records = _parse(_Place(str(file), 1), text)
    assert isinstance(records, list)
    # Parsed again one by one, so that an error can name the line on which its record starts.
    decoder, separator = json.JSONDecoder(), re.compile(r"\s*[\[,]\s*")
    line, before, end = 1, 0, 0
    for count, record in enumerate(records, 1):
        match = separator.match(text, end)
        assert match is not None
        line += text.count("\n", before, match.end())
        before = match.end()
        _, end = decoder.raw_decode(text, before)
        place = _Place(str(file), line)
        yield place, _question(place, record, default_id=str(count))


def _table(file: Path, text: str) -> Iterator[tuple[_Place, Question]]:
    header = text.split("\n", 1)[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=";" if ";" in header else ",", strict=True)
    place = _Place(str(file), 1)
    try:
        columns = [c.strip() for c in next(rows)]
        if "request" not in columns:
            place.fail(f"the first line must name a column 'request' (and perhaps 'label'), not {header!r}.")
        line, count = rows.line_num + 1, 0
        for row in rows:
            place, line = _Place(str(file), line), rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(columns):
                place.fail(f"expected {len(columns)} fields as in the first line, found {len(row)}.")
            record = dict(zip(columns, (cell.strip() for cell in row), strict=True))
            label = record.get("label")
            if label not in (None, "0", "1"):
                place.fail(f"label must be 0 or 1, not {label!r}.")
            request = _string(place, record["request"], "request")
            count += 1
            yield place, Question(str(count), UNCATEGORIZED, (request,), list_type=label == "1" if label else None)
    except csv.Error as error:
        _Place(str(file), rows.line_num).fail(f"invalid CSV: {error}.")


def _parse(place: _Place, text: str) -> object:
    """The JSON value that starts at `place`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = place.line + error.lineno - 1
        _Place(place.file, line).fail(f"invalid JSON: {error.msg} (column {error.colno}).")
    except RecursionError:
        place.fail("invalid JSON: it is nested too deeply.")


def _question(place: _Place, record: object, *, default_id: str) -> Question:
    """One record of any of the JSON formats."""
    if not isinstance(record, dict):
        place.fail(f"expected a JSON object with a question, found {_kind(record)}.")
    turns = _turns(place, record)
    category = _first(record, "category", "Skill", "dataset")
    if category is not None and (not isinstance(category, str) or not category.strip()):
        place.fail(f"'category' must be a non-empty string, not {_kind(category)}.")
    reference = _references(place, record.get("reference"), len(turns))
    check = record.get("check", _SPEC_BENCH_CHECKS.get(category or "") if any(reference) else None)
    if check is not None and check not in get_args(Check):
        place.fail(f"'check' must be one of {', '.join(get_args(Check))} or null, not {check!r}.")
    if check is not None and not any(reference):
        place.fail(f"the check {check!r} needs a 'reference' to compare with.")
    if check == "numeric" and (bad := next((r for r in reference if r and not has_number(r)), None)) is not None:
        place.fail(f"the check 'numeric' needs a number in each reference, but there is none in {bad[:60]!r}.")
    list_type = record.get("list")
    if list_type is not None and not isinstance(list_type, bool):
        place.fail(f"'list' must be true, false or null, not {_kind(list_type)}.")
    identity = _first(record, "question_id", "uid", "idx")
    if identity is None:
        identity = default_id
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or identity == "":
        place.fail(f"the question id must be an integer or a non-empty string, not {_kind(identity)}.")
    return Question(str(identity), category or UNCATEGORIZED, turns, reference, cast("Check | None", check), list_type)


def _turns(place: _Place, record: Mapping[str, object]) -> tuple[str, ...]:
    if "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list):
            place.fail(f"'turns' must be a list of texts, not {_kind(turns)}.")
        if not turns:
            place.fail("'turns' is empty; a question needs at least one turn.")
        return tuple(_string(place, t.get("content") if isinstance(t, dict) else t, "a turn") for t in turns)
    for key in ("prompt", "instruction", "Instruction"):
        if key in record:
            text = _string(place, record[key], repr(key))
            more = record.get("input") or ""  # AlpacaEval: what the instruction is about, often empty
            return (f"{text}\n\n{_string(place, more, repr('input'))}" if more else text,)
    place.fail("there is no question; expected 'turns', 'prompt' or 'instruction'.")


def _references(place: _Place, value: object, turns: int) -> tuple[str, ...]:
    entries: list[object] = [] if value is None else value if isinstance(value, list) else [value]
    if turns == 1:  # Spec-Bench puts several good answers to its only turn into a list of their own
        entries = [e for entry in entries for e in (entry if isinstance(entry, list) else [entry])]
    elif len(entries) > turns:
        place.fail(f"'reference' has {len(entries)} entries, but there are only {turns} turns.")
    references: list[str] = []
    for entry in entries:
        if entry is not None and not isinstance(entry, str):
            place.fail(f"'reference' must be a list of texts, but holds {_kind(entry)}.")
        references.append(entry or "")
    return tuple(references)


def _string(place: _Place, value: object, what: str) -> str:
    if not isinstance(value, str):
        place.fail(f"{what} must be a text, not {_kind(value)}.")
    if not value.strip():
        place.fail(f"{what} is empty; a question needs some text.")
    if not is_text(value):
        place.fail(f"{what} contains half of a surrogate pair, which is not a character.")
    return value


def _first(record: Mapping[str, object], *keys: str) -> object:
    return next((record[k] for k in keys if record.get(k) is not None), None)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
