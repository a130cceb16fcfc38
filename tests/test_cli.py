"""The command line, on a tiny model saved to a folder."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from decoding import catalogue, drafting
from decoding.cli import command_line, main
from decoding.config import RunConfig, read_run_file
from decoding.errors import RecordError
from decoding.options import LoadOptions, Schedule
from decoding.report import RecordWriter, Run, read_run, summarize, write_report
from decoding.strategies import REGISTRY, adapter
from decoding.strategies.adapter import CARD, CONFIG
from decoding.strategies.policies import REGISTRY as POLICIES
from drafters.heads import fitting
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = [
    {"question_id": "one", "category": "generic", "turns": ["Name some colours."]},
    {"question_id": "two", "category": "math", "turns": ["What is 3 + 4?"], "reference": ["7"], "check": "numeric"},
    {"question_id": "three", "category": "writing", "turns": ["Write a line.", "Now another one."]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return path


def common(model: str) -> list[str]:
    return ["--model", model, "--device", "cpu", "--max-new-tokens", "16", "--slots", "8", "--capacity", "2048"]


def test_generate_prints_the_answer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Hello", "--strategy", "jacobi(block_size=4)", "--metrics", *common(model)]) == 0
    out = capsys.readouterr()
    assert out.out.strip() and "tokens_per_forward" in out.err


@pytest.mark.parametrize("streams", ["1", "3"])
def test_compare_records_every_answer_and_writes_the_report(
    model: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], streams: str
) -> None:
    strategies = ["autoregressive", "speculative", "jacobi", "skeleton"]
    arguments = [str(questions), "--strategies", *strategies, "--streams", streams, "--repeats", "2"]
    output = tmp_path / "run"
    assert main(["compare", *arguments, "--output", str(output), *common(model)]) == 0
    run = read_run(output)
    assert len(run.records) == len(QUESTIONS) * len(strategies) * 2
    assert len({record.key for record in run.records}) == len(run.records)
    summary = summarize(run)
    for name in strategies[1:3]:
        comparison = summary.row(name).comparison
        assert comparison is not None and comparison.identical == comparison.compared == 6
    assert all(record.error is None for record in run.records)
    assert [len(r.pieces) for r in run.records] == [len(r.tokens) for r in run.records]
    printed = capsys.readouterr().out
    assert "report.html" in printed and (output / "report.html").stat().st_size > 10_000
    assert main(["report", str(output)]) == 0
    assert main(["report", str(output), str(output)]) == 0


def test_a_run_may_be_named_by_its_records_which_no_page_replaces(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RecordWriter(tmp_path, run.header) as writer:
        for record in run.records[:8]:
            writer.append(record)
    before = writer.path.read_bytes()
    assert main(["report", str(writer.path)]) == 0
    assert (tmp_path / "report.html").exists() and writer.path.read_bytes() == before
    copy = tmp_path / "kept.jsonl"
    copy.write_bytes(before)
    for command in ("report", "assess"):
        capsys.readouterr()
        assert main([command, str(copy)]) == 2
        assert "name the directory of a run" in capsys.readouterr().err
    for path in (writer.path, copy, tmp_path / "new" / "records.jsonl"):
        with pytest.raises(RecordError, match="give the page another name"):
            write_report(run, path)
    assert writer.path.read_bytes() == copy.read_bytes() == before


def test_a_run_that_was_cut_short_goes_on_where_it_stopped(model: str, questions: Path, tmp_path: Path) -> None:
    arguments = ["compare", str(questions), "--strategies", "autoregressive", "jacobi", *common(model)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*arguments, "--output", str(whole)]) == 0
    lines = (whole / "records.jsonl").read_text().splitlines(keepends=True)
    cut.mkdir()
    (cut / "records.jsonl").write_text("".join(lines[:4]) + lines[4][:50])  # killed while writing a line
    assert main([*arguments, "--resume", str(cut)]) == 0
    ours, theirs = ({r.key: (r.tokens, r.text) for r in read_run(d).records} for d in (cut, whole))
    assert ours == theirs


def test_a_run_file_sets_what_the_command_line_does_not(model: str, questions: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f"""
        questions = "{questions.name}"
        strategies = ["autoregressive", "jacobi"]
        limit = 2
        model = '{model}'
        [params]
        max_new_tokens = 12
        ignore_eos = true
        [load]
        device = "cpu"
        capacity = 2048
        """
    )
    output = tmp_path / "run"
    assert main(["compare", "--config", str(file), "--limit", "1", "--seed", "5", "--output", str(output)]) == 0
    run = read_run(output)
    assert [(r.question_id, r.strategy, len(r.tokens)) for r in run] == [
        ("one", "autoregressive", 12),
        ("one", "jacobi", 12),
    ]
    written = read_run_file(output / "config.toml")
    assert (written.limit, written.params.seed, written.params.ignore_eos) == (1, 5, True)
    assert RunConfig.of_header(run.header.config) == written


def test_a_run_resumes_as_it_was_configured_without_being_told_again(
    model: str, questions: Path, tmp_path: Path
) -> None:
    whole = ["compare", str(questions), "--strategies", "autoregressive", "jacobi", "--seed", "7", *common(model)]
    output = tmp_path / "run"
    assert main([*whole, "--output", str(output)]) == 0
    path = output / "records.jsonl"
    expected = {r.key: r.tokens for r in read_run(output)}
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    assert main(["compare", "--resume", str(path)]) == 0
    assert {r.key: r.tokens for r in read_run(output)} == expected
    assert main(["compare", "--resume", str(output), "--seed", "8"]) == 2


def test_a_run_whose_stop_was_masked_goes_on_once_it_is_given_again(
    model: str, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop, output = ["--stop", "password: x", "--stop", "zz"], tmp_path / "run"
    whole = ["compare", str(questions), "--strategies", "autoregressive", *stop, *common(model)]
    assert main([*whole, "--output", str(output)]) == 0
    assert main(["compare", "--resume", str(output)]) == 2
    assert "give --stop again" in capsys.readouterr().err
    assert main(["compare", "--resume", str(output), *stop]) == 0
    assert main(["compare", "--resume", str(output), "--stop", "zz"]) == 2
    assert "different: params" in capsys.readouterr().err


def test_the_command_line_has_every_option_of_a_run_file_with_its_default() -> None:
    parsed = command_line([]).parse_args(["compare"])
    assert RunConfig.of_flat(vars(parsed)) == RunConfig()
    for options in (LoadOptions, Schedule):
        assert {item.name for item in fields(options)} <= set(vars(parsed))
    given = ["--warm-up", "3", "--cool-down", "1.5", "--no-prefill", "--trust-remote-code", "--prices", "1", "2", "3"]
    config = RunConfig.of_flat(vars(command_line([]).parse_args(["compare", *given, "--top-k", "4"])))
    assert config.schedule == Schedule(warm_up=3, cool_down=1.5)
    assert config.load == LoadOptions(prefill=False, trust_remote_code=True, prices=(1.0, 2.0, 3.0))
    assert config.params.top_k == 4


def test_a_race_without_a_terminal_prints_a_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    strategies = ["autoregressive", "jacobi(block_size=4)"]
    assert main(["race", "Hello", "--strategies", *strategies, *common(model)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    rows = [line.split()[0] for line in out.splitlines() if line.startswith(("autoregressive", "jacobi"))]
    assert sorted(rows) == strategies


def test_brackets_in_names_are_text_and_no_markup(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    named, asked, run = tmp_path / "[model]", tmp_path / "questions.jsonl", tmp_path / "[run]"
    shutil.copytree(model, named)
    asked.write_text(json.dumps({**QUESTIONS[0], "question_id": "[/id]", "category": "[/category]"}) + "\n")
    strategies = ["--strategies", "autoregressive", "skeleton(length='[/strategy]')"]
    assert main(["compare", str(asked), *strategies, "--output", str(run), *common(str(named))]) == 0
    assert main(["report", str(run), str(run)]) == 0
    assert main(["assess", str(run)]) == 0
    assert main(["race", "Hello", "--strategies", *reversed(strategies[1:]), *common(str(named))]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("length='[/strategy]'", "speed-up in [run]"))
    assert main(["generate", "Hello", "--model", "[/model]"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "Hi", "--strategy", "speculativ"], "did you mean 'speculative'"),
        (["generate", "Hi", "--strategy", "speculative(drafter=lookup)"], "prompt-lookup"),
        (["generate", "Hi", "--temperature", "-1"], "temperature"),
        (["generate", ""], "empty"),
        (["generate", "word " * 5000], "shorten"),
        (["generate", "a\udcff"], "UTF-8"),
        (["generate", "Hi", "--model", "m" * 600], "unknown model"),
        (["generate", "Hi", "--model", "~no-such-user/m"], "~no-such-user/m"),
        (["generate", "Hi", "--strategy", f"jacobi(adapter={'a' * 600})"], "unknown adapter"),
        (["compare", "Which of v1.5? " * 40], "does not exist"),
        (["compare", "w" * 600], "unknown question suite"),
        (["compare", "--config", "w" * 600], "unknown run file"),
        (["report", "w" * 600], "could not be read"),
        (["calibrate", "--plot", "/no/such/cost.svg"], "/no/such"),
        (["generate", "Hi", "--capacity", "8"], "capacity must be at least 16"),
        (["generate", "Hi", "--slots", "0"], "slots must be at least 1"),
        (["generate", "Hi", "--strategy", "jacobi(adapter=no-such)"], "unknown adapter 'no-such'"),
        (["generate", "Hi", "--strategy", "block-diffusion(policy=confidence(threshold=2))"], "from 0 to 1, not 2"),
        (["generate", "Hi", "--strategy", "mask-predict"], "use a masked checkpoint"),
        (["generate", "Hi", "--model", "smollm2-135"], "did you mean 'smollm2-135m'"),
        (["generate", "Hi", "--model", "/no/such/folder"], "/no/such/folder"),
        (["generate", "Hi", "--max-new-tokens", "many"], "invalid int value"),
        (["generate", "Hi", "--concurrency", "4"], "concurrency is about a server"),
        (["generate", "Hi", "--weights", "int8", "--base-url", "http://127.0.0.1:9/v1"], "is about a local model"),
        (["compare", "no-such-suite"], "no-such-suite"),
        (["compare", "default", "--limit", "0"], "limit"),
        (["compare", "default", "--categories", "maths"], "did you mean 'math'"),
        (["compare", "--strategies", "jacobi", "jacobi"], "listed twice"),
        (["compare", "--repeats", "0"], "repeats"),
        (["compare", "--config", "quik"], "did you mean 'quick'"),
        (["compare", "--config", "/no/such/run.toml"], "/no/such/run.toml"),
        (["compare", "--config", "quick", "--resume", "x"], "leave --output and --config out"),
        (["compare", "--resume", "/no/such/run"], "/no/such/run"),
        (["compare", "--cool-down", "-1"], "cool_down"),
        (["race", "Hi", "--speed", "0"], "speed"),
        (["report", "/no/such/run"], "/no/such/run"),
        (["frobnicate"], "invalid choice"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--model" not in arguments and arguments[0] in ("generate", "compare"):
        arguments = [*arguments, "--model", model, "--device", "cpu"]
    try:
        code: object = main(arguments)
    except SystemExit as exit:
        code = exit.code
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err


def test_what_is_not_utf_8_on_standard_input_is_said_so(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8", errors=errors))
        assert main(["generate", "-", *common(model)]) == 2
        err = capsys.readouterr().err.lower()
        assert "utf-8" in err and "traceback" not in err


def test_a_character_that_the_terminal_lacks_costs_no_answer(model: str, tmp_path: Path) -> None:
    asked, run = tmp_path / "questions.txt", tmp_path / "run"
    asked.write_text("Hello\n")
    strategies = ["--strategies", "autoregressive", "jacobi"]  # a dash stands where there is nothing to compare
    assert main(["compare", str(asked), *strategies, "--output", str(run), *common(model)]) == 0
    command = [sys.executable, "-m", "decoding", "report", str(run)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "autoregressive" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("experiments.spec_bench", ["--drafters", "nosuch", "--output", "runs/none"], "unknown drafter or strategy"),
        ("drafters.training.eagle", ["--draft-vocab", "0"], "draft_vocab and steps must be at least 1"),
        ("drafters.training.medusa", ["--heads", "0"], "heads and draft_vocab must be at least 1"),
        ("drafters.training.measure", ["eagle3", "--head", "nowhere", "--limit", "1"], "holds no trained head"),
    ],
)
def test_scripts_say_what_is_wrong_as_commands_do(
    module: str,
    arguments: list[str],
    says: str,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--model", model, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and says in error and "Traceback" not in error


def test_a_malformed_question_file_is_named_with_its_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(QUESTIONS[0]) + "\n{not json\n")
    assert main(["compare", str(path), *common(model)]) == 2
    assert "bad.jsonl, line 2" in capsys.readouterr().err


def test_help_lists_strategies_drafters_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["compare", "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    for name in ("autoregressive", "jacobi", "skeleton", "speculative", "prompt-lookup", "draft-model", "smollm2-135m"):
        assert name in out


def test_help_says_of_everything_what_it_says_of_itself() -> None:
    def shipped(registry: Mapping[str, Any]) -> dict[str, str]:
        packages = ("decoding.", "drafters.")
        return {name: found.summary for name, found in registry.items() if found.__module__.startswith(packages)}

    assert dict(catalogue.strategies()) == shipped(REGISTRY)
    assert dict(catalogue.drafters()) == shipped(drafting.names())
    assert dict(catalogue.policies()) == shipped(POLICIES)


@pytest.mark.parametrize("arguments", [["--help"], ["race", "--help"], ["compare", "--streams", "x"]])
def test_whoever_asks_for_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = f"""
        import sys
        from decoding.cli import main
        try:
            main({arguments})
        finally:
            print("heavy:", *sorted({{"torch", "transformers", "scipy"}} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.endswith("heavy:\n") and ("usage" in done.stdout or "error" in done.stderr), done


def test_models_lists_what_can_be_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 6, "base_model_name_or_path": "tiny-1"}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / CARD).write_text(json.dumps({"training": {"block_size": 12}}))
    monkeypatch.setattr(adapter, "shipped_adapters", lambda: {"mine": tmp_path})
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m" in out
    assert re.search(r"jacobi\(adapter=mine\) +LoRA of rank 6 for tiny-1, trained with blocks of 12", out)
    for head in fitting.shipped_heads():
        assert re.search(rf"{head.kind} .*for {head.model} \(hidden size {head.sizes.hidden}, .*{head.folder}", out)
    monkeypatch.setattr(adapter, "shipped_adapters", dict)
    assert main(["models"]) == 0 and "LoRA of" not in capsys.readouterr().out
