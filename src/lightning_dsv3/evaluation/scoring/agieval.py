"""AGIEval: choice letters, sets of letters, and blanks to fill, for the English and the Chinese files."""

import re
from collections.abc import Sequence

from .mathematics import is_equivalent, last_boxed
from .text import first_line, normalize_chinese

_LETTERS = re.compile(r"(?<![A-Za-z])[A-F]+(?![A-Za-z])")


def score_agieval_choice(prediction: str, label: str | Sequence[str]) -> dict[str, float]:
    """Letters against the label of a record.

    A label of one letter: the first capital letter A-F of the prediction (AGIEval's official rule). A label of several,
    or a list: the set of all letters A-F on the first line, up to its first full stop, must be the same set; one letter
    of two is wrong. A list without letters (there is one such record) is matched by no letter.

    Example:
        >>> score_agieval_choice(" A、C。因为B错", ["A", "C"]), score_agieval_choice("(D) because", "D")
        ({'acc': 1.0}, {'acc': 1.0})
    """
    if isinstance(label, str) and len(label) == 1:
        letter = re.search("[A-F]", prediction)
        return {"acc": float(letter is not None and letter.group() == label)}
    sentence = re.split(r"。|\.\s", first_line(prediction))[0]
    return {"acc": float(set("".join(_LETTERS.findall(sentence))) == set("".join(label)))}


def score_agieval_cloze(prediction: str, answer: str) -> dict[str, float]:
    r"""A blank, or several divided by ";": each must be mathematically equivalent (or the same Chinese text).

    The answer is the last ``\boxed``, else the first sentence. Its parts stand between ";", else they are its formulas
    between dollars, else they stand between commas.

    Example:
        >>> score_agieval_cloze(" $5$；$10$。", "$5$;$10$"), score_agieval_cloze(" 0.5", r"$\frac{1}{2}$")
        ({'acc': 1.0}, {'acc': 1.0})
    """
    golds = re.split("[;；]", answer)
    stated = last_boxed(prediction)
    if stated is None:
        stated = re.split(r"。|\.\s", first_line(prediction))[0].removesuffix(".")
    parts = re.split("[;；]", stated)
    formulas = re.findall(r"\$([^$]+)\$", stated.replace(r"\$", ""))
    if formulas and (len(golds) == 1 or len(parts) != len(golds)):
        parts = formulas[: len(golds)]
    elif len(parts) != len(golds):
        parts = re.split("[,，、]", stated)
    return {"acc": float(len(parts) == len(golds) and all(map(_matches, parts, golds)))}


def _matches(part: str, gold: str) -> bool:
    return is_equivalent(part, gold) or (not gold.isascii() and normalize_chinese(part) == normalize_chinese(gold))
