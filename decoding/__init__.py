"""Parallel decoding."""
