"""Run files: what they hold reaches the run, and what they should not hold is named with file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from decoding.comparison import Comparison
from decoding.config import RunConfig, read_run_file, run_files
from decoding.errors import InvalidRequest, UnknownName
from decoding.options import LoadOptions, Schedule
from decoding.report import Environment, RunHeader
from decoding.types import SamplingParams

FULL = RunConfig(
    questions="long",
    limit=3,
    categories=("long-qa",),
    strategies=("autoregressive", "skeleton(inner=speculative(drafter=prompt-lookup))"),
    model="some/model",
    params=SamplingParams(temperature=0.5, logit_bias={7: -1.5}, stop=('"a\\\n', "é\x7f"), ignore_eos=True, seed=9),
    schedule=Schedule(repeats=2, streams=3, warm_up=0, cool_down=1.5),
    load=LoadOptions(device="cpu", dtype="float32", slots=8, capacity=512),
)


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("config", [RunConfig(), FULL], ids=["default", "full"])
def test_a_configuration_survives_every_form_it_is_written_in(tmp_path: Path, config: RunConfig) -> None:
    assert read_run_file(write(tmp_path, config.to_toml())) == config
    assert RunConfig.of_header(config.to_json() | {"question_ids": ["1"]}) == config
    assert RunConfig.of_flat(config.flat() | {"verbose": True}) == config


def test_what_a_file_leaves_out_is_the_default(tmp_path: Path) -> None:
    config = read_run_file(write(tmp_path, "limit = 5\n[params]\ntemperature = 1\n"))
    assert config == RunConfig(limit=5, params=SamplingParams(temperature=1.0))
    assert isinstance(config.params.temperature, float)
    assert read_run_file(write(tmp_path, "")) == RunConfig()


def test_questions_are_looked_for_beside_the_run_file(tmp_path: Path) -> None:
    questions = write(tmp_path, "Why?\n", "mine.txt")
    assert read_run_file(write(tmp_path, 'questions = "mine.txt"')).questions == str(questions)
    assert read_run_file(write(tmp_path, 'questions = "default"')).questions == "default"
    assert read_run_file(write(tmp_path, 'questions = "elsewhere.txt"')).questions == "elsewhere.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit = 'x'", "limit must be a whole number, not the text 'x'"),
        ("limit = 1.5", "limit must be a whole number, not 1.5"),
        ("limit = true", "limit must be a whole number, not true"),
        ("strategies = 'jacobi'", "strategies must be a list of texts, not the text 'jacobi'"),
        ("strategies = ['jacobi', 3]", "strategies must be text in quotes, not 3"),
        ("strategies = ['jacobbi']", "unknown strategy 'jacobbi'; did you mean 'jacobi'"),
        ("strategies = ['jacobi(size=3)']", "unknown option of jacobi 'size'"),
        ("stratgies = []", "'stratgies'; did you mean 'strategies'"),
        ("params = 3", "params must be a table, not 3"),
        ("[params]\ntemprature = 1", r"\[params\]: 'temprature'; did you mean 'temperature'"),
        ("[params]\ntemperature = 'hot'", "params.temperature must be a number, not the text 'hot'"),
        ("[params]\ntemperature = -1", "temperature must be 0"),
        ("[params]\nignore_eos = 1", "params.ignore_eos must be true or false, not 1"),
        ("[params]\nlogit_bias = {a = 1}", "the keys of params.logit_bias must be token ids, not 'a'"),
        ("[schedule]\nrepeats = 0", "repeats must be at least 1, not 0"),
        ("[schedule]\ncool_down = nan", "cool_down must be seconds"),
        ("[load]\ndtype = 32", "load.dtype must be text in quotes, not 32"),
        ("[load]\nprices = 'free'", "load.prices must be a list of numbers, not the text 'free'"),
        ("[load]\nprices = [1, 'two', 3]", "load.prices must be a number, not the text 'two'"),
        ("[load]\nprices = [1, 2]", "prices are three, .* not 2"),
        ("[load]\nprices = [1, nan, 1]", "prices must be numbers, 0 or more, not nan"),
        ("[load]\nprices = [1, inf, 1]", "prices must be numbers, 0 or more, not inf"),
        ("[load]\nprices = [1, 1, -1]", "prices must be numbers, 0 or more, not -1"),
        ("[load]\nslots = 0", "slots must be at least 1, not 0"),
        ("categories = [1]", "categories must be text in quotes, not 1"),
        ("limit =", "not valid TOML"),
        pytest.param("limit = " + "[" * 5000 + "]" * 5000, "nested too deeply", id="deep"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        read_run_file(write(tmp_path, text))
    assert "run.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_unknown_name_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nowhere.toml' cannot be read: No such file"):
        read_run_file(tmp_path / "nowhere.toml")
    with pytest.raises(UnknownName, match="unknown run file 'quik'; did you mean 'quick'"):
        read_run_file("quik")
    (tmp_path / "run.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidRequest, match=r"run.toml: not valid TOML"):
        read_run_file(tmp_path / "run.toml")


def test_what_is_masked_where_it_is_written_is_asked_for_again(tmp_path: Path) -> None:
    server = LoadOptions(base_url="http://127.0.0.1:1/v1", api_key_env="sk-or-perhaps-the-key-itself")
    config = RunConfig(load=server, params=SamplingParams(stop=("password: x",)))
    assert "perhaps" not in config.to_toml()
    header = RunHeader.create(config.to_json(), Environment())
    for found in (read_run_file(write(tmp_path, config.to_toml())), RunConfig.of_header(header.config)):
        with pytest.raises(InvalidRequest, match="give --stop again"):
            RunConfig.of_flat(found.flat())
        with pytest.raises(InvalidRequest, match="give --api-key-env again"):
            RunConfig.of_flat(found.flat() | {"stop": []})
        assert RunConfig.of_flat(found.flat() | {"stop": ["password: x"], "api_key_env": server.api_key_env}) == config


def test_every_shipped_run_file_makes_a_comparison_with_a_baseline() -> None:
    assert {"quick", "speculative", "refinement", "skeleton", "long"} <= set(run_files())
    for name in run_files():
        comparison = Comparison.of(read_run_file(name))
        assert len(comparison.questions) >= 12, name
        assert str(comparison.strategies[0]) == "autoregressive", name
