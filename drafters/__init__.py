"""Drafters for speculative decoding, one file each. Importing this package makes their names known."""

from drafters.cross_vocabulary import CrossVocabulary
from drafters.draft_model import DraftModel
from drafters.eagle3 import Eagle3
from drafters.layer_skip import LayerSkip
from drafters.medusa import Medusa
from drafters.mixed import Mixed
from drafters.prompt_lookup import PromptLookup
from drafters.quantised import Quantised
from drafters.suffix import Suffix
from drafters.token_recycling import TokenRecycling

__all__ = [
    "CrossVocabulary",
    "DraftModel",
    "Eagle3",
    "LayerSkip",
    "Medusa",
    "Mixed",
    "PromptLookup",
    "Quantised",
    "Suffix",
    "TokenRecycling",
]
