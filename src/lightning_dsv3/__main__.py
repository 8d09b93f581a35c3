"""``python -m lightning_dsv3 run model ...``: the command under a name that no other package takes."""

import sys

from lightning_dsv3.cli.launcher import main

if __name__ == "__main__":
    sys.exit(main())
