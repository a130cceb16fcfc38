"""The scripts that check claims run and judge as they say; the table of results comes from their files alone."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import decoding
from decoding.errors import RecordError
from decoding.report.statistics import Interval, bootstrap
from experiments import index
from experiments.claims import above, acceptance_law, crossing, gap, interleaved, quantized_steps, sample, words
from tests.synthetic_run import SyntheticLatency
from tests.tiny import EOS, tiny_model, tiny_tokenizer

QUICK: dict[str, list[str]] = {
    "acceptance_law": ["--limit", "1", "--lengths", "1", "2", "--max-new-tokens", "8"],
    "acceptance_by_drafter": ["--limit", "1", "--drafters", "prompt-lookup", "--max-new-tokens", "4"],
    "block_against_token": ["--limit", "1", "--repeats", "1", "--max-new-tokens", "4", "--draft-length", "2"],
    "weights_quality": ["--limit", "1", "--max-new-tokens", "4"],
    "jacobi_iterations": ["--limit", "1", "--blocks", "3", "--max-new-tokens", "4"],
    "prefill_share": ["--prompts", "8", "40", "--rounds", "1", "--max-new-tokens", "8"],
    "quantized_steps": ["--tokens", "1", "32", "--prompt", "40", "--rounds", "1"],
    "skeleton_by_category": ["--limit", "1", "--max-new-tokens", "4", "--categories", "knowledge", "math"],
    "speculation_against_batch": ["--batches", "1", "2", "--rounds", "1", "--max-new-tokens", "4"],
}


@pytest.fixture
def tiny_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts load a tiny random model whatever they ask for, of which a step costs what nobody measured."""

    def load(name: str = "tiny", **options: Any) -> decoding.LocalBackend:
        model = tiny_model("llama", max_position_embeddings=4096)
        slots = options.get("slots", 8)
        return decoding.LocalBackend(model, tiny_tokenizer(), name=name, eos=[EOS], slots=slots, capacity=4096)

    monkeypatch.setattr(decoding, "load", load)
    monkeypatch.setattr(decoding.LocalBackend, "latency", SyntheticLatency())


