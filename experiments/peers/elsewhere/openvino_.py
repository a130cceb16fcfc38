"""OpenVINO GenAI, from the same GGUF file (4-bit weights)."""

from __future__ import annotations

import openvino_genai
from worker import Generate, serve


def load(folder: str, gguf: str, mode: str) -> Generate:
    pipeline = openvino_genai.LLMPipeline(gguf, "CPU")
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    config.ignore_eos = True
    config.apply_chat_template = False

    def generate(texts: list[str], ids: list[list[int]], tokens: int) -> list[int]:
        config.max_new_tokens = tokens
        result = pipeline.generate(texts, config)
        made = result.perf_metrics.get_num_generated_tokens()
        return [made // len(texts)] * len(texts)

    return generate


serve(load)
