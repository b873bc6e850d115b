"""Compare the norms of a sweep: read its jobs, say what the evidence supports, write a table and a page.

    from bnlight.compare import compare
    print(compare("outputs/norms"))

Neither torch nor Lightning nor Hydra is needed: a sweep's directory can be compared on any machine.
"""

from bnlight.compare.comparison import Comparison, compare
from bnlight.compare.read import Runs, read_runs
from bnlight.compare.stats import Cell, Estimate, estimate

__all__ = ["Cell", "Comparison", "Estimate", "Runs", "compare", "estimate", "read_runs"]