def test_every_script_is_tried_here() -> None:
    found = {path.stem for path in (Path(index.__file__).parent / "claims").glob("*.py")} - {"__init__"}
    assert found == set(QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_a_script_prints_and_writes_its_finding(
    name: str, tiny_everywhere: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_module(f"experiments.claims.{name}").main([*QUICK[name], "--results", str(tmp_path)])
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["name"] == name
    assert result["verdict"] in ("holds", "does not hold", "cannot tell")
    assert result["figures"]
    assert result["environment"]["python"]
    printed = capsys.readouterr().out
    for line in (f"claim:    {result['claim']}", f"measured: {result['measured']}", f"verdict:  {result['verdict']}"):
        assert line in printed
    assert "nan" not in result["measured"]
    assert result["claim"] in index.table(tmp_path)


def test_a_verdict_needs_the_whole_interval_on_one_side() -> None:
    assert above(Interval(1.2, 1.1, 1.4)) == "holds"
    assert above(Interval(1.2, 0.9, 1.4)) == "cannot tell"
    assert above(Interval(0.8, 0.7, 0.9)) == "does not hold"
    assert above(Interval(5.0, float("nan"), float("nan"))) == "cannot tell"
    assert words(Interval(1.2, 1.1, 1.4)) == "1.20 (95 % interval 1.10 to 1.40)"
    assert words(Interval(1.2, float("nan"), float("nan"))) == "1.20"


def test_the_law_of_acceptance_is_met_by_independent_guesses_only() -> None:
    length, rng = 4, np.random.default_rng(0)
    independent = rng.random((40, 200, length)) < 0.6  # [questions, passes, guesses]
    all_or_none = np.repeat(rng.random((40, 200, 1)) < 0.6, length, axis=2)
    for guesses, verdict in ((independent, "holds"), (all_or_none, "does not hold")):
        right = np.cumprod(guesses, axis=2).sum(axis=2)
        columns = [np.full(40, 200), right.sum(1), np.minimum(right + 1, length).sum(1), (right + 1).sum(1)]
        ratio = bootstrap(acceptance_law.against_the_law(length), *columns)
        assert acceptance_law.judged({length: ratio}) == verdict
    assert acceptance_law.judged({1: Interval(1.0, 0.9, 1.1)}) == "cannot tell"
    assert acceptance_law.judged({1: Interval(1.0, float("nan"), float("nan"))}) == "cannot tell"


def test_quantization_is_judged_by_what_few_tokens_gain_beyond_many() -> None:
    few = Interval(2.0, 1.9, 2.1)
    assert quantized_steps.judged(few, [Interval(1.1, 1.0, 1.2)]) == "holds"
    assert quantized_steps.judged(few, [Interval(1.1, 1.0, 1.2), Interval(2.0, 1.8, 2.2)]) == "cannot tell"
    assert quantized_steps.judged(few, [Interval(3.0, 2.8, 3.2)]) == "does not hold"
    assert quantized_steps.judged(Interval(0.9, 0.8, 0.95), [Interval(0.5, 0.4, 0.6)]) == "does not hold"


def test_the_gap_of_two_groups_of_questions() -> None:
    first, second = [2.0, 2.2, 1.9, 2.1, 2.3, 2.0], [1.0, 1.1, 0.9, 1.2, 1.0]
    found = gap(first, second)
    assert found.estimate == pytest.approx(2.0833 - 1.04, abs=1e-3)
    assert 0.8 < found.low < found.estimate < found.high < 1.3
    assert above(gap(first, first), 0.0) == "cannot tell"
    assert above(gap(first, [1.0]), 0.0) == "cannot tell"


def test_the_crossing_lies_between_the_batches_around_it() -> None:
    assert crossing({1: 2.0, 4: 0.5}) == pytest.approx(2.0)
    assert crossing({1: 1.5, 2: 1.2, 4: 1.1}) is None
    assert crossing({1: 0.9, 2: 0.8}) is None


def test_ways_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert {way: len(found) for way, found in times.items()} == {"a": 2, "b": 2}


def test_a_sample_has_the_first_questions_of_every_category() -> None:
    questions = sample(2)
    counts: dict[str, int] = {}
    for question in questions:
        counts[question.category] = counts.get(question.category, 0) + 1
    assert set(counts.values()) == {2}
    assert {q.category for q in sample(1, ["math"])} == {"math"}


def finding(**changes: str) -> str:
    result: dict[str, Any] = {
        "claim": "a | b", "source": "nobody", "measured": "1.5 times", "verdict": "holds", "command": "python x",
        "environment": {"processor": "abacus", "threads": 1, "dtype": "beads"}, "model": "m",
    }  # fmt: skip
    return json.dumps(result | changes)


def test_the_table_of_results_is_made_from_the_files(tmp_path: Path) -> None:
    text = f"before\n{index.BEGIN}\nold\n{index.END}\nafter\n"
    assert "No script has been run" in index.rewritten(text, tmp_path)
    (tmp_path / "x.json").write_text(finding())
    (tmp_path / "figures.json").write_text('{"rows": []}')
    new = index.rewritten(text, tmp_path)
    assert "| a \\| b (nobody) | 1.5 times | **holds** | `python x` |" in new
    assert "Measured on: abacus, 1 threads, m in beads." in new
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "\nold\n" not in new
    assert index.rewritten(new, tmp_path) == new
    (tmp_path / "x.json").write_text(finding(measured="2 times"))
    assert "2 times" in index.rewritten(new, tmp_path)


def test_a_damaged_result_and_a_missing_mark_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="lacks the marks"):
        index.rewritten("no marks", tmp_path)
    for damage in ("{", '{"verdict": 3}'):
        (tmp_path / "x.json").write_text(damage)
        with pytest.raises(RecordError, match=r"x\.json is not a result"):
            index.table(tmp_path)


def test_the_readmes_table_is_up_to_date() -> None:
    text = (index.HERE / "README.md").read_text(encoding="utf-8")
    assert index.rewritten(text, index.HERE / "results") == text


def test_the_readme_names_every_script_and_none_that_does_not_exist() -> None:
    text = (index.HERE / "README.md").read_text(encoding="utf-8")
    scripts = {path.stem for folder in (index.HERE, index.HERE / "claims") for path in folder.glob("*.py")}
    scripts |= {path.parent.name for path in index.HERE.glob("*/__main__.py")}
    runs = {path.stem for path in index.HERE.glob("*.toml")}
    named = {name for row in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named <= scripts
    programs = {s for s in scripts if s != "index" and 'if __name__ == "__main__"' in source(s)}
    assert programs <= named, f"experiments/README.md does not name {sorted(programs - named)}"
    assert {name for name in runs if f"`{name}`" not in text} == set()


def source(script: str) -> str:
    places = (f"{script}.py", f"claims/{script}.py", f"{script}/__main__.py")
    return next(path for place in places if (path := index.HERE / place).exists()).read_text(encoding="utf-8")
