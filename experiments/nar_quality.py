"""Accuracy against forward passes: commit policies of a masked model, Mask-Predict, a causal model of equal size.

    python -m experiments.nar_quality [--questions 300] [--output runs/nar-quality]

The models are the shipped ones of `experiments.train_tasks`, the questions test examples of `experiments.tasks`, whose
answers are exact. Written are `results.json` (every setting, by task), `accuracy.svg` and, where there is a `README.md`
with a place for them, its figures. Passes are all forward passes an answer took part in, the reading of its prompt
included, on average over the answers: the causal model needs one for every token and one for the end. Caches that
approximate are compared with the exact one, answer by answer.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import decoding
from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.report import environment
from decoding.report.curves import Curve, chart
from decoding.types import Generation
from experiments.tasks import TASKS, Example, correct, examples

MODELS = Path(__file__).parent / "models"
BEGIN, END = "<!-- figures: written by python -m experiments.nar_quality -->", "<!-- end of figures -->"

ONE, ONE_END_LAST = "one token per pass", "one token per pass, end last"
POLICIES: dict[str, Sequence[str]] = {
    "fixed": [f"fixed(count={n})" for n in (2, 3, 4, 6, 8, 16)],
    "confidence": [f"confidence(threshold={t})" for t in (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)],
    "factor": [f"factor(factor={f})" for f in (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)],
    "entropy": [f"entropy(bound={b})" for b in (0.01, 0.05, 0.1, 0.3, 1.0, 3.0)],
    "margin": [f"margin(threshold={t})" for t in (0.98, 0.9, 0.8, 0.6, 0.3)],
    "klass": [
        *(f"klass(confidence={c}, divergence={d})" for c, d in ((0.9, 0.001), (0.9, 0.01), (0.6, 0.1), (0.5, 1.0))),
        "klass(history=2)",
    ],
    "remask": [f"remask(base=confidence(threshold={t}))" for t in (0.95, 0.9, 0.7, 0.5)],
    "edit": [f"edit(base=confidence(threshold={t}))" for t in (0.95, 0.9, 0.7, 0.5)],
}

_BY_TASK = ("block-diffusion(policy=confidence(threshold=0.9))", "mask-predict(lengths=3, iterations=4)")
"""Settings whose tasks the page tells apart, beside plain decoding and one token per pass."""


@dataclass(frozen=True)
class Setting:
    """What one strategy did with all questions.

    accuracy: share of right answers; by_task: of each task. passes: forward passes per answer. tokens_per_pass: new
    tokens, the end included, per pass. revised: tokens changed or taken back per answer. differing: share of answers
    unlike those of the setting it approximates, if it does.
    """

    model: str
    family: str
    strategy: str
    accuracy: float
    by_task: dict[str, float]
    passes: float
    tokens_per_pass: float
    revised: float
    differing: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the three models (the shipped ones)")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=10**9)
    parser.add_argument("--output", type=Path, default=Path("runs/nar-quality"))
    options = parser.parse_args()
    questions = list(islice(examples(options.seed, test=True), options.questions))
    settings = []

    def report(setting: Setting) -> Setting:
        settings.append(setting)
        print(
            f"{setting.model:16} {setting.strategy:62} {setting.accuracy:6.1%} right, {setting.passes:5.2f} passes"
            + ("" if setting.differing is None else f", {setting.differing:.1%} of answers differ"),
            flush=True,
        )
        return setting

    causal = decoding.load(str(options.models / "causal"))
    report(measured(causal, "plain decoding", "autoregressive", questions)[0])
    masked = decoding.load(str(options.models / "block-diffusion"))
    report(measured(masked, ONE, "block-diffusion(policy=fixed)", questions)[0])
    report(measured(masked, ONE_END_LAST, "block-diffusion(policy=fixed, eos_last=true)", questions)[0])
    for family, policies in POLICIES.items():
        for policy in policies:
            report(measured(masked, family, f"block-diffusion(policy={policy})", questions)[0])
    for policy in ("fixed", "confidence"):
        exact: list[Generation] | None = None
        for cache in ("exact", "prefix", "dual"):
            text = f"block-diffusion(policy={policy}, block_size=4, cache={cache})"
            setting, answers = measured(masked, "blocks of 4", text, questions, exact)
            report(setting)
            exact = exact or answers
    filler = decoding.load(str(options.models / "mask-predict"))
    for iterations in (1, 2, 3, 4, 6, 8):
        text = f"mask-predict(lengths=3, iterations={iterations})"
        report(measured(filler, "mask-predict", text, questions)[0])
    report(measured(filler, "mask-predict, 1 length", "mask-predict(lengths=1, iterations=4)", questions)[0])
    verdict = judge(settings)
    print(verdict)
    options.output.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": vars(environment(device=str(masked.device))),
        "questions": options.questions,
        "seed": options.seed,
        "verdict": verdict,
        "settings": [asdict(setting) for setting in settings],
    }
    (options.output / "results.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
    (options.output / "accuracy.svg").write_text(picture(settings))
    readme = options.output / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        readme.write_text(rewritten(text, page(options.models, settings, options.questions)), encoding="utf-8")


def measured(
    lm: LocalBackend,
    family: str,
    strategy: str,
    questions: Sequence[Example],
    exact: Sequence[Generation] | None = None,
) -> tuple[Setting, list[Generation]]:
    """All questions in one go, greedily; compared with the answers of `exact`, if there are any."""
    lm.forget()
    params = decoding.SamplingParams(max_new_tokens=32)
    answers: list[Generation] = decoding.generate([q.prompt for q in questions], lm, strategy=strategy, params=params)
    right = [answer.error is None and correct(q, answer.text) for q, answer in zip(questions, answers, strict=True)]
    passes = sum(len({step.step for step in answer.trace}) for answer in answers)
    count = len(questions)
    return (
        Setting(
            model=lm.name,
            family=family,
            strategy=strategy,
            accuracy=sum(right) / count,
            by_task={
                task: sum(ok for q, ok in zip(questions, right, strict=True) if q.task == task)
                / max(1, sum(q.task == task for q in questions))
                for task in TASKS
            },
            passes=passes / count,
            tokens_per_pass=sum(len(answer.tokens) for answer in answers) / passes,
            revised=sum(step.revised for answer in answers for step in answer.trace) / count,
            differing=None
            if exact is None
            else sum(a.tokens != b.tokens for a, b in zip(answers, exact, strict=True)) / count,
        ),
        answers,
    )


def judge(settings: Sequence[Setting]) -> str:
    """Whether a confidence threshold is within a point of one token per pass at a third of its passes.

    One token per pass is measured twice: as published, where tokens behind the end cost passes too, and with the end
    written last, where they do not: the harder comparison.
    """
    lines = []
    for slow in (s for s in settings if s.family in (ONE, ONE_END_LAST)):
        close = [s for s in settings if s.family == "confidence" and s.accuracy >= slow.accuracy - 0.01]
        line = f"{slow.strategy}: {slow.accuracy:.1%} right in {slow.passes:.2f} passes; "
        if not close:
            lines.append(line + "no confidence threshold comes within one point of it.")
            continue
        best = min(close, key=lambda s: s.passes)
        share = best.passes / slow.passes
        verdict = "reached" if share <= 1 / 3 else "missed"
        lines.append(
            f"{line}{best.strategy}: {best.accuracy:.1%} in {best.passes:.2f}, {share:.2f} of them, a third {verdict}."
        )
    return "\n".join(lines)


def page(models: Path, settings: Sequence[Setting], questions: int) -> str:
    """The models and all figures as Markdown, from the models' cards and the settings."""
    lines = ["| folder | parameters | steps | examples | validation loss, nats |", "|---|---|---|---|---|"]
    for folder in sorted(path.parent for path in models.glob("*/training.json")):
        card = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        lines.append(
            f"| `{folder.name}` | {card['parameters']:,} | {card['steps']} | {card['examples']:,} "
            f"| {card['validation_loss']:.3f} |"
        )
    one = next(s for s in settings if s.family == ONE)
    error = 100 * math.sqrt(one.accuracy * (1 - one.accuracy) / questions)
    lines += [
        "",
        f"{questions} questions: a share near {one.accuracy:.0%} has a standard error of {error:.1f} points.",
        "",
        "![accuracy against passes](accuracy.svg)",
        "",
        *(f"{line}\n" for line in judge(settings).splitlines()),
        "| strategy | right, % | passes | tokens per pass | revised | differing, % |",
        "|---|---|---|---|---|---|",
        *(
            f"| `{s.strategy}` | {100 * s.accuracy:.1f} | {s.passes:.2f} | {s.tokens_per_pass:.2f} | {s.revised:.2f} "
            f"| {'' if s.differing is None else f'{100 * s.differing:.1f}'} |"
            for s in settings
        ),
        "",
        f"| right, % | {' | '.join(TASKS)} |",
        f"|---|{'---|' * len(TASKS)}",
        *(
            f"| `{s.strategy}` | {' | '.join(f'{100 * s.by_task[task]:.0f}' for task in TASKS)} |"
            for s in settings
            if s.family in ("plain decoding", ONE) or s.strategy in _BY_TASK
        ),
    ]
    return "\n".join(lines)


def rewritten(text: str, figures: str) -> str:
    """`text` with new figures between its two marks; without the marks, as it is."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}" if begin and end else text


def picture(settings: Sequence[Setting]) -> str:
    """Accuracy against passes, a curve per family."""
    families = dict.fromkeys(s.family for s in settings if s.differing is None and not s.family.startswith("blocks"))
    curves = []
    for family in families:
        members = sorted((s for s in settings if s.family == family), key=lambda s: s.passes)
        curves.append(
            Curve(
                family,
                [(s.passes, 100 * s.accuracy) for s in members],
                [f"{s.strategy}: {s.accuracy:.1%}, {s.passes:.2f} passes" for s in members],
            )
        )
    return chart("Right answers against forward passes", "forward passes per answer", "right answers, %", curves)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
