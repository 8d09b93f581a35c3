"""The tasks, as YAML files for lm-eval, which looks for ``**/*.yaml`` here; the code behind them is a level up.

A package, although there is nothing to import: lm-eval's entry point names it, and a folder without this file has no
path of its own for `importlib.resources`.
"""
