"""Drafters for speculative decoding, one file each. Importing this package makes their names known."""

from drafters.draft_model import DraftModel
from drafters.prompt_lookup import PromptLookup

__all__ = ["DraftModel", "PromptLookup"]
