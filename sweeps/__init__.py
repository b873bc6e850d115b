"""Sweeps: each file is a whole experiment, shipped as ``bnlight.sweeps``."""
