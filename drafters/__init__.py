"""Drafters for speculative decoding, one file each. Importing this package makes their names known."""

from drafters.draft_model import DraftModel
from drafters.prompt_lookup import PromptLookup
from drafters.suffix import Suffix
from drafters.token_recycling import TokenRecycling

__all__ = ["DraftModel", "PromptLookup", "Suffix", "TokenRecycling"]
