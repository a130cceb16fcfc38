"""Train a model to make large steps in Jacobi decoding: collect trajectories, learn from them, keep the best adapter.

    pip install 'parallel-decoding[training]'
    python -m experiments.train_jacobi --sequences 1500 --output runs/jacobi
    decoding generate "Why is the sea salty?" --strategy "jacobi(adapter=runs/jacobi/adapter)" --metrics

Questions and held-out answers are those of `drafters.training.distill`; a folder that it filled can be given as
`--answers` and is read instead of being made again. Every stage goes on where it was interrupted: answers,
trajectories, training (the checkpoint in the output folder). Validation decodes held-out questions with the model as
it is: tokens per forward, and how far its plain greedy answers, which are what it gives, differ from the base model's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence as List
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from decoding.backends.local import LocalBackend
from decoding.cli import exit_code
from decoding.errors import InvalidRequest, RecordError
from decoding.models import LoadedModel, load_model
from decoding.strategies.adapter import CARD, CONFIG, WEIGHTS, fingerprint
from drafters.training import distill
from drafters.training.checkpoint import load_checkpoint, save_checkpoint, saved_state
from drafters.training.corpus import Corpus, Document
from drafters.training.fit import warm_cosine
from experiments.consistency import ConsistencyLoss, Trajectory, choose, pack
from experiments.jacobi_validation import Text, Validation, base_perplexity, validate
from experiments.trajectories import collect, corrupt, digest, repetitive

TRAINED = "trained.safetensors"
_LONGEST_PROMPT = 384  # tokens; what stands in longer ones costs more to read than the answer teaches
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Training:
    """What is learned, and how.

    block_size: tokens in a Jacobi block. schedule: how trajectories are collected. max_new_tokens: of an answer.
    rank, alpha: of the LoRA adapter; rank 0 trains all weights. layers: the adapter changes so many of the last
    decoder layers (0: all); gradients end below them, so that fewer train faster. epochs, batch (trajectories per
    step), learning_rate (its peak; a cosine leads to a tenth), warmup (share of the steps), clip (gradient norm).
    guesses: guesses packed behind an answer, in answer lengths. depth: guesses that are learnt from of each iterate,
    the first wrong one and those behind it (0: all); the further ahead, the less there is to learn. corrupted: so many
    further answers are learnt from with iterates that are made up. answer_weight: of the autoregressive loss.
    evaluate_every, save_every: steps. validation: held-out questions, validation_tokens: tokens of each answer.
    mixed_precision: "no", "bf16" or "fp16".
    """

    block_size: int = 16
    schedule: str = "gauss-seidel"
    max_new_tokens: int = 96
    rank: int = 32
    alpha: int = 32
    layers: int = 0
    epochs: int = 2
    batch: int = 4
    learning_rate: float = 3e-4
    warmup: float = 0.05
    clip: float = 1.0
    guesses: float = 2.0
    depth: int = 0
    corrupted: int = 0
    answer_weight: float = 1.0
    evaluate_every: int = 100
    save_every: int = 50
    validation: int = 16
    validation_tokens: int = 64
    seed: int = 0
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name, least in (
            ("block_size", 2),
            ("rank", 0),
            ("layers", 0),
            ("depth", 0),
            ("corrupted", 0),
            ("epochs", 1),
            ("batch", 1),
            ("max_new_tokens", 2),
            ("evaluate_every", 1),
            ("save_every", 1),
            ("validation", 1),
            ("validation_tokens", 1),
        ):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} must be at least {least}, not {getattr(self, name)}.")
        for name in ("learning_rate", "guesses", "clip"):
            if not getattr(self, name) > 0:
                raise InvalidRequest(f"{name} must be positive, not {getattr(self, name)}.")
        if not 0 <= self.warmup <= 1:
            raise InvalidRequest(f"warmup is a share of the steps, from 0 to 1, not {self.warmup}.")


@dataclass
class Run:
    """How far a run has come: steps done of total, and what validations found."""

    total: int
    steps: int = 0
    validations: list[Validation] = field(default_factory=list)

    @property
    def best(self) -> Validation | None:
        """The validation with the most tokens per forward."""
        return max(self.validations, key=lambda v: v.tokens_per_forward, default=None)


def train(
    loaded: LoadedModel, trajectories: List[Trajectory], held_out: List[Document], options: Training, folder: Path
) -> Run:
    """Train, or go on where a run of the same model, data and options in `folder` stopped.

    The adapter of the best validation is `folder/adapter`; without LoRA, the model is. Raises RecordError if the
    folder holds another run.
    """
    usable = [t for t in trajectories if t.branches]
    if not usable:
        raise RecordError("no trajectory holds a wrong guess, so there is nothing to learn; collect more.")
    mark = fingerprint(loaded.model)
    data = digest([usable, [(document.prompt, document.tokens.tolist()) for document in held_out]])
    here = {**asdict(options), "trajectories": len(usable), "data": data, "fingerprint": list(mark)}
    _same_run(here, folder / "training-options.json")
    torch.manual_seed(options.seed)
    model = _with_lora(loaded.model, options) if options.rank else loaded.model.requires_grad_(True)
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    base: PreTrainedModel = model.get_base_model() if options.rank else model  # type: ignore[operator]
    loss = ConsistencyLoss(base, options.answer_weight)
    weights = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    steps = math.ceil(len(usable) / options.batch)
    run = Run(total=options.epochs * steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine(step, run.total, warmup=options.warmup, last=0.1)
    )
    module, optimizer = accelerator.prepare(loss, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    _only_trained_weights(accelerator, weights)
    if saved := saved_state(accelerator, folder, _run):
        load_checkpoint(accelerator, folder)
        run = saved

    def perplexity(texts: List[Text]) -> float:
        with model.disable_adapter():  # type: ignore[operator]
            return base_perplexity(base, texts)

    def check() -> str:
        module.eval()
        result = validate(
            # An engine of its own every time: whatever engines prepare from weights is made anew.
            LocalBackend(base, loaded.tokenizer, eos=loaded.eos_token_ids, slots=8, capacity=1024),
            held_out,
            step=run.steps,
            block_size=options.block_size,
            max_new_tokens=options.validation_tokens,
            perplexity=perplexity if options.rank else None,
        )
        module.train()
        run.validations.append(result)
        if run.best is result and accelerator.is_main_process:
            _export(model, loaded, folder / "adapter", options, mark, result)
        return str(result)

    module.train()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), disable=not accelerator.is_main_process) as progress:
        task = progress.add_task("training", total=run.total, completed=run.steps, note="")
        if not run.validations:
            progress.console.print(check())
        tokens, began = 0, time.perf_counter()
        while run.steps < run.total:
            epoch, at = divmod(run.steps, steps)
            order = list(range(len(usable)))
            Random(f"{options.seed}/{epoch}").shuffle(order)
            members = order[at * options.batch : (at + 1) * options.batch]
            mine = members[accelerator.process_index :: accelerator.num_processes] or members[:1]
            packed = pack([_chosen(usable[i], options, epoch, i) for i in mine]).to(accelerator.device)
            losses = module(packed)
            accelerator.backward(losses.total)
            accelerator.clip_grad_norm_(weights.values(), options.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.steps += 1
            tokens += packed.tokens.numel()
            note = (
                f"answer {losses.answer:.3f} · consistency {losses.consistency:.3f} · jumps {losses.jumps:.2f} · "
                f"{tokens / (time.perf_counter() - began):.0f} tokens/s"
            )
            progress.update(task, completed=run.steps, note=note)
            if run.steps % 10 == 0 and not progress.console.is_terminal:
                progress.console.print(f"step {run.steps} of {run.total}: {note}")
            if run.steps % options.evaluate_every == 0 or run.steps == run.total:
                paused = time.perf_counter()
                progress.console.print(check())
                began += time.perf_counter() - paused
            if run.steps % options.save_every == 0 or run.steps == run.total:
                save_checkpoint(accelerator, folder, asdict(run))
    return run


def _chosen(trajectory: Trajectory, options: Training, epoch: int, number: int) -> Trajectory:
    guesses = round(options.guesses * (len(trajectory.tokens) - trajectory.prompt))
    return choose(trajectory, guesses, Random(f"{options.seed}/{epoch}/{number}"), options.depth)


def _with_lora(model: PreTrainedModel, options: Training) -> Any:
    from peft import LoraConfig, get_peft_model

    present = [name for name in _TARGETS if any(key.endswith(f".{name}") for key, _ in model.named_modules())]
    count = model.config.get_text_config().num_hidden_layers
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=present or "all-linear",
        layers_to_transform=list(range(max(0, count - options.layers), count)) if options.layers else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _export(
    model: Any, loaded: LoadedModel, folder: Path, options: Training, mark: tuple[float, ...], result: Validation
) -> None:
    """Write the adapter (in half precision, which merging does not notice), or the model, and how it was made."""
    model.save_pretrained(folder)
    if not options.rank:
        loaded.tokenizer.save_pretrained(folder)
    else:
        save_file({name: t.half() for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
        (folder / "README.md").unlink(missing_ok=True)  # a template full of gaps
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = loaded.name  # and not where it lay on this machine
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    card = {"fingerprint": list(mark), "training": asdict(options), "validation": asdict(result)}
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _only_trained_weights(accelerator: Accelerator, weights: dict[str, nn.Parameter]) -> None:
    """Checkpoints hold what is trained, not the whole model again."""

    def saving(models: list[Any], states: list[Any], folder: str) -> None:
        save_file({name: p.detach().contiguous() for name, p in weights.items()}, Path(folder) / TRAINED)
        states.clear()

    def loading(models: list[Any], folder: str) -> None:
        with torch.no_grad():
            for name, saved in load_file(Path(folder) / TRAINED).items():
                weights[name].copy_(saved)
        models.clear()

    accelerator.register_save_state_pre_hook(saving)
    accelerator.register_load_state_pre_hook(loading)


def _run(values: dict[str, Any]) -> Run:
    return Run(**{**values, "validations": [Validation(**each) for each in values["validations"]]})


def _same_run(here: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and (there := json.loads(file.read_text(encoding="utf-8"))) != here:
        differs = ", ".join(name for name in here if there.get(name) != here[name])
        raise RecordError(
            f"{file.parent} holds a run that differs in {differs}; use the same model, data and options, or another "
            "folder."
        )
    file.write_text(json.dumps(here, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    distill.add_arguments(parser)
    default = Training()
    shared = {"max_new_tokens", "seed"}
    for name, value in asdict(default).items():
        if name not in shared:
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.set_defaults(sequences=1500, max_new_tokens=default.max_new_tokens)
    parser.add_argument("--answers", type=Path, help="folder of drafters.training.distill (OUTPUT/answers)")
    parser.add_argument("--output", type=Path, default=Path("runs/jacobi"))
    arguments = parser.parse_args()
    run = _collect_and_train(arguments)
    print(f"best: {run.best}\nadapter: {arguments.output / 'adapter'}")


def _collect_and_train(arguments: argparse.Namespace) -> Run:
    options = Training(**{name: getattr(arguments, name) for name in asdict(Training())})
    loaded = load_model(arguments.model)
    answers = arguments.answers or arguments.output / "answers"
    lm = LocalBackend(
        loaded.model, loaded.tokenizer, name=loaded.name, eos=loaded.eos_token_ids, slots=32, capacity=1024
    )
    if arguments.answers is None:
        distill.collect(distill.parse(arguments), answers, lm)

    def documents(held_out: bool, count: int) -> list[Document]:
        corpus = Corpus(answers, (), held_out=held_out)
        if corpus.model != loaded.name:
            raise RecordError(f"{answers} holds answers of {corpus.model}, not of {loaded.name}; use its own.")
        return [d for d in corpus.documents if d.prompt <= _LONGEST_PROMPT][:count]

    prompts = [d.tokens[: d.prompt].tolist() for d in documents(False, arguments.sequences)]
    trajectories = collect(
        lm,
        prompts,
        arguments.output / "trajectories",
        block_size=options.block_size,
        max_new_tokens=options.max_new_tokens,
        schedule=options.schedule,
    )
    del lm
    random = Random(options.seed)
    for document in documents(False, options.corrupted):
        tokens = document.tokens[: document.prompt + options.max_new_tokens].tolist()
        if not repetitive(tokens[document.prompt :]):
            trajectories.append(corrupt(tokens, document.prompt, options.depth or options.block_size, random))
    return train(loaded, trajectories, documents(True, options.validation), options, arguments.output)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
