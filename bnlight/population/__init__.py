"""The statistics by which evaluation normalizes: estimated, adapted, merged over ranks, pooled over micro-batches."""

from bnlight.population.correct import correct_inference
from bnlight.population.learned import UnconvergedAverages
from bnlight.population.pool import PooledStatistics, pool_statistics
from bnlight.population.precise import adapt_statistics, precise_statistics
from bnlight.population.reduce import reduce_statistics

__all__ = [
    "PooledStatistics",
    "UnconvergedAverages",
    "adapt_statistics",
    "correct_inference",
    "pool_statistics",
    "precise_statistics",
    "reduce_statistics",
]
