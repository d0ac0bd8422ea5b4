"""Weights & Biases, from a process beside the run that reads the run folder."""
