"""A run directory on disk: records appended one by one, so that a run killed at any moment loses at most one answer.

What `RecordWriter` promises: an appended record survives the process and the machine (flush and fsync before
`append` returns); no key is written twice, but for answers that failed, of which the later line counts; a line cut off
by a crash is dropped with a notice when the run resumes; a full disk costs the record being written and nothing before
it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from decoding.errors import RecordError
from decoding.report.header import SCHEMA, Resumption, RunHeader
from decoding.report.judgments import Judgment, read_judgments
from decoding.report.records import BASELINE, AnswerRecord, Key

if TYPE_CHECKING:
    import pandas
    import polars

    from decoding.report.frames import Rows

try:
    import fcntl
except ImportError:  # not on this operating system: two writers at once are then the user's to avoid
    fcntl = None  # type: ignore[assignment]

FILE = "records.jsonl"
"""Name of the records within a run directory."""

_BEGINNING = b'{"kind":"header"'  # of every records file, even one whose writer was killed in its first line


@dataclass(frozen=True)
class Run:
    """A run read back: its header and its answers in the order they were made; one that failed and was made again is
    where it first was.

    notices: what was wrong with the file but could be mended, one sentence each. resumed: when it went on after an
    interruption. judgments: of its answers, if a judge was asked.
    """

    header: RunHeader
    records: tuple[AnswerRecord, ...]
    name: str = ""
    notices: tuple[str, ...] = field(default=())
    resumed: tuple[Resumption, ...] = field(default=())
    judgments: tuple[Judgment, ...] = field(default=())

    @property
    def strategies(self) -> tuple[str, ...]:
        """Every strategy in order of appearance, plain decoding first."""
        names = dict.fromkeys(record.strategy for record in self.records)
        return tuple(sorted(names, key=lambda name: name != BASELINE))

    def __iter__(self) -> Iterator[AnswerRecord]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def to_pandas(self, rows: Rows = "answers") -> pandas.DataFrame:
        """A pandas data frame of answers, or of the steps in which they were made (see `decoding.report.frames`)."""
        from decoding.report.frames import to_pandas

        return to_pandas(self, rows)

    def to_polars(self, rows: Rows = "answers") -> polars.DataFrame:
        """A Polars data frame of answers, or of the steps in which they were made."""
        from decoding.report.frames import to_polars

        return to_polars(self, rows)

    def _repr_html_(self) -> str:
        """What a notebook shows: the table, and what to know before believing it."""
        from decoding.report.frames import to_html

        return to_html(self)


def read_run(directory: str | os.PathLike[str]) -> Run:
    """Read a run directory, or a records file.

    A damaged last line is left out with a notice. Raises RecordError if there are no records, if another line
    is damaged, if a key appears again after an answer that did not fail, or if the records follow a newer schema.
    """
    path = Path(directory)
    path = path / FILE if os.path.isdir(path) else path
    contents = _read(path)
    if contents.header is None:
        raise RecordError(f"{path} holds no complete header, so the run never started; start it again.")
    return Run(
        contents.header,
        tuple(contents.records),
        Path(os.path.abspath(path)).parent.name,
        contents.notices,
        contents.resumed,
        read_judgments(path.parent),
    )


def run_directory(path: Path) -> Path:
    """The directory of a run that is named by it or, as for `read_run`, by its records. Raises RecordError for another
    file, beside which nothing of a run can be kept."""
    if not path.is_file():
        return path
    if path.name != FILE:
        raise RecordError(f"{path} is a file that is not called {FILE}; name the directory of a run.")
    return path.parent


def is_records(path: Path) -> bool:
    """Whether a file has the name of a run's records, or begins like them. Raises OSError if it cannot be read."""
    if path.name == FILE or not path.is_file():
        return path.name == FILE
    with open(path, "rb") as file:
        return file.read(len(_BEGINNING)) == _BEGINNING


