"""The key to a server is shown nowhere."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import decoding
from decoding import InvalidRequest, OpenAIBackend
from tests.fault_server import KEY, FaultServer, backend


@pytest.mark.parametrize("key", ["sk-one two", "sk-\nabcdef", "sk-schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        OpenAIBackend("http://127.0.0.1/v1", "tiny", key)
    assert key[3:] not in str(error.value)


def test_a_key_from_a_file_may_end_with_a_line_end(server: FaultServer) -> None:
    lm = OpenAIBackend(server.url, "tiny", KEY + "\n")
    assert decoding.generate("One?", lm).error is None and server.headers == [f"Bearer {KEY}"]


def test_the_key_is_shown_nowhere(server: FaultServer, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    server.script = lambda number, body: "401"  # with the key in its message
    lm = backend(server)
    out = decoding.generate("One?", lm)
    assert out.error is not None and "401" in out.error
    for text in (repr(lm), str(lm), lm.name, repr(out), caplog.text, str(lm.usage)):
        assert KEY not in text


def test_a_page_as_error_message_is_cut_after_the_key_was_masked(server: FaultServer) -> None:
    lm = backend(server)
    for before in range(260, 310):
        assert KEY[:8] not in lm._presentable("x" * before + " " + KEY)
    assert len(lm._presentable("word " * 1000)) < 310
