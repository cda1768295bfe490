"""`python -m loracurve`: the command, where its script is not on the path."""

import sys

from loracurve.cli import main

if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
