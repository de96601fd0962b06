"""`python -m lesa` is the command `lesa`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
