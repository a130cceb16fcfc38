"""Drafters for speculative decoding, one file each. Importing this package makes their names known."""

from drafters.cross_vocabulary import CrossVocabulary
from drafters.draft_model import DraftModel
from drafters.layer_skip import LayerSkip
from drafters.mixed import Mixed
from drafters.prompt_lookup import PromptLookup
from drafters.quantised import Quantised
from drafters.suffix import Suffix
from drafters.token_recycling import TokenRecycling

__all__ = [
    "CrossVocabulary",
    "DraftModel",
    "LayerSkip",
    "Mixed",
    "PromptLookup",
    "Quantised",
    "Suffix",
    "TokenRecycling",
]
