"""``python -m nvpflow``."""

import sys

from nvpflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
