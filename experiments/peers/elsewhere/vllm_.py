"""vLLM on the CPU, float32. Modes: plain, ngram (its own prompt lookup)."""

from __future__ import annotations

import os

from worker import Generate, serve


def load(folder: str, gguf: str, mode: str) -> Generate:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    from vllm import LLM, SamplingParams

    extra: dict[str, object] = {}
    if mode == "ngram":
        extra["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3}
    model = LLM(folder, dtype="float32", max_model_len=1024, enable_prefix_caching=False, **extra)

    def generate(texts: list[str], ids: list[list[int]], tokens: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        answers = model.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]

    return generate


if __name__ == "__main__":
    serve(load)
