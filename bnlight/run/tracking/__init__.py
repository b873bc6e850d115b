"""Weights & Biases: a job's run, its pieces on disk, their upload, and its agents' command lines."""
