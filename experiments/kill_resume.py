"""A run that is killed again and again ends like one that was left alone.

    python -m experiments.kill_resume [--kills 20] [--questions 40] [--model smollm2-135m]

Three strategies answer the questions once undisturbed, and once in a process that is killed (SIGKILL) at random
moments and resumed each time: while it loads, warms up, decodes or writes. Afterwards every answer must be there once,
with the undisturbed run's tokens and text.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

# Imported before the process forks: every child would do it otherwise. Nothing is computed here, so that no child
# inherits a thread pool without its threads.
from decoding import comparison, progress  # noqa: F401
from decoding.cli import exit_code
from decoding.cli import main as command
from decoding.errors import RecordError
from decoding.report import read_run

STRATEGIES = ("autoregressive", "speculative(drafter=prompt-lookup)", "jacobi")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--suite", default="default", help="a question file or a shipped suite")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    arguments = [
        options.suite,
        "--strategies",
        *STRATEGIES,
        "--limit",
        str(options.questions),
        "--model",
        options.model,
    ]
    arguments += ["--max-new-tokens", str(options.max_new_tokens), "--temperature", "0.7"]
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder, "whole"), Path(folder, "cut")
        began = time.perf_counter()
        finish(start([*arguments, "--output", str(whole)], folder), folder)
        seconds = time.perf_counter() - began
        made = read_run(whole).records
        answering = made[-1].started - made[0].started
        moments, kills = random.Random(options.seed), 0
        for _ in range(options.kills):
            # Answers say when, not the clock, and leave some to make: the kill finds a process however fast it is.
            more = moments.randint(0, len(made) // (options.kills + 1))
            slack = answering / len(made) if more else seconds - answering
            kills += killed(resuming(cut, arguments), cut, more, moments.uniform(0, slack), folder)
        sessions = len(read_run(cut).resumed) if holds_a_run(cut) else 0
        before = len(read_run(cut)) if holds_a_run(cut) else 0
        finish(start(resuming(cut, arguments), folder), folder)
        ours, theirs = read_run(cut), read_run(whole)
        answers = answers_in(cut)
        expected = {record.key: (record.text, record.tokens, record.seed) for record in theirs}
        found = {record.key: (record.text, record.tokens, record.seed) for record in ours}
    print(f"killed {kills} times ({before} answers made in {sessions + 1} sessions), then left alone to the end")
    print(f"answers: {answers} lines for {len(expected)} answers of the undisturbed run")
    print(f"same tokens and text: {sum(found.get(key) == value for key, value in expected.items())} of {len(expected)}")
    held = kills == options.kills and answers == len(expected) and found == expected
    print("verdict:", "holds" if held else "does not hold")
    return 0 if held else 1


def holds_a_run(directory: Path) -> bool:
    try:
        return bool(read_run(directory).header)
    except RecordError:  # killed before there was a header
        return False


def resuming(directory: Path, arguments: list[str]) -> list[str]:
    return ["--resume", str(directory)] if holds_a_run(directory) else [*arguments, "--output", str(directory)]


def start(arguments: list[str], folder: str) -> int:
    """Run `decoding compare` in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        try:
            log = os.open(Path(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(command(["compare", *arguments]))
        finally:
            os._exit(1)
    return child


def killed(arguments: list[str], directory: Path, more: int, seconds: float, folder: str) -> bool:
    """Kill the command some time after it made so many more answers, or before its first; whether it was running."""
    before = answers_in(directory)
    child = start(arguments, folder)
    while answers_in(directory) < before + more:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until and (more or answers_in(directory) == before):
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def answers_in(directory: Path) -> int:
    """Whole answers in a run's file, which may not be there yet."""
    try:
        lines = (directory / "records.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return sum(line.startswith(b'{"kind":"answer"') and line.endswith(b"\n") for line in lines)


def finish(child: int, folder: str) -> None:
    if os.waitpid(child, 0)[1]:
        sys.exit(Path(folder, "log").read_text(errors="replace"))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
