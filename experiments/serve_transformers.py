"""Plain decoding and Skeleton-of-Thought on `transformers serve`, on a CPU and without a network.

    python -m experiments.serve_transformers [QUESTIONS] [--model smollm2-135m] [--limit 4] [--max-new-tokens 160]

Makes an environment of its own for the server (transformers with its extra "serving"), starts it for a local
folder, runs `decoding compare` against it and stops it. This server does not continue messages that were begun
for it, so the outline is asked for by an instruction; nor does it cache prefixes.
"""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from decoding.cli import exit_code
from experiments.served import Asked, compared, environment, free_port, model_folder, served

# torch first: its version decides which build is installed.
INSTALL = (["install", "torch==2.13.0"], ["install", "transformers[serving]==5.23.0"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Asked.add_options(parser, patience=600)
    parser.add_argument("--venv", type=Path, default=Path(".venvs/transformers-serve"))
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder (%(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--continuous-batching", action="store_true", help="let the server batch requests together")
    parser.add_argument("--start-seconds", type=float, default=180, help="for the server to start (%(default)s)")
    parser.add_argument("--output", type=Path, help="run directory (runs/transformers-serve-DATE-TIME)")
    options = parser.parse_args()
    output = options.output or Path("runs") / f"transformers-serve-{datetime.now():%Y%m%d-%H%M%S}"
    programs = environment(options.venv, *INSTALL)
    folder, port = model_folder(options.model), free_port()
    command = [str(programs / "transformers"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", options.dtype]
    command += ["--continuous-batching"] if options.continuous_batching else []
    with served(command, port, log=output / "server.log", settings={}, patience=options.start_seconds) as url:
        compared(url, str(folder), output, Asked.of(options))


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
