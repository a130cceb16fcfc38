"""Trained heads that draft from the target's hidden states: architectures, checkpoints, and where shipped ones lie."""
