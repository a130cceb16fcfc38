"""Reading checkpoints through transformers: quietly, and whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from decoding.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_model(source: str, **options: Any) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, refusing a checkpoint that leaves weights at random values.

    Raises `ModelError` for that, and whatever transformers raises for everything else.
    """
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
    model, report = loaded
    if absent := sorted(map(str, report["missing_keys"] or report["mismatched_keys"])):
        raise ModelError(f"the weights in {source} do not fit its configuration: {absent[0]} is missing or misshapen.")
    return model


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and load reports; what matters in them is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of what a library said, which may be pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
