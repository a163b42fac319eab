"""`python -m pyfast` is the `pyfast` command."""

import sys

from pyfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
