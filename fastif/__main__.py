"""`python -m fastif`."""

import sys

from fastif.cli import main

if __name__ == "__main__":
    sys.exit(main())
