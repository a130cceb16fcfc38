"""Self-distilled data: the target answers questions greedily, and those answers are what a head learns to foresee.

Questions come from files and from the chat model itself: given only the beginning of a user's turn, it continues
with a question of the kind it was trained on (Xu et al. 2024, "Magpie"). Half of them get an opening word or two
besides, so that tasks come in greater variety.

    python -m drafters.training.distill --model smollm2-135m --output runs/distilled --sequences 6000

Every shard of 256 answers is one safetensors file, written whole or not at all and determined by the options and its
number alone. So an interrupted run goes on where it stopped, and a larger `--sequences` adds shards.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import random
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file

import decoding
from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.errors import InvalidRequest, RecordError
from decoding.questions import load_questions
from decoding.types import Prompt, SamplingParams

SHARD = 256
"""Answers per shard."""

HELD_OUT = "held-out.safetensors"

_MARK = "\u241f"  # stands where the user's words go in a chat template; no template contains it


@dataclass(frozen=True)
class Distillation:
    """What is collected.

    model: as `decoding.load` takes it. sequences: answers to train on. questions: files or suites whose first
    turns are asked before self-made questions are. held_out, held_out_limit: a file or suite that is only for
    validation, and how many of its questions; the same question is never trained on. max_prompt_tokens: length of
    self-made questions. max_new_tokens: length of answers. seed: of the self-made questions.
    """

    model: str = "smollm2-135m"
    sequences: int = 6000
    questions: tuple[str, ...] = ()
    held_out: str = "default"
    held_out_limit: int = 64
    max_prompt_tokens: int = 160
    max_new_tokens: int = 160
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sequences", "held_out_limit", "max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}.")


def collect(options: Distillation, folder: Path, lm: LocalBackend | None = None) -> None:
    """Write whatever `folder` lacks: the held-out answers, then shard after shard.

    lm: the loaded target, if there is one already. Raises RecordError if the folder holds the data of other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _same_options(options, folder / "distillation.json")
    shards = [folder / f"shard-{i:05}.safetensors" for i in range(-(-options.sequences // SHARD))]
    missing = [i for i, shard in enumerate(shards) if not shard.exists()]
    if (folder / HELD_OUT).exists() and not missing:
        return
    lm = lm or decoding.load(options.model)
    held_out = [q.turns[0] for q in load_questions(options.held_out, limit=options.held_out_limit)]
    if not (folder / HELD_OUT).exists():
        save_answers(lm, held_out, options.max_new_tokens, folder / HELD_OUT)
    asked = [q.turns[0] for file in options.questions for q in load_questions(file)]
    asked = [text for text in dict.fromkeys(asked) if text not in set(held_out)]
    for i in track(missing, "shards of answers"):
        numbers = range(i * SHARD, (i + 1) * SHARD)
        known = asked[numbers.start : numbers.stop]
        made = invent_questions(lm, options, numbers[len(known) :])
        save_answers(lm, [*known, *made], options.max_new_tokens, shards[i])


def invent_questions(lm: LocalBackend, options: Distillation, numbers: Iterable[int]) -> list[str]:
    """One question for every number, made up by the model: sampled at temperature 1, top-p 0.95."""
    before = _user_turn(lm)
    openers = (importlib.resources.files(__package__) / "openers.txt").read_text(encoding="utf-8").split("\n")
    prompts: list[Prompt] = []
    starts: list[str] = []
    params: list[SamplingParams] = []
    for number in numbers:
        choice = random.Random(f"{options.seed}/{number}")
        starts.append(choice.choice(openers) if choice.random() < 0.5 else "")
        prompts.append(list(lm.tokenizer(before + starts[-1], add_special_tokens=False)["input_ids"]))
        params.append(
            SamplingParams(
                temperature=1.0,
                top_p=0.95,
                seed=choice.getrandbits(60),
                max_new_tokens=options.max_prompt_tokens,
                min_new_tokens=4,
            )
        )
    made = decoding.generate(prompts, lm, params=params) if prompts else []
    texts = [(start + generation.text).strip() for start, generation in zip(starts, made, strict=True)]
    return [text or "Hello!" for text in texts]


def save_answers(lm: LocalBackend, questions: List[str], max_new_tokens: int, file: Path) -> None:
    """Answer greedily, and write tokens [all], lengths [answers] and prompts [answers] (tokens of each prompt)."""
    prompts = [lm.encode(question)[-lm.engine.cache.capacity + max_new_tokens :] for question in questions]
    answers = decoding.generate([*prompts], lm, params=SamplingParams(max_new_tokens=max_new_tokens))
    rows = [(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True) if answer.error is None]
    if not rows:
        raise RecordError(f"no question could be answered: {answers[0].error}")
    tensors = {
        "tokens": torch.tensor([token for pair in rows for part in pair for token in part], dtype=torch.int32),
        "lengths": torch.tensor([len(prompt) + len(tokens) for prompt, tokens in rows], dtype=torch.int32),
        "prompts": torch.tensor([len(prompt) for prompt, _ in rows], dtype=torch.int32),
    }
    part = file.with_suffix(".part")
    save_file(tensors, part, metadata={"model": lm.name})
    part.replace(file)


def _user_turn(lm: LocalBackend) -> str:
    """What stands before the user's first word."""
    if lm.tokenizer.chat_template is None:
        return str(lm.tokenizer.bos_token or "\n")
    text = str(lm.tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False))
    return text[: text.index(_MARK)]


def _same_options(options: Distillation, file: Path) -> None:
    """Record the options, or compare them with those recorded; only the number of sequences may differ."""
    here = {**asdict(options), "questions": list(options.questions)}
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        for name in here:
            if name != "sequences" and here[name] != there.get(name):
                raise RecordError(
                    f"{file.parent} was collected with {name}={there.get(name)!r}, not {here[name]!r}; "
                    "use the same options or another folder."
                )
    file.write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `Distillation` on a command line."""
    default = Distillation()
    parser.add_argument("--model", default=default.model, help="alias, folder, .gguf file or hub id")
    parser.add_argument("--sequences", type=int, default=default.sequences, help="answers to train on")
    parser.add_argument("--questions", nargs="*", default=[], help="files or suites to ask from first")
    parser.add_argument("--held-out", default=default.held_out, help="file or suite to validate on")
    parser.add_argument("--held-out-limit", type=int, default=default.held_out_limit)
    parser.add_argument("--max-prompt-tokens", type=int, default=default.max_prompt_tokens)
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens)
    parser.add_argument("--seed", type=int, default=default.seed)


def parse(arguments: argparse.Namespace) -> Distillation:
    """The options that a command line gave."""
    return Distillation(
        model=arguments.model,
        sequences=arguments.sequences,
        questions=tuple(arguments.questions),
        held_out=arguments.held_out,
        held_out_limit=arguments.held_out_limit,
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m drafters.training.distill", description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("runs/distilled"))
    arguments = parser.parse_args()
    collect(parse(arguments), arguments.output)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
