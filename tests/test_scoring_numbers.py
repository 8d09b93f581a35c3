"""Numbers in text: every way in which GSM8K, MGSM and CMath write them."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dsv3.evaluation.scoring import score_cmath, score_gsm8k
from lightning_dsv3.evaluation.scoring.numbers import LANGUAGES, find_numbers, gold_number


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", []),
        ("none", []),
        ("12.0", ["12"]),
        ("1,234,567.50", ["1234567.5"]),
        ("1,25,000", ["125000"]),
        ("89, 71, 92", ["89", "71", "92"]),
        ("1,2", ["1", "2"]),
        ("(10,200)", ["10200"]),
        ("-10 and 5-3 and x=-2", ["-10", "5", "3", "-2"]),
        ("−4", ["-4"]),
        (".5 or 0.5", ["1/2", "1/2"]),
        ("3.", ["3"]),
        ("3/4, 6 / 9", ["3/4", "2/3"]),
        (r"\frac{3}{4} and \dfrac{1}{2}", ["3/4", "1/2"]),
        ("4分之3", ["3/4"]),
        ("四分之三", ["3/4"]),
        ("十二分之十一", ["11/12"]),
        ("百分之二十五", ["1/4"]),
        ("百分之12.5", ["1/8"]),
        ("二百零五分之一千零三", ["1003/205"]),
        ("一万两千分之一", ["1/12000"]),
        ("1又2/3, 1又3分之2, 一又三分之二", ["5/3", "5/3", "5/3"]),
        ("12%, 5 ％", ["0.12", "0.05"]),
        (r"7\%", ["0.07"]),
        ("１２．５ and ３／４", ["12.5", "3/4"]),
        ("১২ and ๑๒ and ౧౨", ["12", "12", "12"]),
        ("12cm²", ["12"]),
        ("1/0", []),
    ],
)
def test_numbers_are_found_in_order(text, numbers):
    assert find_numbers(text) == [Fraction(number) for number in numbers]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.125", ["2125"]),
        ("2,125", ["2125"]),
        ("2 125", ["2125"]),
        ("1.234.567,89", ["1234567.89"]),
        ("1,234.5", ["1234.5"]),
        ("12,5", ["12.5"]),
        ("12.5", ["12.5"]),
        ("0,125", ["0.125"]),
        ("320,00", ["320"]),
        ("1\u202f000 et 2\u00a0500", ["1000", "2500"]),
        ("23 786", ["23786"]),
        ("5 plus 12", ["5", "12"]),
    ],
)
def test_the_comma_is_the_decimal_mark_of_some_languages(text, numbers):
    assert find_numbers(text, decimal_comma=True) == [Fraction(number) for number in numbers]


@given(st.fractions(min_value=0), st.booleans())
def test_a_fraction_is_read_back(value, chinese):
    over, under = value.numerator, value.denominator
    text = f"{under}分之{over}" if chinese else f"{over}/{under}"
    assert find_numbers(f"共{text}份") == [value]


@given(st.integers(-(10**15), 10**15))
def test_a_grouped_number_is_read_back(number):
    assert find_numbers(f"= {number:,}.") == [number]
    assert find_numbers(f"= {number:,}".replace(",", "."), decimal_comma=True) == [number]


def test_a_gold_answer_is_one_number():
    assert gold_number("She has 2 + 3 = 5.\n#### 1,450,000") == 1450000
    assert gold_number("12%") == Fraction(12, 100)
    for gold in ("", "many", "1 or 2"):
        with pytest.raises(ValueError, match="gold"):
            gold_number(gold)


STRICT, FLEXIBLE = "exact_match", "exact_match_flexible"


@pytest.mark.parametrize(
    ("prediction", "gold", "strict", "flexible"),
    [
        ("3 + 4 = 7. The answer is 12.", "12", 1, 1),
        ("The answer is $12.00.", "12", 1, 1),
        ("The answer is 12%.", "12", 1, 1),
        ("The answer is 1,450,000 dollars", "1450000", 1, 1),
        ("The answer is -10.", "-10", 1, 1),
        ("The answer is 10.", "-10", 0, 0),
        ("The answer is 3. No: the answer is 12", "12", 1, 1),
        ("The answer is 12, not 13.", "12", 1, 0),
        ("so he has 12", "12", 0, 1),
        ("12 at first. The answer is 13.", "12", 0, 0),
        ("The answer is 120.", "12", 0, 0),
        ("The answer is 12.5.", "12", 0, 0),
        ("The answer is 12/5.", "12", 0, 0),
        ("The answer is twelve.", "12", 0, 0),
        ("", "12", 0, 0),
    ],
)
def test_gsm8k(prediction, gold, strict, flexible):
    assert score_gsm8k(prediction, gold) == {STRICT: strict, FLEXIBLE: flexible}


# One hand-made ending for each language, in the words of its exemplars.
ENDINGS = {
    "bn": "উত্তর হল ২১২৫।",
    "de": "Die Antwort lautet 2.125.",
    "en": "The answer is 2,125.",
    "es": "La respuesta es 2 125.",
    "fr": "La réponse est 2\u202f125.",
    "ja": "答えは２１２５です。",
    "ru": "Ответ — 2125.",
    "sw": "Jibu ni 2125.",
    "te": "సమాధానం ౨౧౨౫.",
    "th": "คำตอบคือ ๒๑๒๕",
    "zh": "答案是 2125。",
}


def test_every_language_has_its_ending():
    assert set(ENDINGS) == LANGUAGES


@pytest.mark.parametrize("language", sorted(ENDINGS))
def test_mgsm(language):
    prediction = f"7 + 8 = 15. {ENDINGS[language]}"
    assert score_gsm8k(prediction, "2,125", language) == {STRICT: 1.0, FLEXIBLE: 1.0}
    assert score_gsm8k(prediction, "2126", language) == {STRICT: 0.0, FLEXIBLE: 0.0}
    assert score_gsm8k(prediction, "15", language) == {STRICT: 0.0, FLEXIBLE: 0.0}


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language"):
        score_gsm8k("1", "1", "xx")


OFFICIAL = "exact_match_official"


@pytest.mark.parametrize(
    ("prediction", "gold", "strict", "official"),
    [
        ("3 乘 4 得 12。所以答案是：12。", "12", 1, 1),
        ("所以答案是12", "12", 1, 1),
        ("所以答案是：12 个，不是 13 个。", "12", 1, 1),
        ("所以答案是：1/3。", "2/6", 1, 1),
        ("所以答案是：0.75。", "3/4", 1, 1),
        ("所以答案是：4分之3。", "3/4", 1, 1),
        (r"所以答案是：\frac{3}{4}。", "3/4", 1, 1),
        ("所以答案是：5%。", "0.05", 1, 1),
        ("所以答案是：0.05。", "5%", 1, 1),
        ("所以答案是：5。", "5%", 0, 0),
        # the official rule knows no Chinese numerals and no mixed numbers
        ("所以答案是：四分之三。", "3/4", 1, 0),
        # it forgives one per cent, but not between whole numbers
        ("所以答案是：100.5。", "100", 0, 1),
        ("所以答案是：101。", "100", 0, 0),
        ("所以答案是：102.0。", "100", 0, 0),
        # and takes either of the last two numbers
        ("先得 12。所以答案是：13。", "12", 0, 1),
        ("先得 12。再得 7。所以答案是：13。", "12", 0, 0),
        ("一共12个", "12", 1, 1),
        ("12", "12", 1, 1),
        ("=12", "12", 1, 1),
        ("1,200米", "1200", 1, 1),
        ("x12y", "12", 1, 0),
        ("", "12", 0, 0),
        ("不知道", "12", 0, 0),
    ],
)
def test_cmath(prediction, gold, strict, official):
    assert score_cmath(prediction, gold) == {STRICT: strict, OFFICIAL: official}


@given(st.text(alphabet="0123456789./%,- 分之答案是：。\n{}\\frac", max_size=60))
def test_any_text_gets_a_verdict(text):
    for scores in (score_cmath(text, "7/3"), score_gsm8k(text, "-7")):
        assert set(scores.values()) <= {0.0, 1.0}
