"""The training loop of every head: batches, optimizer, progress, checkpoints, resume, validation.

accelerate chooses the device and the precision, and splits batches over processes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from decoding.errors import InvalidRequest, RecordError
from drafters.training.batches import Batch, epoch, load_batch
from drafters.training.checkpoint import load_checkpoint, save_checkpoint, saved_state
from drafters.training.corpus import Corpus
from drafters.training.unroll import Outcome, acceptance_lengths


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn.

    batch: documents per step. learning_rate: its peak, reached after `warmup` of all steps; a cosine leads from
    there to a twentieth. clip: largest gradient norm. save_every, evaluate_every: steps. draft_length: guesses per
    pass that validation assumes. mixed_precision: "no", "bf16" or "fp16".
    """

    epochs: int = 4
    batch: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 0.5
    save_every: int = 50
    evaluate_every: int = 200
    draft_length: int = 5
    seed: int = 0
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "save_every", "evaluate_every", "draft_length"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise InvalidRequest(f"learning_rate must be positive, not {self.learning_rate}.")
        if not 0 <= self.warmup <= 1:
            raise InvalidRequest(f"warmup is a share of the steps, from 0 to 1, not {self.warmup}.")


def warm_cosine(step: int, total: int, *, warmup: float, last: float) -> float:
    """The learning rate of a step, relative to its peak: a line up to it over `warmup` of all steps, and a cosine from
    there to `last` (Loshchilov and Hutter 2017, "SGDR", without restarts)."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return last + (1 - last) * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2


@dataclass(frozen=True)
class Validation:
    """A validation's result. loss: mean of the batches'. acceptance_length: simulated, greedy, over the held-out
    answers. agreement: per draft step, how often the head's first choice is the target's."""

    step: int
    loss: float
    acceptance_length: float
    agreement: list[float]


@dataclass
class Run:
    """How far a training run has come. steps: done, of `total`. loss: of late. best: highest acceptance length."""

    total: int
    steps: int = 0
    loss: float = 0.0
    best: float = 0.0
    validations: list[Validation] = field(default_factory=list)


class Trainable(Protocol):
    """A head with its loss, as a module."""

    def __call__(self, batch: Batch, steps: int | None = None) -> Outcome: ...


Export = Callable[[nn.Module, Run], None]
"""Writes the head inside the trained module, which is the best so far, for use."""


def fit(
    module: nn.Module,
    corpus: Corpus,
    held_out: Corpus,
    schedule: Schedule,
    folder: Path,
    export: Export,
    *,
    kind: str,
    target: str,
    options: Any,
) -> Run:
    """Train, or go on where a run of the same options in `folder` was interrupted.

    kind, target, options: of the head: what drafts with it, the model that it is for, and a dataclass.
    Raises RecordError if the folder holds a run of other options.
    """
    accelerator = Accelerator(mixed_precision=schedule.mixed_precision)
    documents = corpus.documents
    per_epoch = len(epoch(documents, schedule.batch, schedule.seed, 0))
    run = Run(total=schedule.epochs * per_epoch)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=schedule.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine(step, run.total, warmup=schedule.warmup, last=0.05)
    )
    # The scheduler is not prepared: it counts steps, however many processes share one.
    module, optimizer = accelerator.prepare(module, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    folder.mkdir(parents=True, exist_ok=True)
    about = {"kind": kind, "target": target, **asdict(options), **asdict(schedule), "documents": len(documents)}
    _same_options(about, folder / "schedule.json")
    if saved := saved_state(accelerator, folder, _run):
        load_checkpoint(accelerator, folder)
        run = saved
    with _progress(accelerator.is_main_process) as progress:
        task = progress.add_task("training", total=run.total, completed=run.steps, note="")
        tokens, began = 0, time.perf_counter()
        while run.steps < run.total:
            batches = epoch(documents, schedule.batch, schedule.seed, run.steps // per_epoch)
            for members in batches[run.steps % per_epoch :]:
                mine = members[accelerator.process_index :: accelerator.num_processes] or members[:1]
                batch = load_batch(corpus, mine).to(accelerator.device)
                with accelerator.autocast():
                    outcome = module(batch)
                accelerator.backward(outcome.loss)
                accelerator.clip_grad_norm_(trained, schedule.clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                run.steps += 1
                loss = outcome.loss.item()
                run.loss = loss if run.steps == 1 else 0.98 * run.loss + 0.02 * loss
                tokens += sum(d.supervised for d in members)
                speed = tokens / (time.perf_counter() - began)
                note = f"loss {run.loss:.3f} · {speed:.0f} tokens/s"
                progress.update(task, completed=run.steps, note=note)
                if run.steps % 20 == 0 and not progress.console.is_terminal:
                    progress.console.print(f"step {run.steps} of {run.total}: {note}")
                if run.steps % schedule.evaluate_every == 0 or run.steps == run.total:
                    paused = time.perf_counter()
                    result = validate(module, held_out, schedule, run.steps, accelerator.device)
                    run.validations.append(result)
                    progress.console.print(
                        f"step {result.step}: held-out loss {result.loss:.3f}, acceptance length "
                        f"{result.acceptance_length:.2f}, agreement " + " ".join(f"{a:.2f}" for a in result.agreement)
                    )
                    if result.acceptance_length > run.best:
                        run.best = result.acceptance_length
                        if accelerator.is_main_process:
                            export(accelerator.unwrap_model(module), run)
                    began += time.perf_counter() - paused
                if run.steps % schedule.save_every == 0 or run.steps == run.total:
                    save_checkpoint(accelerator, folder, asdict(run))
    return run


@torch.no_grad()
def validate(module: nn.Module, held_out: Corpus, schedule: Schedule, step: int, device: torch.device) -> Validation:
    """Loss, and what the head would gain, on answers that nobody trains on."""
    module.eval()
    losses, lengths = [], []
    hits = torch.zeros(schedule.draft_length)
    chances = torch.zeros(schedule.draft_length)
    for members in epoch(held_out.documents, schedule.batch, 0, 0):
        batch = load_batch(held_out, members).to(device)
        outcome: Outcome = module(batch, schedule.draft_length)
        losses.append(outcome.loss.item())
        counts = batch.counts.tolist()
        lengths += acceptance_lengths(outcome.hits.cpu(), counts)
        for i in range(schedule.draft_length):
            hits[i] += outcome.hits[i].sum().cpu()
            chances[i] += sum(max(count - i, 0) for count in counts)
    module.train()
    return Validation(
        step,
        loss=sum(losses) / len(losses),
        acceptance_length=sum(lengths) / len(lengths),
        agreement=(hits / chances.clamp(min=1)).tolist(),
    )


def _progress(visible: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn(), disable=not visible)


def _run(values: dict[str, Any]) -> Run:
    return Run(**{**values, "validations": [Validation(**each) for each in values["validations"]]})


def _same_options(options: dict[str, Any], file: Path) -> None:
    here = json.loads(json.dumps(options))  # tuples are lists there
    if file.exists() and (there := json.loads(file.read_text(encoding="utf-8"))) != here:
        changed = next(name for name in here if here[name] != there.get(name))
        raise RecordError(
            f"{file.parent} holds a run with {changed}={there.get(changed)!r}, not {here[changed]!r}; "
            "give the same options to resume it, or another --output."
        )
    file.write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `Schedule` on a command line."""
    default = Schedule()
    for name, value in asdict(default).items():
        if name != "seed":  # is the data's, too
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)


def parse(arguments: argparse.Namespace) -> Schedule:
    """The schedule that a command line gave."""
    return Schedule(**{name: getattr(arguments, name) for name in asdict(Schedule())})
