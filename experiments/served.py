"""Other projects' model servers, each in an environment of its own, for as long as a script needs them."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from decoding.errors import ModelError
from decoding.gguf_cache import converted
from decoding.models import aliases
from decoding.report import Summary, read_run, summarize

STOPPING_SECONDS = 30

STRATEGIES = ["autoregressive", "skeleton(prompt=skeleton/small)"]
"""A server does not say how large its model is; the default one is small, and needs the prompts for small models."""


@dataclass(frozen=True)
class Asked:
    """What `decoding compare` is to do with a server.

    questions: a file or a suite, of which the first `limit`. patience: seconds for all answers.
    """

    questions: str
    limit: int
    max_new_tokens: int
    strategies: Sequence[str]
    patience: float

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser, *, patience: float) -> None:
        """What every script that asks a server offers."""
        parser.add_argument("questions", nargs="?", default="default", help="a question file or a shipped suite")
        parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
        parser.add_argument("--limit", type=int, default=4, help="questions (%(default)s)")
        parser.add_argument("--max-new-tokens", type=int, default=160)
        parser.add_argument(
            "--run-seconds", type=float, default=patience, help="for the answers of a server (%(default)s)"
        )

    @classmethod
    def of(cls, options: argparse.Namespace) -> Asked:
        """As a command line says."""
        return cls(options.questions, options.limit, options.max_new_tokens, options.strategies, options.run_seconds)


def environment(folder: Path, *steps: Sequence[str]) -> Path:
    """A virtual environment made by these `pip` commands, in this order; returns its folder of programs.

    One that the same commands made before is used as it is.
    """
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    done = folder / "installed.txt"
    wanted = "\n".join(" ".join(step) for step in steps)
    if not (done.exists() and done.read_text() == wanted):
        print(f"making the environment {folder}; this takes minutes and up to a few GB", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for step in steps:
            subprocess.run([str(programs / "python"), "-m", "pip", "--quiet", *step], check=True)
        done.write_text(wanted)
    return programs


def model_folder(name: str) -> Path:
    """A model as a folder in Hugging Face's layout: a folder as it is, an alias as it was converted."""
    if Path(name).is_dir():
        return Path(name).resolve()
    paths = {alias.name: alias.paths for alias in aliases()}.get(name)
    if paths is None:
        raise ModelError(f"{name!r} is neither a folder nor an installed alias; see `decoding models`.")
    return converted(paths)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def served(
    command: Sequence[str], port: int, *, log: Path, settings: Mapping[str, str], patience: float = 600
) -> Iterator[str]:
    """Run a server until the block ends; yields its base URL once it answers at /health.

    log: where it writes. settings: environment variables. The server and whatever it started are stopped in the end.
    Raises ModelError, with the end of the log, if it ends or does not answer within `patience` seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost"}
    # Whoever ends this script ends the server too: as an exception, so that what follows below is done.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with open(log, "wb") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **offline, **settings},
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log, patience)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOPPING_SECONDS)
        with suppress(ProcessLookupError):  # what did not go by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        signal.signal(signal.SIGTERM, before)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        if process.poll() is not None or time.monotonic() > until:
            end = log.read_text(errors="replace")[-2000:]
            ended = process.poll() is not None
            what = f"ended with {process.returncode}" if ended else f"did not answer within {patience:.0f} s"
            raise ModelError(f"the server {what}; {log} ends with:\n{end}")
        time.sleep(0.5)


def compared(url: str, model: str, output: Path, asked: Asked) -> Summary:
    """`decoding compare` on a server, in a process of its own. Returns the figures.

    Raises ModelError if the comparison could not be run, or was not done in time; the answers that it has by then are
    in `output`.
    """
    command = ["compare", asked.questions, "--limit", str(asked.limit), "--strategies", *asked.strategies]
    command += ["--max-new-tokens", str(asked.max_new_tokens)]
    command += ["--base-url", url, "--model", model, "--output", str(output)]
    try:
        done = subprocess.run([sys.executable, "-m", "decoding", *command], timeout=asked.patience)
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"the comparison was not done within {asked.patience:.0f} s; {output} has what there is."
        ) from None
    if done.returncode:
        raise ModelError(f"the comparison on {url} ended with {done.returncode}.")
    return summarize(read_run(output))
