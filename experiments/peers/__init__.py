"""Other engines on the same model, side by side: `python -m experiments.peers`."""
