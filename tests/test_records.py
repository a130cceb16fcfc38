"""Records: nothing is lost, doubled or leaked, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from decoding.errors import RecordError
from decoding.report.environment import environment
from decoding.report.header import SCHEMA, RunHeader, config_hash
from decoding.report.records import AnswerRecord
from decoding.report.redaction import MASK, Json, mask, mask_text
from decoding.report.runfile import FILE, RecordWriter, Run, read_run
from decoding.report.traces import trace_from_json
from decoding.trace import Metrics, Step, measure
from decoding.types import Generation
from tests.synthetic_run import synthetic_run

CONFIG: dict[str, Json] = {"model": "m", "params": {"temperature": 0.0, "max_new_tokens": 64}}
ENVIRONMENT = environment()


@pytest.fixture(scope="module")
def run() -> Run:
    """Eight questions under four strategies, as they come back from a file."""
    made = synthetic_run(8, tokens=(10, 30))
    return replace(made, records=tuple(AnswerRecord.from_json(record.to_json()) for record in made.records))


def header(**changes: Json) -> RunHeader:
    return RunHeader.create({**CONFIG, **changes}, ENVIRONMENT)


def write(directory: Path, records: tuple[AnswerRecord, ...]) -> Path:
    with RecordWriter(directory, header()) as writer:
        for record in records:
            writer.append(record)
    return directory / FILE


# What goes in comes out


def test_a_run_reads_back_as_it_was_written(tmp_path: Path, run: Run) -> None:
    write(tmp_path / "deep" / "run", run.records)
    found = read_run(tmp_path / "deep" / "run")
    assert found.records == run.records
    assert found.header.config == CONFIG
    assert found.header.schema == SCHEMA
    assert found.notices == ()
    assert found.name == "run"
    assert found.strategies[0] == "autoregressive"
    assert read_run(tmp_path / "deep" / "run" / FILE).records == run.records


def test_times_survive_to_a_tenth_of_a_microsecond() -> None:
    made = synthetic_run(1)
    for before in made.records:
        after = AnswerRecord.from_json(json.loads(json.dumps(before.to_json())))
        assert len(after.trace) == len(before.trace)
        for old, new in zip(before.trace, after.trace, strict=True):
            assert abs(old.forward - new.forward) <= 1e-7
            assert replace(old, start=0, plan=0, forward=0, commit=0) == replace(
                new, start=0, plan=0, forward=0, commit=0
            )


def test_metrics_follow_from_the_stored_trace(run: Run) -> None:
    for record in run.records:
        again = measure(record.trace, seconds=record.metrics.seconds, prompt_tokens=record.metrics.prompt_tokens)
        assert again.new_tokens == record.metrics.new_tokens
        assert again.forwards == record.metrics.forwards
        assert again.forward_seconds == pytest.approx(record.metrics.forward_seconds, abs=1e-4)


def test_half_a_surrogate_pair_and_line_separators_in_a_text_survive(tmp_path: Path, run: Run) -> None:
    record = replace(run.records[0], text="a\ud83d b\u2028c\nd\r\ne \u00fc\u4e2d")
    write(tmp_path, (record, run.records[1]))
    assert read_run(tmp_path).records == (record, run.records[1])


def test_a_generation_becomes_a_record_with_its_parts() -> None:
    def step(sequence: int) -> Step:
        return Step(0, sequence, 0.0, 0.1, 0.2, 0.1, 1, 1, 1, 0, 0, 1, False)

    part = Generation("one", [1, 2], "eos", Metrics(new_tokens=2), [step(7), step(7), step(9)])
    whole = Generation("1. one", [1, 2], "eos", Metrics(seconds=2.0), [step(7)], parts={"point 1": part})
    record = AnswerRecord.of(
        whole,
        question_id="q",
        category="c",
        question="why?",
        strategy="skeleton",
        pieces=lambda tokens: [f"<{token}>" for token in tokens],
    )
    assert record.pieces == ["<1>", "<2>"]
    assert record.parts["point 1"].sequences == [7, 9]
    assert record.parts["point 1"].pieces == ["<1>", "<2>"]
    assert AnswerRecord.from_json(record.to_json()) == replace(record, trace=tuple(record.trace))


def test_an_unknown_field_is_no_obstacle(run: Run) -> None:
    data = {**run.records[0].to_json(), "invented": 1}
    assert AnswerRecord.from_json(data) == run.records[0]


# Interrupted at any moment


def test_a_file_cut_at_any_byte_resumes_to_the_same_run(tmp_path: Path, run: Run) -> None:
    path = write(tmp_path, run.records)
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    ends = [i + 1 for i in range(len(whole)) if whole[i : i + 1] == b"\n"]
    near_the_ends = [end + shift for end in ends[:3] for shift in (-2, -1, 0, 1)]
    for cut in [0, 1, start // 2, start, *near_the_ends, *random.Random(0).sample(range(len(whole)), 12)]:
        path.write_bytes(whole[:cut])
        with RecordWriter(tmp_path, header(), resume=True) as writer:
            complete = sum(end - 1 <= cut for end in ends) - 1  # the line feed itself may be missing
            assert len(writer.done) == max(0, complete)
            assert bool(writer.notices) == (cut not in (0, *ends, *(end - 1 for end in ends)))
            for record in run.records:
                if record.key not in writer.done:
                    writer.append(record)
        found = read_run(tmp_path)
        assert found.records == run.records, f"cut at byte {cut}"
        assert found.notices == ()


def test_a_damaged_last_line_is_left_out_of_a_report_with_a_notice(tmp_path: Path, run: Run) -> None:
    path = write(tmp_path, run.records)
    path.write_bytes(path.read_bytes()[:-40])
    found = read_run(tmp_path)
    assert found.records == run.records[:-1]
    assert len(found.notices) == 1
    assert f"line {len(run.records) + 1}" in found.notices[0]


def test_killed_at_random_moments_a_run_ends_with_every_record_once(tmp_path: Path, run: Run) -> None:
    wait = random.Random(1)
    kills = 0
    same = header()

    def go_on(pause: float) -> None:
        with RecordWriter(tmp_path, same, resume=True) as writer:
            for record in run.records:
                if record.key not in writer.done:
                    writer.append(record)
                    time.sleep(pause)

    for _ in range(200):
        child = os.fork()
        if child == 0:  # writes like a run does, and never returns into the test
            try:
                go_on(0.002)
            finally:
                os._exit(0)
        time.sleep(wait.uniform(0.001, 0.06))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            kills += 1
        else:
            break
    assert kills >= 3
    go_on(0)  # a busy machine may have left something over
    assert read_run(tmp_path).records == run.records


def test_a_record_is_on_disk_when_append_returns(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        fsync(handle)
        synced.append(os.fstat(handle).st_size)

    monkeypatch.setattr(os, "fsync", noted)
    with RecordWriter(tmp_path, header()) as writer:
        writer.append(run.records[0])
        assert synced[-1] == (tmp_path / FILE).stat().st_size


def test_a_full_disk_costs_one_record_and_none_before(tmp_path: Path, run: Run) -> None:
    with RecordWriter(tmp_path, header()) as writer:
        writer.append(run.records[0])
        size = writer.path.stat().st_size
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, old[1]))  # part of a line fits
        try:
            with pytest.raises(RecordError, match="1 answers before are safe"):
                writer.append(run.records[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, ignored)
        assert writer.path.stat().st_size == size
        assert read_run(tmp_path).records == run.records[:1]
        writer.append(run.records[1])  # there is space again
    assert read_run(tmp_path).records == run.records[:2]


# Refused, in one sentence


def test_a_key_is_written_once(tmp_path: Path, run: Run) -> None:
    with RecordWriter(tmp_path, header()) as writer:
        writer.append(run.records[0])
        with pytest.raises(RecordError, match="already recorded"):
            writer.append(run.records[0])
    assert len(read_run(tmp_path).records) == 1


def test_an_answer_that_failed_is_replaced_by_the_one_made_again(tmp_path: Path, run: Run) -> None:
    first, second = run.records[:2]
    again = replace(first, finish_reason="error", text="and again")
    with RecordWriter(tmp_path, header()) as writer:
        for record in (replace(first, error="no."), second, again):
            writer.append(record)
            assert (first.key in writer.done) is False
    assert read_run(tmp_path).records == (again, second)
    with RecordWriter(tmp_path, header(), resume=True) as writer:
        assert list(writer.done) == [second.key] and writer.written == 3
        writer.append(first)
        with pytest.raises(RecordError, match="already recorded"):
            writer.append(again)
    assert read_run(tmp_path).records == (first, second)
    path = tmp_path / FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))  # a failed one after the one that counts
    with pytest.raises(RecordError, match="appears a second time"):
        read_run(tmp_path)


def test_a_directory_with_records_is_not_overwritten(tmp_path: Path, run: Run) -> None:
    path = write(tmp_path, run.records)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="already holds records"):
        RecordWriter(tmp_path, header())
    assert path.read_bytes() == before


def test_another_configuration_is_not_continued(tmp_path: Path, run: Run) -> None:
    path = write(tmp_path, run.records)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="another configuration"):
        RecordWriter(tmp_path, header(model="other"), resume=True)
    assert path.read_bytes() == before


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, header()), pytest.raises(RecordError, match="another process"):
        RecordWriter(tmp_path, header(), resume=True)
    RecordWriter(tmp_path, header(), resume=True).close()


def test_a_closed_writer_says_so(tmp_path: Path, run: Run) -> None:
    with RecordWriter(tmp_path, header()) as writer:
        pass
    with pytest.raises(RecordError, match="closed"):
        writer.append(run.records[0])


def test_a_newer_schema_is_neither_read_nor_continued(tmp_path: Path, run: Run) -> None:
    path = write(tmp_path, run.records)
    path.write_bytes(path.read_bytes().replace(b'"schema":2', b'"schema":3', 1))
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"schema 3.*up to 2"):
        read_run(tmp_path)
    with pytest.raises(RecordError, match="schema 3"):
        RecordWriter(tmp_path, header(), resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines[:2], b"{broken\n", *lines[2:]], "line 3: damaged, and not the last"),
        (lambda lines: [*lines, lines[3]], "appears a second time"),
        (lambda lines: lines[1:], "line 1: not a header"),
        (lambda lines: [lines[0], *lines], "line 2: not a header"),
        (lambda lines: [*lines[:2], b"[1]\n", *lines[2:]], "line 3: not a header"),
        (lambda lines: [lines[0], lines[1].replace(b'"tokens":[', b'"tokens":["x",'), *lines[2:]], "line 2.*'tokens'"),
        (lambda lines: [lines[0], lines[1].replace(b'"text":', b'"txt":'), *lines[2:]], "line 2.*'text' is missing"),
        (
            lambda lines: [lines[0], lines[1].replace(b'"repeat":0', b'"repeat":true'), *lines[2:]],
            "'repeat' must be int",
        ),
        (
            lambda lines: [lines[0], lines[1].replace(b'"eos"', b'"tired"'), *lines[2:]],
            "'finish_reason' must be one of",
        ),
        (lambda lines: [], "holds no complete header"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path: Path, run: Run, change: object, message: str) -> None:
    path = write(tmp_path, run.records)
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))  # type: ignore[operator]
    with pytest.raises(RecordError, match=message):
        read_run(tmp_path)


def test_a_missing_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="nowhere"):
        read_run(tmp_path / "nowhere")


def test_a_number_that_is_not_finite_is_refused_and_leaves_no_trace(tmp_path: Path, run: Run) -> None:
    with pytest.raises(RecordError, match="the configuration holds a number that is not finite"):
        RecordWriter(tmp_path, header(threshold=float("inf")))
    with RecordWriter(tmp_path, header()) as writer:
        with pytest.raises(RecordError, match="not finite"):
            writer.append(replace(run.records[0], quality={"judge": float("nan")}))
        writer.append(run.records[0])
    assert read_run(tmp_path).records == run.records[:1]


def test_a_trace_must_be_a_table() -> None:
    with pytest.raises(RecordError, match="one length"):
        trace_from_json({"step": [0, 1], "sequence": [0]})
    with pytest.raises(RecordError, match=r"lacks the columns.*forward"):
        trace_from_json({"step": [0, 1], "sequence": [0, 0]})
    assert trace_from_json({}) == ()


# Credentials stay out


@pytest.mark.parametrize(
    "secret",
    [
        {"api_key": "abcd-1234"},
        {"apiKey": "abcd-1234"},
        {"OPENAI_API_KEY": "abcd-1234"},
        {"ENV_API_KEY": "abcd-1234"},
        {"api_key_env": "sk-proj-abcd-1234567890"},
        {"backend": {"hf_token": "abcd-1234"}},
        {"headers": {"Authorization": "Basic abcd-1234"}},
        {"credentials": ["u", "abcd-1234"]},
        {"argv": ["compare", "--api-key", "abcd-1234"]},
        {"argv": ["compare", "--api-key=abcd-1234"]},
        {"argv": "compare --model m --api-key=abcd-1234 --repeat 2"},
        {"strategy": "openai(model=m, api_key=abcd-1234)"},
        {"url": "https://user:abcd-1234@example.org/v1"},
        {"url": "https://example.org/v1?api_key=abcd-1234&x=1"},
        {"note": "sent Bearer abcd-1234abcd-1234 to it"},
        {"note": "the key is sk-proj-abcd-1234567890"},
    ],
)
def test_credentials_never_reach_the_file(tmp_path: Path, secret: dict[str, Json]) -> None:
    with RecordWriter(tmp_path, header(**secret)) as writer:
        content = writer.path.read_text()
    assert "abcd-1234" not in content
    assert MASK in content
    assert read_run(tmp_path).header.config_hash == config_hash({**CONFIG, **secret})


def test_what_is_no_credential_stays_readable() -> None:
    plain: dict[str, Json] = {
        "max_new_tokens": 64,
        "tokenizer": "byte-level",
        "eos_token": "</s>",
        "sort_key": "category",
        "api_key": "",
        "api_key_env": "MY_KEY",
        "text": "Basic principles of token economics: the key is 3 words. Bearer of news.",
        "url": "https://example.org:8000/v1",
        "stop": ["--", "key"],
        "empty": None,
        "flag": True,
    }
    assert mask(plain) == plain


def test_an_error_message_that_quotes_a_key_is_masked() -> None:
    failed = Generation("", [], "error", Metrics(), error="401: Incorrect API key provided: sk-abcdefgh12345678.")
    record = AnswerRecord.of(failed, question_id=1, category="c", question="q", strategy="s")
    assert "sk-abc" not in str(record.to_json())
    assert record.failed
    assert mask_text("nothing here") == "nothing here"


def test_the_hash_names_the_configuration_and_not_its_notation() -> None:
    assert config_hash({"a": 1, "b": {"c": 2}}) == config_hash({"b": {"c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert config_hash({"api_key": "x"}) == config_hash({"api_key": "y"})
    assert config_hash({"api_key_env": "X"}) == config_hash({"api_key_env": "Y"}) == config_hash({"api_key_env": MASK})
    assert config_hash({"api_key_env": "X"}) != config_hash({"api_key_env": None})
    assert config_hash({"bias": {7: 1.0}}) == config_hash({"bias": {"7": 1.0}})  # type: ignore[dict-item]


def test_the_environment_names_what_can_change_a_result() -> None:
    found = environment(device="cpu", dtype="float32")
    assert found.python.count(".") == 2
    assert found.cores >= 1
    assert found.threads >= 1
    assert "numpy" in found.versions
    assert found.device == "cpu"
    assert "definitely-not-installed" not in environment(packages=["definitely-not-installed"]).versions
