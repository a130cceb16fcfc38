"""Skeleton-of-Thought: outline the answer, then write all points of the outline at the same time.

Ning et al. 2024, "Skeleton-of-Thought: Prompting LLMs for Efficient Parallel Generation" (the router is its SoT-R);
points that need others, as in Jin et al. 2025, "Plato: Plan to Efficiently Decode for Large Language Model Inference".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import prompts
from decoding.backends.base import Backend, OnText
from decoding.errors import InvalidRequest
from decoding.strategies.autoregressive import Autoregressive
from decoding.strategies.base import Strategy, TokenStrategy, parse
from decoding.strategies.router import EXAMPLE, Always, Router, as_router
from decoding.strategies.skeleton_answer import STYLES, SkeletonAnswer
from decoding.textform import is_count
from decoding.types import Generation, Message, Prompt, SamplingParams

_FEWEST = 3
"""Points that are asked for at least, however little room there is."""
_ROOM = 40
"""Tokens that a point should have: below that it is hardly a sentence or two, and fewer points say more."""
_SENTENCE = 20
"""Tokens of a short sentence."""
_LENGTHS = ("one sentence", "one or two sentences", "two or three sentences", "three or four sentences")
"""What to ask for where a point has room for 1, 2, 3, 4 sentences."""


@dataclass(frozen=True)
class SkeletonOfThought(Strategy):
    """Two stages: an outline, then one sequence per point, all in one batch.

    inner: the token-level strategy of both stages; outline, expand: of one of them, instead of `inner`.
    pipeline: begin to write a point as soon as its line of the outline is complete; if not, when the whole outline
    is. The texts are the same, since a point is shown no more of the outline than stands before it.
    router: whether a question wants an outline at all: "always", "prompt", "classifier" or a function from the
    question's text to a bool; see `decoding.strategies.router`. Others are answered by `inner` alone.
    dependencies: ask which points build on which. A point that needs others is written after them, with their texts
    in its prompt; all the points whose needs are met are written at the same time. A point can need earlier ones
    only, which breaks every cycle: of two points that need each other, the one that comes first goes ahead.

    steer: on local models, give the outline's numbers instead of having them written, and end a title that has become a
    sentence.
    max_points: how many are asked for at most; points beyond these are left out. outline_tokens: limit of the outline.
    point_tokens: limit of each point; several ("96, 48") are for the first, the second … point, the last of them for
    all further ones. A request's `max_new_tokens` bounds the points together: fewer are asked for where they would have
    less than 40 tokens each, and their limits shrink in proportion if they could still exceed it together.
    length: how much to ask for ("about 40 words"); "" asks for as many sentences as a point's limit has room for.
    at_once: how many points are written at the same time; 0 takes as many as raise the tokens per second, by what a
    step costs on this backend (`backend.latency`). The texts are the same, only their order in time is not.
    repetition_penalty: for requests that set none, on local models only (servers have no common field for it);
    without it a small model writes the same point over and over.
    prompt: the templates, a name under `prompts/`; "" takes the ones for small models below a billion parameters.
    templates: a folder whose templates go before the shipped ones.

    An outline of fewer than two points means that the question does not want a list: it is then answered by `inner`
    alone. The answer's `parts` hold all that was generated: "router" (what it chose), "outline", "point 1" …, or
    "answer" for a plain one, each with the prompt tokens that were computed (`metrics.prefill_tokens`) and those that
    were taken over from another part (`metrics.reused_tokens`). A point that fails keeps what it has, the others are
    complete, and `error` names it.
    """

    inner: Strategy | str = Autoregressive()
    outline: Strategy | str | None = None
    expand: Strategy | str | None = None
    pipeline: bool = True
    router: Router | str | Callable[[str], bool] = Always()
    dependencies: bool = False
    steer: bool = True
    max_points: int = 8
    outline_tokens: int = 96
    point_tokens: int | str | Sequence[int] = 96
    length: str = ""
    at_once: int = 0
    repetition_penalty: float = 1.1
    prompt: str = ""
    templates: str | None = None

    name: ClassVar[str] = "skeleton"
    summary: ClassVar[str] = "an outline first, then all its points in parallel; another answer than plain decoding's"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    def __post_init__(self) -> None:
        router = as_router(self.router)
        object.__setattr__(self, "router", router)
        needs = router.needs
        for stage in ("inner", "outline", "expand"):
            value = getattr(self, stage)
            value = parse(value) if isinstance(value, str) else value
            if value is None and stage != "inner":
                continue
            if not isinstance(value, TokenStrategy):
                raise InvalidRequest(f"{stage} must be a token-level strategy, which {value} is not.")
            object.__setattr__(self, stage, value)
            needs |= value.needs
        object.__setattr__(self, "needs", needs)  # a backend that cannot run the parts cannot run the whole
        for option in ("pipeline", "dependencies", "steer"):
            if not isinstance(value := getattr(self, option), bool):
                raise InvalidRequest(f"{option} must be true or false, not {value!r}.")
        for option, least in (("max_points", 2), ("outline_tokens", 1), ("at_once", 0)):
            value = getattr(self, option)
            if not is_count(value, least):
                raise InvalidRequest(f"{option} must be an integer of at least {least}, not {value!r}.")
        limits = _limits(self.point_tokens)
        object.__setattr__(self, "point_tokens", limits[0] if len(limits) == 1 else ", ".join(map(str, limits)))
        self._try_templates()

    def _try_templates(self) -> None:
        """A template that does not exist or does not work is an error now, not in every answer."""
        assert isinstance(self.router, Router)
        self.router.try_templates(self.templates)
        parents = [{"index": 1, "title": "?", "text": "?"}]
        point: dict[str, object] = {"outline": "1. ?", "index": 2, "title": "?", "parents": parents}
        for style in [self.prompt] if self.prompt else STYLES:
            for can_prefill in (True, False):
                asked = self.asked("?", EXAMPLE, SamplingParams().max_new_tokens, can_prefill=can_prefill)
                prompts.render(f"{style}/outline", folder=self.templates, **asked)
                prompts.render(f"{style}/expand", folder=self.templates, **asked | point)

    @property
    def lossless(self) -> bool:
        return False

    async def answer(
        self, prompt: Prompt, params: SamplingParams, backend: Backend, on_text: OnText | None = None
    ) -> Generation:
        return await SkeletonAnswer(self, prompt, params, backend, on_text).write()

    def stage(self, name: str) -> TokenStrategy:
        """The strategy of a stage, "outline" or "expand", or "inner" for plain answers."""
        strategy = getattr(self, name) or self.inner
        assert isinstance(strategy, TokenStrategy)
        return strategy

    def asked(
        self, question: str, history: Sequence[Message], max_new_tokens: int, *, can_prefill: bool
    ) -> dict[str, object]:
        """What the templates of both stages are told of a request."""
        most = self.points(max_new_tokens)
        last = self.budget(most - 1, max_new_tokens)  # where limits differ, that of most points
        return {
            "question": question,
            "history": history,
            "max_points": most,
            "dependencies": self.dependencies,
            "can_prefill": can_prefill,
            "length": self.length_of(last),
            "sentences": self.sentences(last),
        }

    def points(self, max_new_tokens: int) -> int:
        """How many points to ask for in a request that may have so many new tokens."""
        room = min(_ROOM, *_limits(self.point_tokens))
        return min(self.max_points, max(max_new_tokens // room, _FEWEST))

    def budget(self, place: int, max_new_tokens: int) -> int:
        """Tokens that the point at `place` (from 0) may have. It does not depend on how many points there will be,
        so that writing can begin before that is known."""
        limits = _limits(self.point_tokens)
        limits += limits[-1:] * (self.max_points - len(limits))
        total = sum(limits[: self.points(max_new_tokens)])
        return max(limits[place] * min(max_new_tokens, total) // total, 1)

    def sentences(self, tokens: int) -> int:
        """How many sentences a point of so many tokens has room for, 1 to 4."""
        return min(max(tokens // _SENTENCE, 1), len(_LENGTHS))

    def length_of(self, tokens: int) -> str:
        """What to ask for where a point may have so many tokens."""
        return self.length or _LENGTHS[self.sentences(tokens) - 1]


def _limits(point_tokens: int | str | Sequence[int]) -> list[int]:
    limits: list[int] = []
    if isinstance(point_tokens, int):
        limits = [point_tokens]
    else:
        with contextlib.suppress(ValueError, TypeError):
            parts: Sequence[str | int] = point_tokens.split(",") if isinstance(point_tokens, str) else point_tokens
            limits = [int(part) for part in parts]
    if not limits or min(limits) < 1:
        raise InvalidRequest(
            f'point_tokens must be one integer of at least 1 or several ("96, 48"), not {point_tokens!r}.'
        )
    return limits
