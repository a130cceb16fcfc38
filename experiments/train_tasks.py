"""Train a small model on the tasks of `experiments.tasks`: causal, block diffusion or Mask-Predict, of one size.

    python -m experiments.train_tasks block-diffusion --steps 2000 --output runs/tasks/block-diffusion
    accelerate launch -m experiments.train_tasks causal --steps 2000 --output runs/tasks/causal

`--output` becomes a model folder that `decoding.load` takes, written anew (whole or not at all) whenever the validation
loss is the best so far; `--resume` goes on from the last checkpoint inside it. Objectives:

causal            cross-entropy of the next token.
block-diffusion   SDAR-like (Cheng et al. 2025): attention is block-causal, and one block of the answer has a uniform
                  share of its tokens masked. A few visible ones are wrong, so that the model also learns to revise.
mask-predict      CMLM (Ghazvininejad et al. 2019) without an encoder: full attention, a uniform number of masks, and
                  the answer's length as one more token to predict, before anything of the answer is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from decoding.checkpoint import quiet_transformers
from decoding.cli import exit_code
from decoding.errors import RecordError
from drafters.training.checkpoint import load_checkpoint, save_checkpoint, saved_state
from experiments.tasks import BOS, EOS, LENGTH, LONGEST_ANSWER, MASK, PAD, encode, examples, tokenizer

BLOCK = 16
WRONG = 0.05  # share of visible answer tokens that are replaced by another
KEEP_WEIGHT = 0.2  # of the loss at visible tokens, against 1 at masked ones
_POOL = 8  # batches drawn together and sorted by length, so that little is padded

Item = tuple[list[int], list[int]]
"""Token ids of a prompt and its answer."""


@dataclass(frozen=True)
class Batch:
    """tokens, labels: [rows, width] (labels in place, not shifted). weights: [rows, width] of each label's loss.
    visible: boolean, broadcast to [rows, 1, width, width]; None for causal attention."""

    tokens: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    visible: torch.Tensor | None


def causal(items: list[Item], draw: torch.Generator) -> Batch:
    """Every token of the answer and its end, given all before it."""
    rows = [[*prompt, *answer, EOS] for prompt, answer in items]
    labels = _padded(rows)
    weights = torch.zeros(labels.shape)
    for i, (prompt, answer) in enumerate(items):
        weights[i, len(prompt) : len(prompt) + len(answer) + 1] = 1
    # The logit at a place predicts the next one.
    return Batch(labels, F.pad(labels[:, 1:], (0, 1), value=PAD), F.pad(weights[:, 1:], (0, 1)), None)


def block_diffusion(items: list[Item], draw: torch.Generator) -> Batch:
    """One block of each answer, partly masked, given all blocks before it. Behind the answer a block holds EOS."""
    rows, open_from = [], []
    for prompt, answer in items:
        end = len(prompt) + len(answer) + 1
        first, last = len(prompt) // BLOCK, (end - 1) // BLOCK
        block = int(torch.randint(first, last + 1, (), generator=draw))
        stop = (block + 1) * BLOCK
        rows.append([*prompt, *answer, *[EOS] * BLOCK][:stop])
        open_from.append(max(block * BLOCK, len(prompt)))
    labels = _padded(rows)
    span = torch.arange(labels.shape[1]) // BLOCK
    lengths = torch.tensor([len(row) for row in rows])
    place = torch.arange(labels.shape[1])
    opened = (place >= torch.tensor(open_from)[:, None]) & (place < lengths[:, None])
    tokens, weights = _noised(labels, opened, draw)
    return Batch(tokens, labels, weights, (span[:, None] >= span)[None, None])


def mask_predict(items: list[Item], draw: torch.Generator) -> Batch:
    """The answer, partly masked, behind its length; or the length alone (one time in four), from the prompt."""
    alone = (torch.rand(len(items), generator=draw) < 0.25).tolist()
    rows = [
        [*prompt, LENGTH + len(answer) - 1] + ([] if only else answer)
        for (prompt, answer), only in zip(items, alone, strict=True)
    ]
    labels = _padded(rows)
    lengths = torch.tensor([len(row) for row in rows])
    starts = torch.tensor([len(prompt) + (not only) for (prompt, _), only in zip(items, alone, strict=True)])
    place = torch.arange(labels.shape[1])
    there = place < lengths[:, None]
    tokens, weights = _noised(labels, there & (place >= starts[:, None]), draw)
    return Batch(tokens, labels, weights, there[:, None, None, :].expand(-1, 1, labels.shape[1], -1))


OBJECTIVES: dict[str, Callable[[list[Item], torch.Generator], Batch]] = {
    "causal": causal,
    "block-diffusion": block_diffusion,
    "mask-predict": mask_predict,
}


def _padded(rows: list[list[int]]) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), PAD)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def _noised(labels: torch.Tensor, opened: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask a uniform number, at least one, of each row's `opened` places, and make a few visible ones wrong.

    Returns tokens and loss weights. The ELBO's 1/t weights are left out: with them a few rows with a single mask
    dominate a batch.
    """
    count = opened.sum(1, keepdim=True)
    masks = (torch.rand(len(labels), 1, generator=draw) * count).long() + 1
    order = torch.rand(labels.shape, generator=draw).masked_fill(~opened, 2.0).argsort(1).argsort(1)
    masked = opened & (order < masks)
    wrong = opened & ~masked & (torch.rand(labels.shape, generator=draw) < WRONG)
    others = labels[opened][torch.randint(int(opened.sum()), labels.shape, generator=draw)]
    tokens = labels.masked_fill(masked, MASK).where(~wrong, others)
    return tokens, masked.float() + KEEP_WEIGHT * (opened & ~masked).float()


