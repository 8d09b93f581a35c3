r"""Answers of MATH and AGIEval: what is equal, what is not, and that no answer can hold up the evaluation."""

import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dsv3.evaluation.scoring import is_equivalent, score_agieval_choice, score_agieval_cloze, score_math
from lightning_dsv3.evaluation.scoring.mathematics import extract_answer, is_readable, last_boxed, normalize_answer

pytest.importorskip("latex2sympy2_extended", reason="the reader of formulas comes with the extra [eval]")

EQUAL = [
    # layout
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"\frac 34", r"\tfrac{3}{4}"),
    (r"\left( \frac{1}{2}, 3 \right)", r"(\frac12,3)"),
    (r"$\sqrt7$", r"\sqrt{7}"),
    (r"x^{10}", "x^10"),
    (r"4 \cdot 5^x", r"4\times5^{x}"),
    (r"\begin{pmatrix} -1 \\ -8 \end{pmatrix}", r"\begin{pmatrix}-1\\-8\end{pmatrix}"),
    # numbers
    ("0.5", r"\frac{1}{2}"),
    (".5", "0.50"),
    ("6.0", "6"),
    ("1/3", r"\frac{2}{6}"),
    ("3/4", "0.75"),
    (r"3\frac{1}{2}", "3.5"),
    (r"-1 \frac12", "-1.5"),
    ("−7", "-7"),
    (r"371,\!043,\!400", "371043400"),
    ("1{,}000", "1,000"),
    (r"\$16,\!386.16", "16386.16"),
    ("$115,000", r"\$115,000"),
    (r"\frac{12}{5,\!525}", "12/5525"),
    # units and words
    (r"44\%", "44"),
    (r"25^\circ", "25^{\\circ}"),
    ("25°", "25"),
    (r"12\text{ square feet}", "12"),
    (r"8\sqrt{3} \text { square inches}", r"8\sqrt3"),
    (r"5\sqrt{3} cm", r"5\sqrt{3}"),
    ("575 students", "575"),
    (r"17\,\mathrm{cm}^2", "17"),
    (r"12\text{ and }13", "12, 13"),
    ("12 and 13", "13,12"),
    (r"\text{(D)}", "D"),
    (r"\text{Sunday}", "sunday"),
    (r"\textcircled{1}\textcircled{3}", "①③"),
    # x = ...
    ("x = 3", "3"),
    ("f(x)=x^2", "x^2"),
    (r"x \in [1,2]", "[1,2]"),
    # values
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\frac{\sqrt5-1}{2}", r"-\frac{1}{2}+\frac{\sqrt{5}}{2}"),
    (r"\sqrt[3]{8}", "2"),
    (r"10^{-3}", "0.001"),
    (r"\log_2 8", "3"),
    ("6+9i", "9i+6"),
    ("(1+i)^2", "2i"),
    (r"e^{i\pi}", "-1"),
    (r"-\frac{7}{17}", r"\frac{-7}{17}"),
    # formulas
    ("x^2+2x+1", "(x+1)^2"),
    (r"7z^{96}(4z+1)", r"28z^{97}+7z^{96}"),
    (r"\frac{1}{x+\frac{1}{y}}", r"\frac{y}{xy+1}"),
    (r"\tan x", r"\frac{\sin x}{\cos x}"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"2^{n-4}", r"\frac{2^n}{16}"),
    # collections
    ("1,-2", "-2,1"),
    (r"5,\sqrt{16}", "5,4"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"(-\infty,-8)\cup (8,\infty)", r"(8,\infty)\cup(-\infty,-8)"),
    ("(1,2),(3,4)", "(3,4),(1,2)"),
    (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix}0.5\\2\end{pmatrix}"),
    # relations
    ("4x-5y=-50", "5y-4x=50"),
    ("2x=4y", "x-2y=0"),
    ("y = 2x", "2x-y=0"),
    ("x<1", "1>x"),
    ("-x<-3", "x>3"),
    (r"x \leq 3", r"3\ge x"),
]
DIFFERENT = [
    ("4", "16"),
    ("-4", "4"),
    ("100000", "100000.1"),
    ("0", "1"),
    ("1,000", "1"),
    ("0.33", "1/3"),
    ("3.14159", r"\pi"),
    (r"\frac{22}{7}", r"\pi"),
    (r"\frac{x}{y}", r"\frac{y}{x}"),
    ("x+1", "x+2"),
    ("x", "y"),
    ("x^2", "2x"),
    ("6+9i", "6-9i"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1,2,3)"),
    ("(10,200)", "10200"),
    ("[-36,104]", "-36104"),
    ("[1,2)", "[1,2]"),
    ("[1,2)", "(1,2)"),
    ("[1,2]", "[1,3]"),
    ("1,2", "1,3"),
    ("1,2", "1"),
    (r"2,\sqrt{4}", "2,3"),
    (r"(-\infty,-8)\cup (8,\infty)", r"(-\infty,8)"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("4x-5y=-50", "4x-5y=50"),
    ("x^2+y^2=1", "x^2+y^2=2"),
    ("4x-5y=-50", "-50"),
    ("x<1", "x>1"),
    ("x<3", r"x\le3"),
    ("x<1", "-x<-1"),
    ("204_5", "204_6"),
    ("204_5", "204"),
    ("3:1", "3"),
    ("1.2.3", "0.36"),
    ("B", "C"),
    ("B", "B,C"),
    (r"\text{Monday}", "Sunday"),
    ("AB", "BA"),
    ("", "0"),
    ("", ""),
    ("no idea", "7"),
    (r"\begin{pmatrix}1&2\end{pmatrix}x=1", "x=1"),
    # the value of a power tower is far beyond a float, and nothing is near infinity
    ("((((((x+1)^9)^9)^9)^9)^9)", r"\sqrt{2}+x"),
    (r"\frac{0}{0}", r"\frac{1}{0}"),
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_equal_answers(first, second):
    assert is_equivalent(first, second)
    assert is_equivalent(second, first)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_answers(first, second):
    assert not is_equivalent(first, second)
    assert not is_equivalent(second, first)


# math-verify reads these otherwise, on purpose here: it drops the base of a numeral and what follows a colon, and
# orders letters; a sentence is not an answer to it. It takes no limits of size.
OTHERWISE = {"204_5", "3:1", "1.2.3", "AB", "4x-5y=-50", "", "no idea", r"\begin{pmatrix}1&2\end{pmatrix}x=1"}
OTHERWISE |= {"((((((x+1)^9)^9)^9)^9)^9)", r"\frac{0}{0}", "(10,200)", "[-36,104]", "x<1"}


@pytest.mark.parametrize(("first", "second"), [pair for pair in DIFFERENT if pair[0] not in OTHERWISE])
def test_math_verify_finds_them_different_too(first, second):
    math_verify = pytest.importorskip("math_verify")
    assert not math_verify.verify(math_verify.parse(f"${second}$"), math_verify.parse(f"${first}$"))


HOSTILE = [
    r"9^{9^{9^9}}",
    r"99^{99^{99}}",
    "2^{999999999}",
    r"2^{99\cdot99\cdot99\cdot99}",
    "((((((2^{99})^{99})^{99})^{99})^{99})^{99})",
    "9999999!",
    r"\binom{10^9}{10^8}",
    r"\sum_{n=1}^{10^9} n",
    r"\int_0^1 x^x dx",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{10^9}",
    "(a+b+c+d)^{99}",
    "(" * 40 + "1" + ")" * 40,
    "|x" * 80,
    "(x+1)" * 5000,
    "9" * 5000,
    r"\frac{1}{" * 500,
    "\0\0",
]


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: answer[:20])
def test_a_hostile_answer_is_not_even_read(answer):
    start = time.process_time()
    assert not is_readable(answer)
    assert not is_equivalent(answer, r"\sqrt{2}+x")
    assert time.process_time() - start < 5


PIECES = (
    r"x y 1 2 7 + - ( ) { } [ ] \frac{1}{2} \sqrt{2} \pi ^2 ^{n} _1 , = < \cup \infty \pm | \sin i e . / & \\ "
    r"\begin{pmatrix}1&2\end{pmatrix} \frac{0}{0} \{1,2\} (1,2) [0,\infty) \emptyset $ \text{ % ="
)
pieces = st.sampled_from(PIECES.split(" "))


@settings(max_examples=60)
@given(st.lists(pieces, max_size=10).map(" ".join), st.sampled_from([r"\sqrt{2}+z", r"(z,\sqrt{2})", r"z<\sqrt{2}"]))
def test_any_answer_gets_a_verdict_and_equals_itself(answer, gold):
    assert not is_equivalent(answer, gold)
    assert is_equivalent(answer, answer) == bool(normalize_answer(answer))


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6), st.integers(1, 50))
def test_fractions_equal_in_any_terms(over, under, factor):
    assert is_equivalent(rf"\frac{{{over}}}{{{under}}}", f"{over * factor}/{under * factor}")
    assert not is_equivalent(rf"\frac{{{over}}}{{{under}}}", f"{over * factor + 1}/{under * factor}")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "$[2,5)$"),
        ("The final answer is $24$. I hope it is correct.\n\nProblem: The final answer is $3$.", "$24$"),
        ("The final answer is: 1.5", "1.5"),
        (r"The final answer is $2+3 = \boxed{5}.$", "5"),
        (r"so $\boxed{1}$, no, $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"hence $\boxed 7$", "7"),
        (r"hence \fbox{B}", "B"),
        (r"cut off \boxed{\frac{1}{2}", ""),
        ("I do not know", ""),
    ],
)
def test_the_stated_answer_is_found(solution, answer):
    assert extract_answer(solution) == answer


