"""`python -m bnlight` is the `bnlight` command."""

import sys

from bnlight.cli import main

if __name__ == "__main__":
    sys.exit(main())
