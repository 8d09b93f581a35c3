r"""Numbers in generated text, as exact rationals: GSM8K, MGSM and CMath.

`find_numbers` reads digits of any script, thousands marks, decimals, fractions (``3/4``, ``\frac{3}{4}``, ``4分之3``,
``四分之三``, ``1又2/3``) and percent. Equality of rationals makes 12.0 equal 12 and 2/6 equal 1/3, with no tolerance.
"""

import re
import unicodedata
from fractions import Fraction

# An answer marker of each MGSM language, in the words of its exemplars; the English one serves GSM8K too.
_MARKER = re.compile(
    r"the answer is|die antwort (?:ist|lautet)|la respuesta es|la réponse est|jibu ni|ответ|答案是|答えは"
    r"|উত্তর হল|సమాధానం|คำตอบคือ",
    re.IGNORECASE,
)
_COMMA_LANGUAGES = {"de", "es", "fr", "ru"}
LANGUAGES = _COMMA_LANGUAGES | {"bn", "en", "ja", "sw", "te", "th", "zh"}

_WIDE = str.maketrans("％／．－−", "%/.--")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
# Thousands marks. With a decimal point groups may hold two digits (1,25,000); where the comma is the decimal mark, any
# one mark may group, and exactly three digits after it make a group: 2.125 is 2125, as 2,125 is in MGSM's own answers.
_POINT_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:[,'’\u00a0\u2009\u202f]\d{2,3})*[,'’\u00a0\u2009\u202f]\d{3}(?!\d)")
_COMMA_GROUPS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}([.,'’ \u00a0\u2009\u202f])\d{3}(?:\1\d{3})*(?!\d)")
_MARKS = re.compile(r"\D")

_DIGITS = r"(?:\d+(?:\.\d+)?|\.\d+)"
_HAN = "零〇一二两三四五六七八九十百千万"
_WORD = rf"(?:{_DIGITS}|[{_HAN}]+)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![0-9A-Za-z)])-)?(?:(?P<whole>{_WORD})\s*又\s*)?"
    rf"(?:(?P<under>{_WORD})\s*分之\s*(?P<over>{_WORD})"
    rf"|(?P<value>{_DIGITS})(?:\s*/\s*(?P<by>{_DIGITS}))?(?P<percent>\s*\\?%)?)"
)


def find_numbers(text: str, *, percent: bool = True, decimal_comma: bool = False) -> list[Fraction]:
    """Every number of a text, in order.

    Args:
        text: Any text.
        percent: Divide by 100 what has a percent sign; otherwise the sign is ignored.
        decimal_comma: Read 1.234,5 and 1 234,5 (German, French, ...) instead of 1,234.5.

    Example:
        >>> find_numbers("三分之二, 12%, １,200 and 3.50")
        [Fraction(2, 3), Fraction(3, 25), Fraction(1200, 1), Fraction(7, 2)]
    """
    text = "".join(str(unicodedata.decimal(char, char)) for char in text).translate(_WIDE)
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    groups = _COMMA_GROUPS if decimal_comma else _POINT_GROUPS
    text = groups.sub(lambda match: _MARKS.sub("", match.group()), text)
    if decimal_comma:
        text = re.sub(r"(?<=\d),(?=\d)", ".", text)
    values = (_value(match, percent) for match in _NUMBER.finditer(text))
    return [value for value in values if value is not None]


def _value(match: re.Match[str], percent: bool) -> Fraction | None:
    """The value of one match of `_NUMBER`; None if it has no value (division by zero, thousands of digits)."""
    part = match.groupdict()
    try:
        if part["under"]:
            value = _word(part["over"]) / _word(part["under"])
        else:
            value = Fraction(part["value"]) / Fraction(part["by"] or 1)
        value += _word(part["whole"] or "0")
    except (ZeroDivisionError, ValueError):
        return None
    if percent and part["percent"]:
        value /= 100
    return -value if part["sign"] else value


def _word(text: str) -> Fraction:
    """Digits or a Chinese numeral up to 万, such as 百 (100), 十二 (12), 二百零五 (205)."""
    if text[0] not in _HAN:
        return Fraction(text)
    total = group = digit = 0
    for char in text:
        place = {"十": 10, "百": 100, "千": 1000}.get(char)
        if char == "万":
            total, group, digit = (total + group + digit or 1) * 10_000, 0, 0
        elif place:
            group, digit = group + (digit or 1) * place, 0
        else:
            digit = {"〇": 0, "两": 2}.get(char, "零一二三四五六七八九".find(char))
    return Fraction(total + group + digit)


def gold_number(gold: str) -> Fraction:
    """The one number of a gold answer: ``2,125``, ``2/6``, ``12%``, or a GSM8K solution that ends in ``#### N``."""
    numbers = find_numbers(gold.rpartition("####")[2])
    if len(numbers) != 1:
        raise ValueError(f"gold must hold exactly one number, got {gold!r}")
    return numbers[0]


def score_gsm8k(prediction: str, gold: str, language: str = "en") -> dict[str, float]:
    """GSM8K and the eleven languages of MGSM: equality with the gold number.

    ``exact_match`` takes the first number after the last answer marker ("The answer is", "答案是", ...);
    ``exact_match_flexible`` the last number of the text. Currency and percent signs do not matter. Cut the generation
    at the next question first.

    Args:
        prediction: The chain of thought and its answer.
        gold: The gold answer, or a GSM8K solution with its ``#### N``.
        language: Code of the text's language, for its way to write numbers.

    Example:
        >>> score_gsm8k("Er zahlt 2 x 1.062,50. Die Antwort ist 2.125 €.", "2,125", "de")
        {'exact_match': 1.0, 'exact_match_flexible': 1.0}
    """
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {sorted(LANGUAGES)}, got {language!r}")
    comma = language in _COMMA_LANGUAGES
    target = gold_number(gold)
    markers = list(_MARKER.finditer(prediction))
    tail = prediction[markers[-1].end() :] if markers else ""
    marked = find_numbers(tail, percent=False, decimal_comma=comma)
    found = find_numbers(prediction, percent=False, decimal_comma=comma)
    return {
        "exact_match": float(marked[:1] == [target]),
        "exact_match_flexible": float(found[-1:] == [target]),
    }


def score_cmath(prediction: str, gold: str) -> dict[str, float]:
    """CMath, strictly and as its authors score it.

    ``exact_match``: the first number after the last 答案是 (without one: the last number) equals the gold number
    exactly, so 2/6 is 1/3, 3/4 is 0.75 and 5% is 0.05.
    ``exact_match_official``: one of the last two candidates is equal (two whole numbers) or within one per cent. A
    candidate is a number that stands between Chinese characters, some signs and the ends of its line (utils.py of
    XiaoMi/cmath, whose published script stops with an error at a wrong call).

    Example:
        >>> score_cmath("一共 3 份, 取 1 份。所以答案是：1/3。", "2/6")
        {'exact_match': 1.0, 'exact_match_official': 1.0}
    """
    target = gold_number(gold)
    _, marker, tail = prediction.rpartition("答案是")
    found = find_numbers(tail)
    answer = found[:1] if marker else found[-1:]
    close = (_close(gold, candidate) for candidate in _official_candidates(prediction)[-2:])
    return {"exact_match": float(answer == [target]), "exact_match_official": float(any(close))}


_PLAIN = r"\d+[./]?\d*%?"
_CJK = "\u4e00-\u9fa5"
_STOPS = rf"(?: ?[{_CJK},，。°℃$}}（]| ?\([^\d\s]|\.$)"
# The official contexts, in the official order: it decides which two are the last.
_OFFICIAL = [
    re.compile(rf"^({_PLAIN})(?= ?[{_CJK},，。°℃$])"),
    re.compile(rf"(?<=[{_CJK}$:：，＝≈=>{{]) ?({_PLAIN})(?={_STOPS})"),
    re.compile(r"(\d+)分之(\d+)"),
    re.compile(rf"(?<=[{_CJK}$:：＝≈=>-]) ?({_PLAIN})$"),
    re.compile(rf"^({_PLAIN})$"),
]


def _official_candidates(text: str) -> list[str]:
    text = re.sub(r"(?<=\d)[, ](?=\d)", "", re.sub(r"\\frac{([^}]+)}{([^}]+)}", r"\1/\2", text))
    found: list[str] = []
    for line in text.splitlines():
        for pattern in _OFFICIAL:
            # "4分之3" has two groups and is 3/4.
            found += ["/".join(reversed(match.groups())) for match in pattern.finditer(line)]
    return [candidate for candidate in found if not candidate.endswith("/")]


def _close(gold: str, candidate: str) -> bool:
    if gold.isdigit() and candidate.isdigit():
        return gold.lstrip("0") == candidate.lstrip("0")
    target, values = gold_number(gold), find_numbers(candidate)
    if len(values) != 1:
        return False
    return abs(target - values[0]) / (min(abs(target), abs(values[0])) + Fraction(1, 10**6)) < Fraction(1, 100)
