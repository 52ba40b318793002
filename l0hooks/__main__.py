"""``python -m l0hooks``: the command line."""

import sys

from l0hooks.calibration.cli import main

if __name__ == "__main__":
    sys.exit(main())
