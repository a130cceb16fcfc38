"""Refinement films and fixed-point statistics: what was kept of every iteration, and how it is shown."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import decoding
from decoding.cli import main
from decoding.errors import CapabilityError, RecordError
from decoding.masked import Masking
from decoding.report.film import print_film, shoot, write_film
from decoding.report.fixed_point import branches, fixed_point, main_branch, stationary_places
from decoding.report.traces import trace_from_json, trace_to_json
from decoding.strategies.lookahead import lookahead_block
from decoding.trace import Frame, Step
from experiments.nar_quality import MODELS
from tests.chromium import Chromium, find_chromium
from tests.tiny import EOS, TURN, tiny_model, tiny_tokenizer

PARAMS = decoding.SamplingParams(max_new_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def lm() -> decoding.LocalBackend:
    model = tiny_model(max_position_embeddings=2048)
    return decoding.LocalBackend(model, tiny_tokenizer(), eos=[EOS], slots=4, capacity=2048)


def step(at: int, guesses: tuple[int, ...], gained: tuple[int, ...], prefill: bool = False) -> Step:
    frame = Frame(at, guesses, None, gained)
    return Step(0, 0, 0.0, 0.0, 0.0, 0.0, 1, 1, 1, len(guesses), 0, len(gained), prefill, frame=frame)


def test_statistics_of_a_trace_written_by_hand() -> None:
    """The answer is 1 2 3 4 5 6 7, the first block three guesses."""
    trace = [
        step(0, (), (1,), prefill=True),
        step(1, (9, 3, 8), (2,)),  # 3 stands still behind a wrong guess
        step(2, (3, 4), (3, 4, 5)),  # 8 became 4; the block of 2 3 4 5 is text
        step(5, (7,), (6,)),  # 7 is right for the next place, not for this one
        step(6, (7,), (7,)),  # the end
    ]
    found = fixed_point(trace)
    assert found.iterations == 4 and found.blocks == 2
    assert found.iterations_per_block == 2.0
    assert found.tokens_per_block == (4 + 2) / 2
    assert found.fixed_per_iteration == 6 / 4
    assert found.stationary_per_iteration == 1 / 4
    assert found.revised_per_iteration == 1 / 4
    assert fixed_point([]).iterations == 0


def test_stationary_guesses_are_right_ones_behind_a_wrong_one() -> None:
    assert stationary_places([1, 9, 3, 4], [1, 2, 3, 5]) == [False, False, True, False]
    assert stationary_places([1, 2], [1]) == [False, False]


def test_a_trees_branches_are_its_paths() -> None:
    assert branches(Frame(0, (1, 2, 3, 4), (-1, 0, 0, -1), ())) == [[1, 2], [1, 3], [4]]
    assert branches(Frame(0, (1, 2), None, ())) == [[1, 2]]
    assert branches(Frame(0, (), None, ())) == []


def test_the_main_branch_is_the_path_of_the_first_nodes() -> None:
    window, _ = lookahead_block([], [[1, 2, 3], [11, 12, 13]])
    assert main_branch(Frame(0, tuple(window.tokens), tuple(window.parents or ()), ())) == [1, 2, 3]
    assert main_branch(Frame(0, (1, 2, 3, 4), (-1, 0, 0, -1), ())) == [1, 2]
    assert main_branch(Frame(0, (1, 2), None, ())) == [1, 2]
    assert main_branch(Frame(0, (), (), ())) == []


def test_frames_are_kept_on_request_only_and_hold_the_answer(lm: decoding.LocalBackend) -> None:
    plain = decoding.generate("la la la", lm, strategy="jacobi(block_size=5)", params=PARAMS)
    assert all(s.frame is None for s in plain.trace)
    film = shoot("la la la", lm, strategy="jacobi(block_size=5)", params=PARAMS)
    frames = [s.frame for s in film.generation.trace if s.frame is not None]
    assert film.generation.tokens == plain.tokens == [token for frame in frames for token in frame.gained]
    assert [frame.at for frame in frames] == [sum(len(f.gained) for f in frames[:i]) for i in range(len(frames))]
    assert film.statistics.iterations == film.generation.metrics.forwards
    assert film.statistics.fixed_per_iteration == pytest.approx(film.generation.metrics.tokens_per_forward)
    assert not lm.engine.filming
    recorded = trace_from_json(trace_to_json(film.generation.trace))
    assert len(recorded) == len(film.generation.trace) and all(s.frame is None for s in recorded)


@pytest.mark.parametrize(
    "strategy", ["jacobi(block_size=6)", "lookahead(adaptive=false)", "skeleton", "autoregressive"]
)
def test_a_film_is_shown_in_the_terminal_and_as_a_page(
    lm: decoding.LocalBackend, tmp_path: Path, strategy: str
) -> None:
    film = shoot("la <b>la</b> la", lm, strategy=strategy, params=PARAMS)
    page = write_film(film, tmp_path / "film.html").read_text(encoding="utf-8")
    assert "<b>la" not in page and "&lt;b&gt;la" in page
    assert page.count("<li>") == sum(len(reel.iterations) for reel in film.reels) > 0
    assert not re.search(r"https?://", page), "the page loads something"
    shown = StringIO()
    print_film(film, Console(file=shown, width=200))
    assert "tokens fixed per iteration" in shown.getvalue()
    if strategy.startswith("jacobi"):
        states = {place.state for reel in film.reels for shot in reel.iterations for b in shot.branches for place in b}
        assert {"fixed", "wrong"} <= states
        assert any(place.changed for reel in film.reels for s in reel.iterations for b in s.branches for place in b)


@pytest.fixture(scope="module")
def filler() -> decoding.LocalBackend:
    """A masked model that has learnt something, so that a film shows more than noise."""
    return decoding.load(str(MODELS / "block-diffusion"), slots=4)


def test_masks_are_told_from_wrong_guesses_and_filling_them_from_revising(filler: decoding.LocalBackend) -> None:
    film = shoot("date 3 May 2028", filler, strategy="block-diffusion(policy=fixed(count=3))")
    blocks = [shot.branches[0] for shot in film.reels[0].iterations]
    masks = [sum(place.state == "open" for place in block) for block in blocks]
    assert masks[:4] == [7, 4, 1, 16], (
        "three places are filled in each time, to the end of a block of 16, and of the next"
    )
    assert film.statistics.revised_per_iteration == 0
    shown = StringIO()
    print_film(film, Console(file=shown, width=200))
    assert shown.getvalue().splitlines()[0].count("▒") == masks[0]
    doubting = "block-diffusion(policy=remask(base=fixed(count=8), share=0.5))"
    revised = shoot("date 3 May 2028", filler, strategy=doubting)
    assert revised.generation.metrics.revised > 0
    passes = revised.statistics.iterations
    assert revised.statistics.revised_per_iteration == pytest.approx(revised.generation.metrics.revised / passes)


def test_a_block_of_masks_is_what_becomes_text_together(filler: decoding.LocalBackend) -> None:
    params, three = PARAMS.but(max_new_tokens=40), "block-diffusion(policy=fixed(count=3))"
    found = shoot("date 3 May 2028", filler, strategy=three, params=params).statistics
    assert (found.iterations, found.blocks, found.tokens_per_block) == (19, 4, (7 + 16 + 16 + 1) / 4)
    assert found.iterations_per_block == 19 / 4
    masking = Masking(TURN, 0)  # the first pass sees the masks of the whole answer
    everywhere = decoding.LocalBackend(tiny_model(), tiny_tokenizer(), masking=masking, slots=1, capacity=128)
    two = "block-diffusion(policy=fixed(count=2), block_size=4)"
    found = shoot("hi", everywhere, strategy=two, params=params.but(max_new_tokens=20)).statistics
    assert (found.blocks, found.iterations_per_block, found.tokens_per_block) == (5, 2.0, 4.0)


BROWSER = find_chromium()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_page_fits_narrow_and_wide_windows(
    lm: decoding.LocalBackend, filler: decoding.LocalBackend, tmp_path: Path
) -> None:
    assert BROWSER is not None
    tree = shoot("la " * 30, lm, strategy="jacobi(block_size=12, candidates=3)", params=PARAMS)
    films = {"tree": tree, "masks": shoot("date 3 May 2028", filler, strategy="block-diffusion(policy=fixed)")}
    with Chromium(BROWSER) as browser:
        for name, film in films.items():
            page = write_film(film, tmp_path / f"{name}.html")
            for width in (400, 1600):
                browser.show(width=width)
                browser.open(page)
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
                narrowest = browser.evaluate(
                    "Math.min(...[...document.querySelectorAll('.branch')].map(b => b.getBoundingClientRect().width))"
                )
                assert narrowest > 0.6 * min(width, 1216), "the block has hardly any room"
            last = browser.evaluate("document.getElementById('shown').textContent")
            assert last == f"{len(film.reels[0].iterations)} of {len(film.reels[0].iterations)}"
            assert ("still masked" in browser.evaluate("document.body.textContent")) == (name == "masks")
        assert browser.errors == []


def test_what_cannot_be_filmed_or_written_is_said(lm: decoding.LocalBackend, tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="local model"):
        shoot("Hi", decoding.OpenAIBackend("http://127.0.0.1:1/v1", "none", "key"))
    with pytest.raises(RecordError, match="could not be written"):
        write_film(shoot("Hi", lm, params=PARAMS.but(max_new_tokens=2)), tmp_path / "no" / "film.html")


def test_the_command_prints_and_writes_a_film(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    page = tmp_path / "film.html"
    options = [
        "--model",
        str(tmp_path),
        "--device",
        "cpu",
        "--max-new-tokens",
        "8",
        "--slots",
        "2",
        "--capacity",
        "256",
    ]
    assert main(["film", "Hello", "--strategy", "jacobi(block_size=4)", "--output", str(page), *options]) == 0
    assert "iterations per block" in capsys.readouterr().out and page.stat().st_size > 1000
