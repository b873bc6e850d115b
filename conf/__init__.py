"""Hydra config groups, shipped as ``bnlight.conf``; whoever opens them has the resolver that they use."""

from bnlight.run import arithmetic

arithmetic.register()
