"""The self-contained page of a comparison: one HTML file that asks nothing of the network.

Python writes the words, the tables and the runs' tidy data; `page.js` and its neighbours draw the figures
from those data, and compute their means and intervals again over what the reader's filter leaves.
"""

from bnlight.compare.page.document import render

__all__ = ["render"]
