"""The tutorials' code runs as it stands there, in the order in which it stands there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import decoding
from decoding import drafting
from decoding.cli import main
from decoding.strategies import REGISTRY as STRATEGIES
from tests.synthetic_run import SyntheticLatency
from tests.tiny import EOS, tiny_model, tiny_tokenizer

DOCS = Path(__file__).parent.parent / "docs"
TUTORIALS = sorted(path.name for path in DOCS.glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def names_stay_as_they_were() -> Iterator[None]:
    """What a tutorial registers is gone afterwards."""
    registries: tuple[dict[str, Any], ...] = (STRATEGIES, drafting.names())
    before = [dict(registry) for registry in registries]
    yield
    for registry, names in zip(registries, before, strict=True):
        registry.clear()
        registry.update(names)


@pytest.fixture
def tiny_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever is loaded is a tiny random model, and files go to an empty folder."""
    model = tiny_model("llama", max_position_embeddings=2048)

    def load(name: str = "tiny", **_: Any) -> decoding.LocalBackend:
        return decoding.LocalBackend(model, tiny_tokenizer(), name=name, eos=[EOS], slots=8, capacity=2048)

    monkeypatch.setattr(decoding, "load", load)
    monkeypatch.setattr("decoding.api.load", load)
    monkeypatch.setattr(decoding.LocalBackend, "latency", SyntheticLatency())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", TUTORIALS)
def test_the_code_of_a_tutorial_runs(name: str, tiny_everywhere: None) -> None:
    text = (DOCS / name).read_text(encoding="utf-8")
    blocks = FENCE.findall(text)
    assert len(blocks) >= 4
    assert 2 * len(blocks) == len(re.findall("^```", text, re.MULTILINE))  # none escapes the pattern
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, name, "exec", dont_inherit=True), namespace)
            continue
        assert language == "sh"
        for line in code.splitlines():
            command, *options = shlex.split(line)
            assert command == "decoding"
            assert main(options) == 0, line


def test_every_tutorial_is_in_the_documentation() -> None:
    included = re.findall(r"^\.\. include:: (.+)$", (DOCS / "tutorials.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(included) == TUTORIALS
    for name in TUTORIALS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (DOCS / name).read_text(encoding="utf-8")):
            assert (DOCS / target).exists(), f"{name} links to {target}"


def test_the_documentation_builds_from_the_docstrings(tmp_path: Path) -> None:
    pdoc = pytest.importorskip("pdoc")
    pdoc.pdoc(DOCS / "tutorials.py", "decoding.types", "decoding.drafting", output_directory=tmp_path)
    tutorials = (tmp_path / "tutorials.html").read_text(encoding="utf-8")
    for title in ("Add a drafter", "Add a decoder", "Run on your model", "Read the report"):
        assert title in tutorials
    assert "SamplingParams" in (tmp_path / "decoding" / "types.html").read_text(encoding="utf-8")
