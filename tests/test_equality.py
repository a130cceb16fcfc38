"""The check of everything exact on a real model: it finds what differs, and goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import decoding
from decoding.backends.local import LocalBackend
from decoding.errors import RecordError
from experiments import equality
from experiments.equality import Part, Record, Tally
from tests.tiny import EOS, tiny_model, tiny_tokenizer


@pytest.fixture
def lm() -> LocalBackend:
    model = tiny_model(max_position_embeddings=2048)
    return LocalBackend(model, tiny_tokenizer(), name="tiny", eos=[EOS], slots=8, capacity=256)


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> int:
    arguments = ["--limit", "9", "--max-new-tokens", "6", "--output", str(folder), "--results", str(folder / "results")]
    strategies = ["--strategies", "jacobi(block_size=4)", "lookahead(adaptive=false)"]
    monkeypatch.setattr(sys, "argv", ["equality", *arguments, *strategies, *more])
    return equality.main()


def test_parts_that_are_done_are_not_done_again(
    lm: LocalBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoding, "load", lambda *_, **__: lm)
    result = tmp_path / "results" / "equality.json"
    assert call(monkeypatch, tmp_path, "--minutes", "0") == 0
    assert "7 of 8 parts are left" in capsys.readouterr().out and not result.exists()
    assert call(monkeypatch, tmp_path) == 0
    lines = (tmp_path / "parts.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 + 8  # what was asked, two groups plainly, two strategies x two ways x two groups
    found = json.loads(result.read_text())
    assert found["verdict"] == "holds"
    for ways in found["figures"].values():
        assert ways["alone"]["tokens"] == ways["batch"]["tokens"] == 9 * 5
    with pytest.raises(RecordError, match="answers to something else"):
        call(monkeypatch, tmp_path, "--limit", "3")
    with pytest.raises(SystemExit, match="nothing to compare"):
        call(monkeypatch, tmp_path, "--strategies", "skeleton")


def test_another_token_is_noticed(lm: LocalBackend, tmp_path: Path) -> None:
    prompt = [5, 6, 7, 8]
    answer = decoding.generate(
        prompt, lm, strategy="jacobi(block_size=4)", params=decoding.SamplingParams(max_new_tokens=6)
    )
    tally = Tally()
    tally.add(lm, prompt, answer.tokens, answer)
    assert (tally.differing, tally.ties, tally.tokens) == (0, 0, 5)
    for wrong in ([*answer.tokens[:3], (answer.tokens[3] + 1) % 256, *answer.tokens[4:]], answer.tokens[:-1]):
        tally.add(lm, prompt, wrong, answer)
    assert (tally.differing, tally.ties) == (2, 0)
    record = Record(tmp_path / "parts.jsonl", {"limit": 1})
    record.done(Part("a", True, 0), tally)
    again = Record(tmp_path / "parts.jsonl", {"limit": 1})
    assert again.total("a", True) == tally and again.total("a", False) == Tally()
