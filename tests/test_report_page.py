"""The text of the page: complete without scripts, loading nothing, safe from what a run says."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

from decoding.backends.text import token_pieces
from decoding.report import Run, Summary, write_report
from decoding.report.definitions import DEFINITIONS
from decoding.report.statistics import Interval
from decoding.report.table import columns
from decoding.report.winrates import Judged, WinRate
from tests.made_runs import HOSTILE, hostile_run
from tests.tiny import EOS, tiny_tokenizer


def scripts(page: str) -> dict[str, str]:
    """The contents of the page's JSON script tags by id, as a browser would split them."""
    return dict(re.findall(r'<script type="application/json" id="(\w+)">(.*?)</script>', page, re.DOTALL))


def test_the_page_loads_nothing(run: Run, summary: Summary, tmp_path: Path) -> None:
    page = write_report(run, tmp_path, summary=summary).read_text()
    assert write_report(run, tmp_path, summary=summary) == tmp_path / "report.html"
    outside = [
        name for name in re.findall(r"""(?:src|href|action)=["']([^"'#]*)""", page) if name not in ("", "data:,")
    ]
    assert outside == []
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket", page)
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_only_the_pages_own_script_may_run(run: Run, summary: Summary, tmp_path: Path) -> None:
    page = write_report(run, tmp_path, summary=summary).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in page or f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_no_text_of_a_run_can_leave_its_place(tmp_path: Path) -> None:
    run = hostile_run()
    page = write_report(run, tmp_path / "r.html").read_text()
    assert page.count("<script") == 2 + 3  # the figures' data, one for each question, and the page's own
    assert page.count("<!--") == 0
    assert "<script>alert" not in page
    found = scripts(page)
    assert json.loads(found["q0"])["question"] == HOSTILE
    assert json.loads(found["q0"])["answers"][0]["text"] == HOSTILE
    assert html.escape(HOSTILE, quote=False).split("\u2028")[0][:20] in page


def test_half_a_surrogate_pair_does_not_stop_the_page(run: Run, tmp_path: Path) -> None:
    record = replace(run.records[0], text="a\ud83d", pieces=["a\ud83d"])
    assert write_report(replace(run, records=(record,)), tmp_path).exists()


def test_the_page_is_complete_without_scripts(run: Run, summary: Summary, tmp_path: Path) -> None:
    page = write_report(run, tmp_path, summary=summary).read_text()
    body = re.sub(r"<wbr>", "", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    for row in summary.strategies:
        assert row.strategy in body
        for column in columns(summary):
            assert column.cell(row).partition(" [")[0] in body
    for key, definition in DEFINITIONS.items():
        shown = html.escape(definition.formula, quote=False) in body.replace("&#39;", "'")
        assert shown == (not key.startswith("net_win_rate") and key != "revised")  # nobody judged, nothing taken back
    assert run.header.config_hash in body


def test_verdicts_of_judges_have_their_place(run: Run, summary: Summary, tmp_path: Path) -> None:
    nothing = Interval(0.25, math.nan, math.nan)
    strict, lenient = WinRate(4, 3, 1, Interval(0.375, 0.1, 0.6)), WinRate(5, 1, 2, nothing)
    verdict = Judged("a <judge>", 0, lenient, strict, nothing, agreement=0.75, first=0.5, longer=1.31, categories={})
    rows = tuple(replace(row, judged=() if row.baseline else (verdict,)) for row in summary.strategies)
    body = write_report(run, tmp_path, summary=replace(summary, strategies=rows)).read_text().replace("&#39;", "'")
    assert body.count("a &lt;judge&gt;") == len(rows) - 1
    assert "+0.38 [+0.10, +0.60]" in body
    assert "<td>1.31</td>" in body
    for key in ("net_win_rate", "net_win_rate_lenient", "net_win_rate_length"):
        assert html.escape(DEFINITIONS[key].formula, quote=False) in body


def test_the_pieces_of_an_answer_join_to_its_text() -> None:
    tokenizer = tiny_tokenizer()  # a token per byte
    text = "día ☂ 雨!"
    tokens = [*tokenizer(text)["input_ids"], EOS]
    pieces = token_pieces(tokenizer, tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text
    assert pieces[:4] == ["d", "", "í", "a"]
    assert token_pieces(tokenizer, tokens[:2]) == ["d", "\N{REPLACEMENT CHARACTER}"]
