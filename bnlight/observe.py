"""Kept for one import."""

from bnlight.population.observe import unwrapped as unwrapped
