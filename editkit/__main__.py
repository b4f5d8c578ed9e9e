"""`python -m editkit` is the command `editkit`."""

import sys

from editkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
