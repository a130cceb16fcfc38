"""Servers of other projects are started, waited for and stopped, whatever happens in between."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import pytest

from decoding.errors import ModelError
from experiments.served import free_port, model_folder, served

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
