"""What every scorer of generated text starts from: cutting a generation, and two plain normal forms.

A scorer is a pure function ``score_x(prediction, gold, ...) -> {metric: value}`` with values in 0..1. The prediction
is what the model wrote after the prompt; an empty one never scores.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def truncate(text: str, stops: Sequence[str]) -> str:
    r"""Cut a generation at the earliest of its stop strings.

    Args:
        text: What the model wrote.
        stops: Stop strings, none of them empty; the one that begins first in the text wins.

    Returns:
        The text before that stop string, or all of it.

    Raises:
        ValueError: If a stop string is empty, as it would cut everything away.

    Example:
        >>> truncate("42.\n\nQ: and then?", ["\n\n", "Q:"])
        '42.'
    """
    if not all(stops):
        raise ValueError("stops: an empty stop string would cut every text to nothing; remove it from the list")
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def first_line(text: str) -> str:
    """The first line that holds anything, without surrounding whitespace ('' if there is none)."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char)[0] == "P"


def normalize_english(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces (after NFKC).

    Non-ASCII punctuation goes too (dashes, typographic quotes). An answer that would vanish, such as ``A+`` or ``---``,
    is kept in lower case as it is: nothing must not equal nothing.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    bare = _ARTICLES.sub(" ", "".join(char for char in text if not _is_punctuation(char)))
    return " ".join(bare.split()) or " ".join(text.split())


def normalize_chinese(text: str) -> str:
    """NFKC, lower case, no whitespace, no punctuation of either width; an answer that would vanish keeps it."""
    text = "".join(unicodedata.normalize("NFKC", text).lower().split())
    return "".join(char for char in text if unicodedata.category(char)[0] != "P") or text


def score_answer(prediction: str, golds: Sequence[str]) -> dict[str, float]:
    """TriviaQA and NaturalQuestions: exact match with any alias, and token F1 beside it (the best alias).

    Only the first line of the prediction counts: the prompt is a list of ``Q: ..`` / ``A: ..`` lines (DeepSeek-V2
    report, tables 30 and 34). Source of the rule: Rajpurkar et al. 2016, evaluation of SQuAD.

    Example:
        >>> score_answer(" The Beatles.", ["Beatles", "the fab four"])
        {'exact_match': 1.0, 'f1': 1.0}
    """
    require_golds(golds)
    answer = normalize_english(first_line(prediction))
    references = [normalize_english(gold) for gold in golds]
    return {
        "exact_match": float(bool(answer) and answer in references),
        "f1": max(_token_f1(answer.split(), reference.split()) for reference in references),
    }


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold)) if common else 0.0


def score_cluewsc(prediction: str, golds: Sequence[str]) -> dict[str, float]:
    """CLUEWSC: exact match of the normalised first line with any noun that the pronoun may mean.

    The gold list holds every true ``span1_text`` of the same text and pronoun.

    Example:
        >>> score_cluewsc("“女教师”。", ["西施", "女教师"])
        {'exact_match': 1.0}
    """
    require_golds(golds)
    answer = normalize_chinese(first_line(prediction))
    return {"exact_match": float(bool(answer) and answer in map(normalize_chinese, golds))}


def score_bbh(prediction: str, gold: str) -> dict[str, float]:
    """BIG-Bench Hard: exact match of what follows the last "the answer is" on its line.

    One full stop at the end is taken off, never another last character (the brackets of Dyck words are answers).
    Cut the generation at the next question first. Source: Suzgun et al. 2022.

    Example:
        >>> score_bbh("The stack is empty. So the answer is ] } ].", "] } ]")
        {'exact_match': 1.0}
    """
    _, marker, rest = prediction.rpartition("the answer is")
    answer = rest.partition("\n")[0].strip().removesuffix(".")
    return {"exact_match": float(bool(marker) and answer.split() == gold.split() != [])}


def require_golds(golds: Sequence[object]) -> None:
    """Refuse a bare string (each of its letters would count as an answer) and an empty list."""
    if isinstance(golds, str) or not golds:
        raise ValueError(f"golds must be a non-empty list of accepted answers, got {golds!r}")
