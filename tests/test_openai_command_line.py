"""Commands that ask a server instead of a local model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from decoding.cli import main
from decoding.report import read_run, summarize
from tests.fault_server import KEY, FaultServer


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    turns = [["How do I grow tomatoes?"], ["Name a river.", "And one more."]]
    path.write_text(
        "".join(
            json.dumps({"question_id": n, "category": "generic", "turns": turn}) + "\n" for n, turn in enumerate(turns)
        )
    )
    return path


def test_the_command_line_asks_a_server(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    options = ["--base-url", server.url, "--model", "served", "--api-key-env", "MY_KEY"]
    assert main(["generate", "Name a river.", *options]) == 0
    assert capsys.readouterr().out == "You asked: Name a river.\n"
    assert server.bodies[0]["model"] == "served" and server.headers == [f"Bearer {KEY}"]
    assert main(["generate", "Name a river.", "--strategy", "jacobi", *options]) == 2
    assert "local model" in capsys.readouterr().err
    assert main(["generate", "Name a river.", *options, "--dtype", "float32"]) == 2
    assert "dtype" in capsys.readouterr().err
    monkeypatch.delenv("MY_KEY")
    assert main(["generate", "Name a river.", *options]) == 2
    assert "api-key-env" in capsys.readouterr().err.replace("_", "-")
    assert len(server.bodies) == 1


def test_a_run_goes_on_with_the_key_it_had(
    server: FaultServer, questions: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("OTHER_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "somebody-elses")
    output = tmp_path / "run"
    options = ["--base-url", server.url, "--model", "served", "--api-key-env", "MY_KEY", "--strategies", "skeleton"]
    assert main(["compare", str(questions), *options, "--output", str(output)]) == 0
    records = output / "records.jsonl"
    whole = records.read_bytes()
    assert KEY not in (output / "config.toml").read_text() and KEY.encode() not in whole

    def cut(header: bytes) -> None:
        records.write_bytes(header + whole.splitlines(keepends=True)[1])

    cut(header := whole.splitlines(keepends=True)[0])
    assert main(["compare", "--resume", str(output)]) == 0
    cut(header)
    assert main(["compare", "--resume", str(output), "--api-key-env", "OTHER_KEY"]) == 0
    config = ["--config", str(output / "config.toml")]
    assert main(["compare", *config, "--output", str(tmp_path / "again")]) == 0
    cut(header.replace(b'"MY_KEY"', b'"[masked]"'))
    asked = len(server.headers)
    capsys.readouterr()
    assert main(["compare", "--resume", str(output)]) == 2
    assert "give --api-key-env again" in capsys.readouterr().err and len(server.headers) == asked
    assert main(["compare", "--resume", str(output), "--api-key-env", "MY_KEY"]) == 0
    assert len(read_run(output)) == 2 and set(server.headers) == {f"Bearer {KEY}"}


def test_a_run_without_an_answer_fails_and_can_be_made_again(
    server: FaultServer, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    options = ["--base-url", server.url, "--model", "served", "--strategies", "autoregressive", "skeleton"]
    server.script = lambda number, body: "401"
    assert main(["compare", str(questions), *options, "--output", str(output)]) == 2
    shown = capsys.readouterr()
    assert "error: autoregressive, skeleton gave no complete answer" in shown.err and "401" in shown.out
    assert (output / "report.html").exists() and all(record.failed for record in read_run(output))
    server.script = lambda number, body: "ok"
    assert main(["compare", "--resume", str(output)]) == 0
    assert len(read_run(output)) == 4 and not any(record.failed for record in read_run(output))
    for command in (["report", str(output), "--export", str(tmp_path / "x.csv")], ["assess", str(output)]):
        assert main(command) == 0
    assert len((tmp_path / "x.csv").read_text().splitlines()) >= 5 and "401" not in (tmp_path / "x.csv").read_text()


def test_a_comparison_on_a_server(server: FaultServer, questions: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.continues = False
    server.script = lambda number, body: "401" if "And one more." in str(body) else "ok"
    output = tmp_path / "run"
    arguments = ["compare", str(questions), "--strategies", "autoregressive", "skeleton", "--streams", "2"]
    assert main([*arguments, "--output", str(output), "--base-url", server.url, "--model", "served"]) == 0
    records = {(r.question_id, r.strategy): r for r in read_run(output).records}
    assert len(records) == 4
    assert records["0", "autoregressive"].error is None and records["0", "skeleton"].metrics.new_tokens > 0
    failed = records["1", "autoregressive"]
    assert failed.error is not None and "401" in failed.error and "Name a river." in failed.text
    assert failed.metrics.new_tokens > 0
    comparison = summarize(read_run(output)).row("skeleton").comparison
    assert comparison is not None and (comparison.compared, comparison.identical) == (1, 0)  # told by their texts
    for file in output.iterdir():
        assert KEY not in file.read_text(errors="replace")
