"""Servers of other projects are started, waited for and stopped, whatever happens in between."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from decoding.errors import ModelError
from decoding.report import AnswerRecord, RecordWriter, RunHeader, environment
from decoding.trace import Metrics
from experiments.serve_vllm import VARIANTS, cores, rows, show
from experiments.served import Asked, compared, free_port, model_folder, served

SERVER = """
import os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(os.environ["GREETING"].encode())
print("serving", flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_runs_as_long_as_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    port, log = free_port(), tmp_path / "run" / "server.log"
    command = [sys.executable, "-c", SERVER, str(port)]

    def use() -> None:
        with served(command, port, log=log, settings={"GREETING": "hello"}, patience=20) as url:
            assert url == f"http://127.0.0.1:{port}/v1"
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                raise KeyError(answer.read().decode())

    with pytest.raises(KeyError, match="hello"):
        use()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
    assert "serving" in log.read_text()


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(ModelError, match=r"ended with 1(?s:.*)no such model"),
        served(command, free_port(), log=tmp_path / "server.log", settings={}),
    ):
        pass


def test_models_are_folders_or_aliases(tmp_path: Path) -> None:
    assert model_folder(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(ModelError, match="neither"):
        model_folder("no-such-model")


def test_waits_are_bounded(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(60)"]
    began = time.monotonic()
    with (
        pytest.raises(ModelError, match=r"did not answer within 1 s(?s:.*)loading"),
        served(command, free_port(), log=tmp_path / "server.log", settings={}, patience=1),
    ):
        pass
    asked = Asked("default", limit=1, max_new_tokens=8, strategies=["autoregressive"], patience=0.2)
    with pytest.raises(ModelError, match="not done within 0 s"):
        compared("http://127.0.0.1:9/v1", "m", tmp_path / "run", asked)
    assert time.monotonic() - began < 30  # and neither was waited for any longer


def test_a_variant_that_was_cut_short_counts_as_far_as_it_came(tmp_path: Path) -> None:
    assert rows("cache", tmp_path / "never") == []
    with RecordWriter(tmp_path / "cache", RunHeader.create({"model": "m"}, environment())) as writer:
        for number, (strategy, error) in enumerate(
            [("autoregressive", None), ("autoregressive", "gone"), ("jacobi", "no")]
        ):
            metrics = Metrics(seconds=2.0, new_tokens=30, prompt_tokens=40, reused_tokens=10)
            writer.append(AnswerRecord(number, "generic", "?", strategy, 0, "!", [], "eos", metrics, error=error))
    found = rows("cache", tmp_path / "cache")
    assert [(row.strategy, row.answers, row.seconds, row.tokens, row.cached) for row in found] == [
        ("autoregressive", 1, 2.0, 30, 0.25)
    ]
    show(found, tmp_path)
    assert json.loads((tmp_path / "vllm.json").read_text())[0]["variant"] == "cache" in VARIANTS


def test_cores_are_those_that_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, text in (({0, 1}, "0-1"), ({3}, "3-3"), ({0, 2, 5}, "0,2,5")):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, free=free: free, raising=False)
        assert cores() == text
