"""`python -m editkit` is the command `editkit`."""

import sys

from editkit.cli import main

sys.exit(main())