def test_math_reports_equivalence_and_the_plain_string():
    gold = r"Thus the answer is $\boxed{\frac{1}{2}}$."
    assert score_math("The final answer is $0.5$. I hope", gold) == {"exact_match": 1.0, "exact_match_string": 0.0}
    assert score_math(r"\boxed{\dfrac12}", gold) == {"exact_match": 1.0, "exact_match_string": 1.0}
    assert score_math(r"\boxed{2}", r"\frac{1}{2}") == {"exact_match": 0.0, "exact_match_string": 0.0}
    assert score_math("", gold) == {"exact_match": 0.0, "exact_match_string": 0.0}
    with pytest.raises(ValueError, match="gold"):
        score_math("1", " ")


def test_last_boxed_needs_its_brace():
    assert last_boxed(r"\boxed{a{b}c} and more}") == "a{b}c"
    assert last_boxed("no box") is None
    assert last_boxed(r"\boxed{a") is None


@pytest.mark.parametrize(
    ("prediction", "label", "score"),
    [
        ("(C)", "C", 1),
        (" the answer (C) not A", "C", 1),
        ("C", "D", 0),
        ("", "A", 0),
        ("G", "A", 0),
        ("(A)(C)", ["A", "C"], 1),
        ("AC", ["C", "A"], 1),
        ("A、C。解析：B 错", ["A", "C"], 1),
        ("A, C. B is wrong", ["A", "C"], 1),
        ("\nAC\nB", "AC", 1),
        ("A", ["A", "C"], 0),
        ("ABC", ["A", "C"], 0),
        ("AB", ["A", "C"], 0),
        ("DNA", ["A"], 0),
        ("D", ["D"], 1),
        ("", ["D"], 0),
        ("无", [], 1),
        ("A", [], 0),
    ],
)
def test_agieval_letters(prediction, label, score):
    assert score_agieval_choice(prediction, label) == {"acc": score}


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        (" 0.5", r"$\frac{1}{2}$", 1),
        (" $x=3$, as $y=1$", "3", 1),
        (" 30. Because 5 is odd.", "30", 1),
        (" 1.96。", "1.96", 1),
        (r"so \boxed{\frac{3}{4}} and 9", "0.75", 1),
        (" $5$；$10$", "$5$;$10$", 1),
        (" 1;$\\frac{8}{9}$", "1;$\\frac{8}{9}$", 1),
        (" 5，10。", "$5$;$10$", 1),
        (" $5$ 和 $10$", "$5$;$10$", 1),
        (" $10$；$5$", "$5$;$10$", 0),
        (" 5", "$5$;$10$", 0),
        (" 5；10；15", "$5$;$10$", 0),
        (" 对角线交于一点，并互相平分。", "对角线交于一点,并互相平分", 1),
        (" 对角线", "对角线交于一点,并互相平分", 0),
        ("", "2", 0),
        (" 3", "2", 0),
    ],
)
def test_agieval_blanks(prediction, answer, score):
    assert score_agieval_cloze(prediction, answer) == {"acc": score}


def test_a_missing_reader_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "latex2sympy2_extended", None)
    with pytest.raises(ImportError, match=r"latex2sympy2_extended.*pip install 'lightning-dsv3\[eval\]'"):
        is_equivalent(r"\sqrt{12}", r"2\sqrt{3}")
