"""Scorers of text: stop strings, open answers, spans, Chinese, BBH and CRUXEval."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dsv3.evaluation.scoring import (
    extract_call,
    extract_output,
    score_answer,
    score_bbh,
    score_cluewsc,
    score_cmrc,
    score_cruxeval_output,
    score_drop,
    truncate,
)
from lightning_dsv3.evaluation.scoring.text import normalize_chinese, normalize_english


def test_a_text_is_cut_at_its_earliest_stop():
    assert truncate("a\n\nb Q: c", ["Q:", "\n\n"]) == "a"
    assert truncate("abc", ["x"]) == truncate("abc", []) == "abc"
    assert truncate("Q: a", ["Q:"]) == ""
    with pytest.raises(ValueError, match="stops"):
        truncate("a", ["b", ""])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles!", "beatles"),
        ("an A–B, theory", "ab theory"),
        ("“Don’t”", "dont"),
        ("March\xa010,\xa02017", "march 10 2017"),
        ("A+", "a+"),
        ("---", "---"),
        ("the", "the"),
        ("", ""),
    ],
)
def test_english_normal_form(text, normal):
    assert normalize_english(text) == normal


@pytest.mark.parametrize(
    ("text", "normal"),
    [("霍夫堡皇宫。", "霍夫堡皇宫"), ("ＡＢＣ（１）", "abc1"), (" “张 三”、……", "张三"), ("。", "。"), ("", "")],
)
def test_chinese_normal_form(text, normal):
    assert normalize_chinese(text) == normal


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        (" The Beatles.\nQ: next", ["fab four", "Beatles"], 1, 1),
        ("3-4 april 2018", ["3–4 April 2018"], 1, 1),
        ("John Winston Lennon", ["John Lennon"], 0, 0.8),
        ("red red", ["red"], 0, 2 / 3),
        ("A+", ["A+", "AB+"], 1, 1),
        ("B+", ["A+", "AB+"], 0, 0),
        ("Q", ["W"], 0, 0),
        ("", ["---"], 0, 0),
        ("the", [")"], 0, 0),
    ],
)
def test_open_answers(prediction, golds, exact, f1):
    assert score_answer(prediction, golds) == {"exact_match": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize("score", [score_answer, score_cluewsc, score_cmrc, score_drop])
@pytest.mark.parametrize("golds", ["gold", []])
def test_one_string_is_no_list_of_golds(score, golds):
    with pytest.raises(ValueError, match="golds"):
        score("gold", golds)


def test_cluewsc_accepts_every_true_noun():
    golds = ["西施", "女教师"]
    assert [score_cluewsc(text, golds)["exact_match"] for text in ("西施\n下句", " “女教师”。", "教师", "")] == [
        1,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("We count. So the answer is (B).", "(B)", 1),
        ("the answer is (B)", "(B)", 1),
        ("the answer is ] } ]", "] } ]", 1),
        ("the answer is ] } ].\nnot read", "] } ]", 1),
        ("the answer is A? No, the answer is valid.", "valid", 1),
        ("the answer is -50.", "-50", 1),
        ("the answer is ] }", "] } ]", 0),
        ("the answer is 3.5.", "3.", 0),
        ("(B)", "(B)", 0),
        ("the answer is", "(B)", 0),
        ("", "(B)", 0),
    ],
)
def test_bbh(prediction, gold, score):
    assert score_bbh(prediction, gold) == {"exact_match": score}


# The published script of CMRC 2018, written out again as loops (its Latin words cut at spaces, as it is fed no others).
CMRC_MARKS = ["-", ":", "_", "*", "^", "/", "\\", "~", "`", "+", "=", "，", "。", "：", "？", "！", "“", "”", "；", "’"]
CMRC_MARKS += ["《", "》", "……", "·", "、", "「", "」", "（", "）", "－", "～", "『", "』"]


def cmrc_bare(text):
    return "".join(char for char in text.lower().strip() if char not in CMRC_MARKS)


def cmrc_segments(text):
    found, latin = [], ""
    for char in text.lower().strip():
        if char in CMRC_MARKS:
            continue
        if re.search("[\u4e00-\u9fa5]", char):
            found += [*latin.split(), char]
            latin = ""
        else:
            latin += char
    return found + latin.split()


def cmrc_longest_run(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else 0
    return max(map(max, table))


def cmrc_f1(prediction, gold):
    ours, theirs = cmrc_segments(prediction), cmrc_segments(gold)
    run = cmrc_longest_run(ours, theirs)
    if not run:
        return 0.0
    precision, recall = run / len(ours), run / len(theirs)
    return 2 * precision * recall / (precision + recall)


cmrc_text = st.text(alphabet="天地人一 ，。、“”《》…-·ABb12", max_size=14)


@given(cmrc_text, st.lists(cmrc_text, min_size=1, max_size=3))
def test_cmrc_is_the_published_rule(prediction, golds):
    scores = score_cmrc(prediction, golds)
    answer = cmrc_bare(prediction)
    assert scores["exact_match"] == float(answer != "" and answer in map(cmrc_bare, golds))
    # nltk leaves an ellipsis whole, as the split at spaces does.
    assert scores["f1"] == pytest.approx(max(cmrc_f1(prediction, gold) for gold in golds))


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1", "loose"),
    [
        ("1990年，", ["1990年", "90年代"], 1, 1, 1),
        ("在1990年", ["1990年"], 0, 0.8, 0),
        ("好……", ["好"], 0, 2 / 3, 1),  # the official list cannot remove an ellipsis
        ("ＮＢＡ", ["NBA"], 0, 0, 1),
        ("Can't stop", ["can't"], 0, 0.8, 0),  # nltk: ca, n't, stop
        ("《红楼梦》", ["红楼梦"], 1, 1, 1),
        ("天人地", ["天地人"], 0, 1 / 3, 0),
        ("天" * 100, ["天" * 300], 0, 0.5, 0),
        ("", ["红楼梦"], 0, 0, 0),
        ("，", ["。"], 0, 0, 0),
    ],
)
def test_cmrc(prediction, golds, exact, f1, loose):
    expected = {"exact_match": exact, "f1": pytest.approx(f1), "exact_match_nfkc": loose}
    assert score_cmrc(prediction, golds) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        (" 83.9.\n\nQ: next", [("83.9",)], 1, 1),
        ("83.9%", [("83.9",)], 1, 1),
        ("83", [("83.9",)], 0, 0),
        ("839", [("83.9",)], 0, 0),
        ("$1,234.5", [("1234.5",)], 1, 1),
        ("12345", [("1,234.5",)], 0, 0),
        ("12.0", [("12",)], 1, 1),
        ("12 yards", [("12",)], 0, 0.67),
        ("the Bears", [("Chicago Bears",), ("Bears",)], 1, 1),
        ("March 5, 1999", [("5 March 1999",)], 0, 1),
        ("Smith, Jones", [("Jones", "Smith")], 1, 1),
        ("Smith; Jones", [("Jones", "Smith")], 1, 1),
        ("Smith", [("Jones", "Smith")], 0, 0.5),
        ("Smith, Jones, Brown", [("Jones", "Smith")], 0, 0.67),
        ("New York, NY, Boston", [("New York, NY", "Boston")], 1, 1),
        ("7, 1,000", [("1,000", "7")], 1, 1),
        ("", [("7",)], 0, 0),
        ("7", [("",)], 0, 0),
    ],
)
def test_drop(prediction, golds, exact, f1):
    pytest.importorskip("lm_eval", reason="lm-eval comes with the extra [eval]")
    assert score_drop(prediction, golds) == {"exact_match": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("prediction", "output"),
    [
        ("assert f('x') == 'y'\n[/ANSWER]\nassert f(1) == 2", "'y'"),
        ("assert f('a == b') == 'c == d'", "'c == d'"),
        ('[ANSWER]\nassert f(1) == "it\'s"\n[/ANSWER]', '"it\'s"'),
        ("assert f(1) == [2][/ANSWER] as f doubles", "[2]"),
        ("'plain'", "'plain'"),
        (" == [1,\n 2]", "[1,\n 2]"),
        ("{'a': 1}\nThis is because", "{'a': 1}"),
        ("assert f(3) == 1 + 1", "1 + 1"),
        ("the output is 3", ""),
        ("", ""),
    ],
)
def test_the_output_of_a_completion(prediction, output):
    assert extract_output(prediction) == output


@pytest.mark.parametrize(
    ("prediction", "call"),
    [
        ("assert f('a==b', [1]) == 3\n[/ANSWER]", "f('a==b', [1])"),
        ("f({'k': (1, 2)})", "f({'k': (1, 2)})"),
        ("assert f(')(') == 1\nmore text", "f(')(')"),
        ("assert g(1) == 1", None),
        ("os.f(1)", None),
        ("nonsense", None),
        ("f(", None),
    ],
)
def test_the_call_of_a_completion(prediction, call):
    assert extract_call(prediction) == call


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("assert f(1) == 'ab'", "'ab'", 1),
        ('assert f(1) == "ab"', "'ab'", 1),
        ("assert f(1) == ab", "'ab'", None),  # a bare name: only running it tells
        ("assert f(1) == 'a==b'", "'a==b'", 1),
        ("{2: 1, 1: 2}", "{1: 2, 2: 1}", 1),
        ("(1,)", "(1,)", 1),
        ("[1]", "(1,)", 0),
        ("'3'", "3", 0),
        ("''", "''", 1),
        ("'a' * 3", "'aaa'", None),
        ("f(3)", "3", None),
        ("'unclosed", "'unclosed'", 0),
        ("", "''", 0),
        ("(" * 5000, "1", 0),
    ],
)
def test_cruxeval_output(prediction, gold, score):
    assert score_cruxeval_output(prediction, gold) == (None if score is None else {"exact_match": score})


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet="ab=' \"\\\n[]", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)


@given(literals, literals)
def test_any_literal_scores_and_is_never_run(value, other):
    scores = score_cruxeval_output(f"assert f({value!r}) == {value!r}\n[/ANSWER]", repr(value))
    assert scores == {"exact_match": 1.0}
    assert score_cruxeval_output(repr(other), repr(value)) == {"exact_match": float(other == value)}
