"""Where Hydra 1.3 finds bnlight's search-path plugin: `import bnlight` puts the folder above on `sys.path`."""

from bnlight.run.searchpath import BnlightSearchPath

__all__ = ["BnlightSearchPath"]
