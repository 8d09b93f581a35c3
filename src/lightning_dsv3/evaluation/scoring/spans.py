"""Answers that are spans of a passage: CMRC 2018 and DROP."""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from .text import first_line, normalize_chinese, require_golds

# The official list. Its "……" is two characters long and so never equals the one character that it is compared with:
# an ellipsis stays in the text, here as there.
_CMRC_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_HAN = re.compile("[\u4e00-\u9fa5]")


def score_cmrc(prediction: str, golds: Sequence[str]) -> dict[str, float]:
    """CMRC 2018: exact match and F1 by the official rule, each the best over the references.

    Exact match is equality after lower case and removal of a fixed list of punctuation. F1 is that of the longest
    common run of segments; a segment is one Chinese character or one word of anything else. ``exact_match_nfkc``
    beside them ignores width, whitespace and every punctuation mark. An empty prediction scores 0.

    Latin words are cut by nltk's word rules without its sentence model (which is a download): the result differs from
    the official one only where a full stop ends a sentence inside one run of Latin text.
    Source: cmrc2018_evaluate.py of ymcui/cmrc2018.

    Example:
        >>> score_cmrc("1990年，", ["1990年", "90年代"])
        {'exact_match': 1.0, 'f1': 1.0, 'exact_match_nfkc': 1.0}
    """
    require_golds(golds)
    answer, loose = _without_punctuation(prediction), normalize_chinese(prediction)
    segments = _segments(prediction)
    return {
        "exact_match": float(bool(answer) and answer in map(_without_punctuation, golds)),
        "f1": max(_run_f1(segments, _segments(gold)) for gold in golds),
        "exact_match_nfkc": float(bool(loose) and loose in map(normalize_chinese, golds)),
    }


def _without_punctuation(text: str) -> str:
    return "".join(char for char in text.lower().strip() if char not in _CMRC_PUNCTUATION)


def _segments(text: str) -> list[str]:
    segments: list[str] = []
    # The odd pieces are the Chinese characters.
    for index, piece in enumerate(re.split(f"({_HAN.pattern})", _without_punctuation(text))):
        segments += [piece] if index % 2 else _words(piece)
    return segments


def _words(text: str) -> list[str]:
    if text.isalnum() or not text.strip():
        return text.split()
    from nltk import word_tokenize

    return word_tokenize(text, preserve_line=True)


def _run_f1(predicted: list[str], gold: list[str]) -> float:
    matcher = SequenceMatcher(None, predicted, gold, autojunk=False)
    size = matcher.find_longest_match(0, len(predicted), 0, len(gold)).size
    return 2 * size / (len(predicted) + len(gold)) if size else 0.0


_QUANTITY = re.compile(r"(?<![\w.,])[$€£]?(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)%?(?![\w%])")


def score_drop(prediction: str, golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """DROP: exact match and F1 of `lm_eval.tasks.drop.utils`, the best over the references.

    The first line counts, without one final full stop. A reference of several spans is met by a list with commas: both
    sides are split at them. Currency, percent and thousands marks are taken off numbers first, as the metric would
    otherwise drop the point of ``83.9%`` and ``1,234.5``. Source: Dua et al. 2019; F1 is rounded to two digits there.

    Args:
        prediction: What follows "the answer is".
        golds: References; each is a tuple of spans (one for a number or a date).

    Example:
        >>> score_drop(" 83.9.", [("83.9",)])
        {'exact_match': 1.0, 'f1': 1.0}
    """
    from lm_eval.tasks.drop.utils import get_metrics

    require_golds(golds)
    answer = first_line(prediction).removesuffix(".")
    scores = [(0.0, 0.0)]
    for gold in golds:
        several = len(gold) > 1
        spans = [span for text in gold for span in _spans(text, several)]
        if answer.strip() and spans:
            scores.append(get_metrics(_spans(answer, several), spans))
    return {
        "exact_match": float(max(exact for exact, _ in scores)),
        "f1": float(max(f1 for _, f1 in scores)),
    }


def _spans(text: str, several: bool) -> list[str]:
    text = _QUANTITY.sub(lambda match: match["digits"].replace(",", ""), text)
    spans = re.split(r"[,;](?!\d)", text) if several else [text]
    return [span.strip() for span in spans if span.strip()]
