"""What every peer's process does: load, say so, then answer one batch after another, as lines of JSON.

Standard library only, since it runs in each peer's own environment. Each peer's script calls `serve` with a function
from (prompts as text, the same prompts as token ids, new tokens) to the number of tokens made for each prompt.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[str], list[list[int]], int], list[int]]


def serve(load: Callable[[str, str, str], Generate]) -> None:
    """Run the protocol; `load` gets the Hugging Face folder, the GGUF file and the mode."""
    folder, gguf, mode = sys.argv[1:4]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the lines
    try:
        generate = load(folder, gguf, mode)
        print(json.dumps({"ready": True}), file=out)
        for line in sys.stdin:
            print(json.dumps(_answer(generate, json.loads(line))), file=out)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps(_failure(error)), file=out)


def _answer(generate: Generate, job: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        counts = generate(job["texts"], job["ids"], job["tokens"])
    except Exception as error:  # of this batch; the next may be one that the engine can do
        return _failure(error)
    return {"seconds": time.perf_counter() - began, "counts": counts}


def _failure(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}"[:300]}
