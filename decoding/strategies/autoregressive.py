"""Plain decoding: one token per forward pass. The baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from decoding.engine.block import Commit
from decoding.engine.confirm import confirm
from decoding.engine.decoder import Decoder
from decoding.strategies.base import TokenStrategy

if TYPE_CHECKING:
    from decoding.backends.local import LocalBackend
    from decoding.engine.output import Output
    from decoding.engine.sequence import Sequence


@dataclass(frozen=True)
class Autoregressive(TokenStrategy):
    """One token per forward pass."""

    name: ClassVar[str] = "autoregressive"
    summary: ClassVar[str] = "one token per forward pass; the baseline"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})

    @property
    def lossless(self) -> bool:
        return True

    def decoder(self, backend: LocalBackend) -> Decoder:
        return AutoregressiveDecoder()


class AutoregressiveDecoder(Decoder):
    """Guesses nothing and takes the model's next token."""

    def commit(self, sequences: List[Sequence], output: Output) -> list[Commit]:
        return confirm(output)
