"""The token-level engine. It knows token ids only: no text, no templates, no strategy names."""