class RecordWriter:
    """Append answers to the records of a run; a context manager.

    directory: made if it does not exist.
    resume: continue the records found there, which must come from the same configuration. Without it, a
        directory that already holds records is refused.
    written: answers in the file, those that failed and were made again included.

    Raises RecordError if the records cannot be opened, belong to another configuration, follow another schema,
    are damaged before their last line, or are being written by another process.
    """

    def __init__(self, directory: str | os.PathLike[str], header: RunHeader, *, resume: bool = False) -> None:
        self.path = Path(directory) / FILE
        self.header = header
        self.notices: tuple[str, ...] = ()
        self.written = 0
        self._done: dict[Key, AnswerRecord] = {}
        with _explained(self.path, "opened"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not resume and self.path.exists() and _read(self.path).header is not None:
                raise RecordError(
                    f"{self.path} already holds records; resume that run, or choose another output directory."
                )
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            self._continue()
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> Mapping[Key, AnswerRecord]:
        """Every complete answer so far, by key; those found when resuming included. The others may be made again."""
        return self._done

    def append(self, record: AnswerRecord) -> None:
        """Write one record; when this returns, it is on disk.

        Raises RecordError if a complete answer of its key is already there or if it cannot be written; records written
        earlier stay as they were, and the writer can be used again once there is space.
        """
        if record.key in self._done:
            raise RecordError(f"the answer {record.key} is already recorded in {self.path}.")
        self._write_line(record.to_json())
        self.written += 1
        if not record.failed:
            self._done[record.key] = record

    def close(self) -> None:
        """Give the file back. Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecordError(f"{self.path} is being written by another process; wait until it has ended.") from None

    def _continue(self) -> None:
        """Take over what the file holds, cut off what is damaged at its end, and place the end of the file."""
        found = _read(self.path)
        with _explained(self.path, "mended"):
            os.ftruncate(self._file, found.sound_bytes)
        self._end = found.sound_bytes
        self.notices = found.notices
        if found.header is None:
            self._write_line(self.header.to_json())
            _sync_directory(self.path.parent)
            return
        if found.header.config_hash != self.header.config_hash:
            ours, theirs = self.header.config, found.header.config
            changed = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
            raise RecordError(
                f"{self.path} was made with another configuration (different: {', '.join(changed)}); resume with that "
                "one, or choose another output directory."
            )
        if found.header.schema != SCHEMA:
            raise RecordError(
                f"{self.path} follows schema {found.header.schema}, but this version writes {SCHEMA}; "
                "choose another output directory."
            )
        environment, self.header = self.header.environment, found.header
        self._done = {record.key: record for record in found.records if not record.failed}
        self.written = found.answers
        if found.unfinished_line:
            self._write(b"\n")
        self._write_line(Resumption.now(self.written, environment).to_json())

    def _write_line(self, data: Mapping[str, Any]) -> None:
        if self._file < 0:
            raise RecordError(f"the writer of {self.path} is closed.")
        self._write(_encode(data))

    def _write(self, line: bytes) -> None:
        try:
            os.lseek(self._file, self._end, os.SEEK_SET)
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            # What was written of this line must not stay: the next append would continue it.
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise RecordError(
                f"{self.path} could not be written ({_reason(error)}); the {self.written} answers before are safe: "
                "make space and resume the run."
            ) from error
        self._end += len(line)


@dataclass(frozen=True)
class _Contents:
    """A records file as found. answers: how many it holds, those that failed and were made again included.
    sound_bytes: length up to the last whole line."""

    header: RunHeader | None
    records: list[AnswerRecord]
    answers: int
    sound_bytes: int
    unfinished_line: bool
    notices: tuple[str, ...]
    resumed: tuple[Resumption, ...] = ()


def _read(path: Path) -> _Contents:
    header: RunHeader | None = None
    records: dict[Key, AnswerRecord] = {}
    resumed: list[Resumption] = []
    answers = sound = 0
    with _explained(path, "read"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        line = b""
        for number, line in enumerate(file, 1):
            try:
                data = json.loads(line)
            except ValueError:
                if header is None and not line.startswith(_BEGINNING[: len(line)]):
                    raise RecordError(f"{path}, line 1: not a header followed by answers.") from None
                if sound + len(line) < size:
                    raise RecordError(
                        f"{path}, line {number}: damaged, and not the last line; "
                        "remove that line to use the other records."
                    ) from None
                notice = f"{path}, line {number}: cut off in the middle, so it was dropped; that answer is made again."
                return _Contents(header, list(records.values()), answers, sound, False, (notice,), tuple(resumed))
            try:
                kind = data.get("kind") if isinstance(data, dict) else None
                if kind not in (("answer", "resumed") if header else ("header",)):
                    raise RecordError("not a header followed by answers.")
                if header is None:
                    header = RunHeader.from_json(data)
                elif kind == "resumed":
                    resumed.append(Resumption.from_json(data))
                else:
                    record = AnswerRecord.from_json(data)
                    before = records.get(record.key)
                    if before is not None and not before.failed:
                        raise RecordError(f"the answer {record.key} appears a second time.")
                    records[record.key] = record
                    answers += 1
            except RecordError as error:
                raise RecordError(f"{path}, line {number}: {error}") from None
            sound += len(line)
    unfinished = bool(line) and not line.endswith(b"\n")
    return _Contents(header, list(records.values()), answers, sound, unfinished, (), tuple(resumed))


def _encode(data: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair in a model's text: escaped, it can be written
        return (json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")) + "\n").encode()
    except ValueError as error:
        what = "the configuration" if data["kind"] == "header" else f"the answer {data.get('question_id')!r}"
        raise RecordError(f"{what} holds a number that is not finite.") from error


def write_text(path: Path, text: str) -> None:
    """Write a file that lies beside the records, whole or not at all. Raises RecordError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecordError(f"{path} could not be written ({_reason(error)}).") from error


@contextmanager
def _explained(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordError(f"{path} could not be {done} ({_reason(error)}).") from error


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _sync_directory(directory: Path) -> None:
    """Make the file's name as durable as its contents. Not every system can open a directory; then nothing is lost."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
