"""The one error that every bad configuration ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the key, the value and the fix."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint such as ``did you mean 'n_group'?``, or the whole list of names where nothing is close.

    >>> did_you_mean("n_groups", ["n_group", "topk_group"])
    "did you mean 'n_group'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known names: {', '.join(names)}"
