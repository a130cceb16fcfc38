"""Side-by-side runs of engines: the protocol between the script and a peer's process."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.peers import __main__ as peers

STUB = """
import sys
import time
sys.path.insert(0, {folder!r})
from worker import serve

def load(folder, gguf, mode):
    if mode == "broken":
        raise OSError("no such model")
    print("a library says something")
    def generate(texts, ids, tokens):
        if mode == "silent":
            time.sleep(60)
        if len(ids) > 2:
            raise ValueError("too many at once")
        return [tokens - (mode == "short")] * len(ids)
    return generate

serve(load)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "stub.py"
    script.write_text(STUB.format(folder=str(peers.SCRIPTS_FOLDER)))
    monkeypatch.setitem(peers.SCRIPTS, "stub", str(script))
    monkeypatch.setattr(peers, "OWN", ("stub",))
    return tmp_path


def asked(mode: str, folder: Path) -> peers.Peer:
    peer = peers.Peer(f"stub:{mode}")
    try:
        peer.start(folder, "model", "file.gguf")
        for count in (1, 3, 2):
            peer.ask(["text"] * count, [[1, 2]] * count, 5, record=True)
    finally:
        peer.stop()
    return peer


def test_a_peer_answers_and_what_it_cannot_do_is_noted(stub: Path) -> None:
    peer = asked("plain", stub)
    assert not peer.absent
    assert set(peer.rates) == {1, 2} and all(rate > 0 for rates in peer.rates.values() for rate in rates)
    assert peer.notes == {3: "ValueError: too many at once"}


def test_a_peer_that_makes_fewer_tokens_is_not_timed(stub: Path) -> None:
    peer = asked("short", stub)
    assert not peer.rates and "instead of 5" in peer.notes[1]


def test_a_peer_that_is_silent_is_given_up(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peers.Peer("stub:silent")
    try:
        peer.start(stub, "model", "file.gguf")
        monkeypatch.setattr(peers, "_PATIENCE", 0.2)
        peer.ask(["text"], [[1, 2]], 5, record=True)
        assert peer.notes == {1: "no answer within 0.2 seconds"} and not peer.rates
        assert peer.process is not None and peer.process.wait(5)
    finally:
        peer.stop()


def test_a_peer_that_cannot_load_is_absent_with_the_reason(stub: Path) -> None:
    assert asked("broken", stub).absent == "OSError: no such model"


def test_a_peer_that_cannot_be_installed_is_absent_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "stub" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'ERROR: no such package' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setitem(peers.INSTALL, "stub", (("install", "nothing"),))
    peer = peers.Peer("stub")
    peer.start(tmp_path, "model", "file.gguf")
    assert peer.absent == "cannot be installed: ERROR: no such package" and peer.process is None
