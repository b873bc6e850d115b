"""Hydra config groups, shipped as ``bnlight.conf``."""
