"""The command line: ``lightning run model`` and what its scripts read from it."""
