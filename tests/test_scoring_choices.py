"""Multiple choice and bits per byte, against lm-eval's formulas written out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dsv3.evaluation.scoring import bits_per_byte, score_choices


def test_each_rule_can_choose_another_option():
    options = ["a", "bbbbbbbbbb", "cc", "dddd"]
    scores = {
        gold: score_choices(
            options,
            gold,
            [-1.0, -8.0, -3.0, -4.0],  # the sum prefers a, the characters b
            num_tokens=[1, 5, 4, 2],  # -1, -1.6, -0.75, -2: c
            unconditional=[-1.0, -8.0, -3.0, -9.0],  # d gains most from the context
            full_log_likelihoods=[-5.0, -9.0, -7.0, -8.0],
            full_num_tokens=[1, 9, 8, 6],  # -5, -1, -0.875, -1.33: c
        )
        for gold in range(4)
    }
    right = {rule: [gold for gold in scores if scores[gold][rule] == 1.0] for rule in scores[0] if rule != "bpb"}
    assert right == {"acc": [0], "acc_norm": [1], "acc_ppl": [2], "acc_uncond": [3], "acc_ppl_full": [2]}


def test_a_rule_without_its_inputs_is_left_out():
    assert set(score_choices(["a", "b"], 0, [-1.0, -2.0])) == {"acc", "acc_norm", "bpb"}


def test_acc_norm_divides_by_characters_not_bytes():
    # per character -1.25 and -1.17, per byte -0.42 and -1.17
    assert score_choices(["中文中文", "abcdef"], 1, [-5.0, -7.0])["acc_norm"] == 1.0


def test_the_first_of_equals_is_chosen():
    scores = [score_choices(["aa", "bb"], gold, [-2.0, -2.0], num_tokens=[1, 1])["acc_ppl"] for gold in (0, 1)]
    assert scores == [1.0, 0.0]


def test_any_of_several_golds_is_right_and_the_best_counts_for_bits():
    scores = score_choices(["aa", "bb", "cc"], [1, 2], [-3.0, -2.0, -1.0])
    assert scores["acc"] == 1.0
    assert scores["bpb"] == pytest.approx(1 / (2 * math.log(2)))
    assert score_choices(["aa", "bb", "cc"], [0, 1], [-3.0, -2.0, -1.0])["acc"] == 0.0


options = st.lists(
    st.tuples(st.text(min_size=1, max_size=8), st.floats(-50, 0), st.integers(1, 9), st.floats(-50, 0)), min_size=1
)


@given(options, st.data())
def test_the_rules_are_their_formulas(rows, data):
    gold = data.draw(st.integers(0, len(rows) - 1))
    texts, sums, tokens, neutral = (list(column) for column in zip(*rows, strict=True))
    scores = score_choices(texts, gold, sums, num_tokens=tokens, unconditional=neutral)

    def chosen(quantity):
        best = 0
        for index, row in enumerate(rows):
            if quantity(*row) > quantity(*rows[best]):
                best = index
        return float(best == gold)

    assert scores["acc"] == chosen(lambda text, value, count, alone: value)
    assert scores["acc_norm"] == chosen(lambda text, value, count, alone: value / len(text))
    assert scores["acc_ppl"] == chosen(lambda text, value, count, alone: value / count)
    assert scores["acc_uncond"] == chosen(lambda text, value, count, alone: value - alone)


@given(st.lists(st.tuples(st.text(max_size=20), st.floats(-500, 0)), min_size=1).filter(lambda rows: any(rows[0][0])))
def test_bits_per_byte_is_that_of_lm_eval(rows):
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-eval comes with the extra [eval]")
    expected = metrics.bits_per_byte([(value, len(text.encode("utf-8"))) for text, value in rows])
    ours = bits_per_byte([value for _, value in rows], [text for text, _ in rows])
    assert ours == pytest.approx(expected, rel=1e-12)


def test_bits_are_per_byte_not_per_character():
    assert bits_per_byte([-math.log(2) * 12, 0.0], ["中文", "abcdef"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gold": 2}, "gold"),
        ({"gold": -1}, "gold"),
        ({"gold": []}, "gold"),
        ({"options": ["a", ""]}, "options"),
        ({"log_likelihoods": [-1.0]}, "log_likelihoods"),
        ({"log_likelihoods": [-1.0, math.nan]}, "log_likelihoods"),
        ({"num_tokens": [1, 0]}, "num_tokens"),
        ({"num_tokens": [1]}, "num_tokens"),
        ({"unconditional": [-1.0]}, "unconditional"),
        ({"full_num_tokens": [1, 2]}, "belong together"),
    ],
)
def test_bad_input_is_named(arguments, message):
    good = {"options": ["a", "b"], "gold": 0, "log_likelihoods": [-1.0, -2.0]}
    with pytest.raises(ValueError, match=message):
        score_choices(**(good | arguments))


def test_no_text_has_no_bits_per_byte():
    with pytest.raises(ValueError, match="texts"):
        bits_per_byte([0.0], [""])
    with pytest.raises(ValueError, match="shorter"):
        bits_per_byte([0.0, -1.0], ["a"])
