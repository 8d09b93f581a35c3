"""``python -m lightning_dsv3 ...``: both commands under a name that no other package takes.

``run model SCRIPT ...`` is the launcher, ``presets``, ``config`` and ``corpus`` are words of ``dsv3``.
"""

import sys

from lightning_dsv3.cli import dsv3, launcher

if __name__ == "__main__":
    sys.exit(dsv3.main() if sys.argv[1:2] and sys.argv[1] in dsv3.COMMANDS else launcher.main())
