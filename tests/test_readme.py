"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import decoding
from decoding import drafting
from decoding.strategies import REGISTRY as STRATEGIES
from tests.tiny import EOS, tiny_model, tiny_tokenizer

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_python_blocks_run(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", max_position_embeddings=2048)
    lm = decoding.LocalBackend(model, tiny_tokenizer(), name="tiny", eos=[EOS], slots=8, capacity=2048)
    monkeypatch.setattr(decoding, "load", lambda *_: lm)
    registered = drafting.names()  # the shipped ones too: importing them is what registers them, and happens once
    strategies, drafters = dict(STRATEGIES), dict(registered)
    try:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    finally:
        for registry, before in ((STRATEGIES, strategies), (registered, drafters)):
            registry.clear()
            registry.update(before)  # type: ignore[arg-type]


def test_the_drafter_in_the_readme_takes_less_than_fifty_lines() -> None:
    (block,) = [block for block in BLOCKS if "(Drafter)" in block]
    assert len(block.splitlines()) < 50
