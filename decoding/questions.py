"""Questions to run strategies on, read from files."""
