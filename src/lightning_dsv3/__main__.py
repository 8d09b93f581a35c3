"""``python -m lightning_dsv3 ...``: both commands under a name that no other package takes.

``run model SCRIPT ...`` is the launcher, ``presets``, ``config`` and ``corpus`` are words of ``dsv3``.
"""

import sys


def main() -> int:
    """Run the command that the words on the command line belong to."""
    if sys.argv[1:3] != ["run", "model"]:
        # Only here: the launcher starts, and hears Ctrl-C, before anything else is imported.
        from lightning_dsv3.cli import dsv3

        if sys.argv[1:2] and sys.argv[1] in dsv3.COMMANDS:
            return dsv3.main()
    from lightning_dsv3.cli import launcher

    return launcher.main()


if __name__ == "__main__":
    sys.exit(main())
