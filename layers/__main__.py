"""`python -m layers`."""

import sys

from layers.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
