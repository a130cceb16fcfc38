"""The metrics of an answer that was assembled from several generations: an outline and its points, or turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from decoding.trace import Metrics, Step, measure
from decoding.types import Generation


def assembled_metrics(parts: Sequence[Generation], trace: Sequence[Step], *, seconds: float) -> Metrics:
    """From the steps of all parts where there are any; a server shows none, and then the parts' counts are added up.

    parts: in the order they were begun, the first one together with the answer. trace: their steps.
    seconds: from the beginning to the end of the whole.
    """
    every = [part.metrics for part in parts]
    metrics = measure(trace, seconds=seconds, prompt_tokens=sum(part.prompt_tokens for part in every))
    if trace or not every:
        return metrics
    return replace(
        metrics,
        first_token_seconds=every[0].first_token_seconds,
        reused_tokens=sum(part.reused_tokens for part in every),
        prefill_tokens=sum(part.prefill_tokens for part in every),
        new_tokens=sum(part.new_tokens for part in every),
    )