def batches(
    fast: PreTrainedTokenizerFast, objective: str, size: int, seed: int, *, test: bool = False
) -> Iterator[Batch]:
    """Endless batches, each of examples of about one length."""
    draw = torch.Generator().manual_seed(seed)
    source = examples(seed, test=test)
    while True:
        items = [encode(fast, example) for example in islice(source, size * _POOL)]
        items.sort(key=lambda item: len(item[0]) + len(item[1]))
        for start in torch.randperm(_POOL, generator=draw).tolist():
            yield OBJECTIVES[objective](items[start * size : (start + 1) * size], draw)


def loss_of(model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """Mean weighted cross-entropy in nats, of the places that have a label only."""
    visible = None if batch.visible is None else batch.visible.to(device)
    logits = model(input_ids=batch.tokens.to(device), attention_mask=visible, use_cache=False).logits
    weights = batch.weights.to(device)
    labelled = weights > 0
    losses = F.cross_entropy(logits[labelled].float(), batch.labels.to(device)[labelled], reduction="none")
    return (losses * weights[labelled]).sum() / weights.sum()


def new_model(objective: str, vocabulary: int, hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama-shaped model; what makes it a masked one is said in its configuration, for `decoding.masked`."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        # The usual 0.02 is for wide models; at this width it leaves attention uniform for most of a short training.
        initializer_range=hidden**-0.5,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    if objective == "block-diffusion":
        config.masked = {"mask_token_id": MASK, "attention": "block-causal", "block_size": BLOCK, "shift": False}
    if objective == "mask-predict":
        lengths = list(range(LENGTH, LENGTH + LONGEST_ANSWER))
        config.masked = {
            "mask_token_id": MASK, "attention": "bidirectional", "shift": False, "length_token_ids": lengths
        }  # fmt: skip
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, fast: PreTrainedTokenizerFast, folder: Path, card: dict[str, object]) -> None:
    """Write the model in float16, with its tokenizer and `training.json`, beside the old one and then in its place."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy = LlamaForCausalLM(model.config).half()
    copy.load_state_dict({name: value.half() for name, value in model.state_dict().items()})
    with quiet_transformers():
        copy.save_pretrained(fresh)
    fast.save_pretrained(fresh)
    (fresh / "training.json").write_text(json.dumps(card, indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in fresh.iterdir():
        os.replace(file, folder / file.name)
    fresh.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", choices=OBJECTIVES)
    parser.add_argument("--output", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=48, help="examples per process and step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps between validations (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    options = parser.parse_args()
    for name in ("steps", "batch", "hidden", "layers", "every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}.")
    if options.hidden % 8:
        parser.error(f"--hidden must be a multiple of 8, for four heads of an even size, not {options.hidden}.")
    if not options.learning_rate > 0:
        parser.error(f"--learning-rate must be positive, not {options.learning_rate}.")
    set_seed(options.seed)
    accelerator = Accelerator()
    fast = tokenizer()
    model = new_model(options.objective, len(fast), options.hidden, options.layers)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )

    def rate(step: int) -> float:
        """Warm-up over 100 steps, then a cosine to 2 %."""
        done = min(step / options.steps, 1.0)
        return min((step + 1) / 100, 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    first, best, spent = 0, math.inf, 0.0
    free = ("output", "resume", "steps", "every")  # may differ from those of the run that goes on
    kept = {name: value for name, value in vars(options).items() if name not in free}
    if options.resume:
        try:
            saved = saved_state(accelerator, options.output, itemgetter("step", "best", "seconds", "options"))
            if saved is None:
                parser.error(f"there is no checkpoint in {options.output}; leave out --resume to start a run.")
            first, best, spent, theirs = saved
            if differs := [name for name in kept if theirs.get(name) != kept[name]]:
                parser.error(
                    f"{options.output} holds a run with other {', '.join(differs)}; give its own, or another --output."
                )
            load_checkpoint(accelerator, options.output)
        except RecordError as error:
            parser.error(str(error))
    held_out = list(islice(batches(fast, options.objective, options.batch, seed=10**6, test=True), 2 * _POOL))
    # Every process, and every resumption, draws examples of its own.
    source = batches(fast, options.objective, options.batch, seed=1 + accelerator.process_index + 1000 * first)
    began, running, shown = time.perf_counter() - spent, 0.0, first
    for step in range(first + 1, options.steps + 1):
        loss = loss_of(model, next(source), accelerator.device)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        running += loss.item()
        if step % options.every and step < options.steps:
            continue
        with torch.inference_mode():
            plain = accelerator.unwrap_model(model)
            losses = [float(loss_of(plain, batch, accelerator.device)) for batch in held_out]
        validation, spent = sum(losses) / len(losses), time.perf_counter() - began
        accelerator.print(
            f"step {step}/{options.steps}: training loss {running / (step - shown):.4f}, validation loss "
            f"{validation:.4f}, {spent:.0f} s",
            flush=True,
        )
        running, shown = 0.0, step
        if accelerator.is_main_process and validation < best:
            best = validation
            card: dict[str, object] = {
                "objective": options.objective,
                "parameters": plain.num_parameters(),
                "steps": step,
                "examples": step * options.batch * accelerator.num_processes,
                "validation_loss": round(validation, 5),
                "seconds": round(spent),
                "device": str(accelerator.device),
                "options": {key: value for key, value in vars(options).items() if key not in ("output", "resume")},
            }
            save(plain, fast, options.output, card)
        progress = {"step": step, "best": best, "seconds": spent, "options": kept}
        save_checkpoint(accelerator, options.output, progress)


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
