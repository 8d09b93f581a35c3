"""Scoring of generated code, on records made here and on those at hand (``LIGHTNING_DSV3_DATA``)."""

import base64
import json
import os
import pickle
import random
import re
import zlib
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dsv3.evaluation.code_tasks import (
    MBPP_STOPS,
    Verdict,
    cut_at,
    extract_input,
    extract_output,
    mean_pass_at_k,
    outputs_equal,
    pass_at_k,
    score_cruxeval_input,
    score_cruxeval_output,
    score_humaneval,
    score_mbpp,
    score_samples,
    split_comparison,
)
from lightning_dsv3.evaluation.execution import Executor, Limits
from lightning_dsv3.evaluation.livecodebench import (
    livecodebench_executor,
    read_tests,
    same_lines,
    score_livecodebench,
    unpack_private_tests,
)

EXECUTOR = Executor(confirmed=True, limits=Limits(seconds=10), workers=2)
HUMANEVAL = {
    "task_id": "Ours/0",
    "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}
MBPP = {
    "task_id": 0,
    "text": "Write a function to add.",
    "code": "def add(a, b, zero=ZERO):\r\n    return a + b + zero",
    "test_setup_code": "ZERO = 0\r\n",
    "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add(0, 0) == 0"],
}


class TestHumanEval:
    @pytest.mark.parametrize(
        ("completion", "passed"),
        [
            ("    return 2 * x\n", True),
            ("    return 2 * x", True),
            ("    return x + x\n\ndef other():\n    raise ValueError\n", True),  # cut at the stop
            ("    return 2 * x\nprint(1 / 0)", True),
            ("    if x:\n        return 2 * x\n    return 0\nif True:\n    1 / 0", True),
            ("    return x\n", False),
            ("", False),
            ("    return 2 * x\nraise SystemExit(0)", False),
            ("    raise SystemExit(0)\n", False),
            ("    import os; os._exit(0)\n", False),
            ("    return 2 *", False),
            ('    return """', False),
        ],
    )
    def test_completions(self, completion, passed):
        assert score_humaneval(EXECUTOR, HUMANEVAL, completion).passed is passed

    def test_the_reason_names_the_assertion(self):
        verdict = score_humaneval(EXECUTOR, HUMANEVAL, "    return 4\n")
        assert verdict.reason == "error: test, line 3 (assert candidate(-1) == -2): AssertionError"

    @pytest.mark.parametrize("name", ["prompt", "test", "entry_point"])
    def test_a_missing_field_is_named(self, name):
        record = {key: value for key, value in HUMANEVAL.items() if key != name}
        with pytest.raises(ValueError, match=rf"record Ours/0: the field '{name}' is missing"):
            score_humaneval(EXECUTOR, record, "")
        with pytest.raises(ValueError, match=rf"record Ours/0: the field '{name}' is a NoneType"):
            score_humaneval(EXECUTOR, HUMANEVAL | {name: None}, "")


class TestMbpp:
    @pytest.mark.parametrize("wrapped", ["{}", "[BEGIN]\r\n{}\r\n[DONE]\r\n[BEGIN] more", "\n{}\n[DONE]", " {}"])
    def test_right_code_passes_with_its_setup_first(self, wrapped):
        assert score_mbpp(EXECUTOR, MBPP, wrapped.format(MBPP["code"])) == Verdict(True)

    @pytest.mark.parametrize("code", ["", "def add(a, b):\n    return 3", "import sys\nsys.exit()", "[DONE]"])
    def test_wrong_code_fails(self, code):
        assert not score_mbpp(EXECUTOR, MBPP, code).passed

    def test_without_setup_the_code_fails(self):
        assert "ZERO" in score_mbpp(EXECUTOR, MBPP | {"test_setup_code": ""}, MBPP["code"]).reason

    def test_newlines_are_one_kind(self):
        record = MBPP | {"test_list": ["assert text == '''a\r\nb'''\r\nassert len(text) == 3"], "test_setup_code": ""}
        assert score_mbpp(EXECUTOR, record, "text = '''a\r\nb'''").passed

    @pytest.mark.parametrize("change", [{"test_list": []}, {"test_list": "assert True"}, {"test_setup_code": None}])
    def test_a_wrong_field_is_named(self, change):
        with pytest.raises(ValueError, match=f"record 0: the field '{next(iter(change))}'"):
            score_mbpp(EXECUTOR, MBPP | change, "")


class TestCruxEval:
    @pytest.mark.parametrize(
        ("text", "left", "right"),
        [
            ("f(1) == 2", "f(1)", "2"),
            ("f('==') == '=='", "f('==')", "'=='"),
            ('f("a\\" == b") == 1', 'f("a\\" == b")', "1"),
            ("f('''it's == ''', 1) == 2", "f('''it's == ''', 1)", "2"),
            ('f("""a" == """) == 3', 'f("""a" == """)', "3"),
            ("f([x == 1, {2: (3 == 3)}]) == 2", "f([x == 1, {2: (3 == 3)}])", "2"),
            ("f(1) == 2 == 3", "f(1)", "2 == 3"),
            ("f(1)", "f(1)", None),
            ("f('unfinished == 2", "f('unfinished == 2", None),
            ("'it == ' == x", "'it == '", "x"),
        ],
    )
    def test_the_comparison_is_split_outside_strings_and_brackets(self, text, left, right):
        assert split_comparison(text) == (left, right)

    @given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.tuples(inner, inner)))
    def test_any_value_survives_the_split(self, value):
        assert split_comparison(f"f({value!r}) == {value!r}") == (f"f({value!r})", repr(value))

    def test_extraction(self):
        assert extract_input("[ANSWER]\nassert f('x') == 'y'\n[/ANSWER]\nassert f(2) == 3") == "f('x')"
        assert extract_input(" f(1, b=[2])") == "f(1, b=[2])"
        for wrong in ("", "assert True", "g(1) == 2", "f(1) or 17 == 17", "assert f(1", "f", "assert f(1).x == 2"):
            assert extract_input(wrong) is None
        assert extract_output("assert f(1) == 'a'\n[/ANSWER]") == "'a'"
        assert extract_output(" 'a == b' ") == "'a == b'"

    @pytest.mark.parametrize(
        ("prediction", "gold", "equal"),
        [
            ("'x9ja'", "'x9ja'", True),
            ('"x9ja"', "'x9ja'", True),
            ("x9ja", "'x9ja'", False),  # a string without its quotes is a name
            ("[1,2]", "[1, 2]", True),
            ("(1, 2)", "[1, 2]", False),
            ("set()", "{1} - {1}", True),
            ("2 ** 3", "8", True),
            ("2 ** 4", "8", False),
            ("helper(2)", "8", True),
            ("f(2)", "8", False),  # that is the question again
            ("[f(2)]", "[8]", False),
            ("", "''", False),
            ("1 +", "1", False),
            ("8; 1", "8", False),
            ("8)\nassert (1", "8", False),
            ("(" * 20_000, "8", False),
            ("-" * 9_000 + "8", "8", False),
            ("9" * 9_000, "8", False),
            ("__import__('os')._exit(0)", "8", False),
            ("exit()", "8", False),
            ("4 * 2  # eight", "8", True),
            ("4 * 3  # eight", "8", False),
        ],
    )
    def test_outputs(self, prediction, gold, equal):
        code = "def helper(x): return x * 4\ndef f(x): return helper(x)"
        assert outputs_equal(code, prediction, gold, executor=EXECUTOR) is equal

    def test_records(self):
        record = {"id": "ours", "code": "def f(a):\n    return a + '=='", "input": "'x'", "output": "'x=='"}
        assert score_cruxeval_input(EXECUTOR, record, "assert f('x') == 'x=='\n[/ANSWER]").passed
        assert score_cruxeval_output(EXECUTOR, record, "assert f('x') == 'x=='\n[/ANSWER]").passed
        assert not score_cruxeval_input(EXECUTOR, record, "assert f('y') == 'x=='\n[/ANSWER]").passed
        assert not score_cruxeval_output(EXECUTOR, record, "assert f('x') == 'x'\n[/ANSWER]").passed
        assert not score_cruxeval_input(EXECUTOR, record, "f('y')  # a true value").passed
        assert score_cruxeval_input(EXECUTOR, record, "f('x')  # a true value").passed
        for scorer in (score_cruxeval_input, score_cruxeval_output):
            with pytest.raises(ValueError, match="record ours: the field 'output' is missing"):
                scorer(EXECUTOR, {"id": "ours", "code": ""}, "f(1)")


def problem(cases, private=(), *, function=None, pack=json.dumps):
    kind = "stdin" if function is None else "functional"
    public, hidden = ([{"input": i, "output": o, "testtype": kind} for i, o in tests] for tests in (cases, private))
    metadata = {} if function is None else {"func_name": function}
    return {
        "question_id": "q1",
        "public_test_cases": json.dumps(public),
        "private_test_cases": pack(hidden),
        "metadata": json.dumps(metadata),
    }


def pickled(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


class Evil:
    """Unpickled without care, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class TestLiveCodeBench:
    SUM = problem([("1 2\n", "3\n"), ("5 5", "10")], [("-1 1\n", "0")], pack=pickled)
    ADD = problem([("[1, 2]\n3", "[4, 5]")], [("[]\n1", "[]"), ("[7]\n0\n", "[7]")], function="addAll", pack=pickled)

    @pytest.mark.parametrize(
        ("source", "passed"),
        [
            ("print(sum(map(int, input().split())))", True),
            ("a, b = map(int, input().split())\nprint(f'  {a + b}.0 ')\n### Question\n1 / 0", True),
            ("if __name__ == '__main__':\n    print(sum(map(int, sys.stdin.read().split())))\n    sys.exit()", True),
            ("def main():\n    print(sum(map(int, input().split())))\nimport threading\n"
             "threading.Thread(target=main).start()", True),
            ("print(3)", False),
            ("print(sum(map(int, input().split())))\n1 / 0", False),
            ("import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)", False),
            ("pass", False),
            ("", False),
        ],
    )  # fmt: skip
    def test_scripts(self, source, passed):
        assert score_livecodebench(EXECUTOR, self.SUM, source).passed is passed

    @pytest.mark.parametrize(
        ("source", "passed"),
        [
            ("class Solution:\n    def addAll(self, a: List[int], b: int) -> List[int]:\n"
             "        return [x + b for x in a]", True),
            ("def addAll(a, b):\n    return tuple(x + b for x in a)", True),
            ("class Solution:\n    def addAll(self, a, b):\n        return [4, 5]", False),
            ("class Solution:\n    def addAll(self, a, b):\n        print([x + b for x in a])", False),
            ("class Solution:\n    def other(self, a, b):\n        return [4, 5]", False),
            # Equal to everything, and gone before it can be compared.
            ("class Any(list):\n    def __eq__(self, other):\n        return True\ndef addAll(a, b):\n"
             "    return Any()", False),
            ("def addAll(a, b):\n    import os\n    os._exit(0)", False),
        ],
    )  # fmt: skip
    def test_functions(self, source, passed):
        assert score_livecodebench(EXECUTOR, self.ADD, source).passed is passed

    def test_the_first_failure_is_named_and_ends_it(self):
        verdict = score_livecodebench(EXECUTOR, self.SUM, "print(3)")
        assert verdict.reason == "test 2 of 3: printed '3\\n'"
        verdict = score_livecodebench(EXECUTOR, self.ADD, "def addAll(a, b):\n    return a and [4, 5]")
        assert verdict.reason == "test 3 of 3: returned [4, 5]"

    def test_each_test_has_six_seconds(self):
        executor = livecodebench_executor(EXECUTOR)
        assert executor.limits.seconds == 6
        assert executor.limits.memory == EXECUTOR.limits.memory

    def test_a_private_test_counts(self):
        assert not score_livecodebench(EXECUTOR, self.SUM, "print(abs(sum(map(int, input().split()))) or 1)").passed

    @pytest.mark.parametrize("pack", [json.dumps, pickled])
    def test_both_forms_of_private_tests(self, pack):
        tests = read_tests(problem([("a", "b")], [("c", "d\ne")], pack=pack))
        assert [(test.input, test.output, test.functional) for test in tests] == [
            ("a", "b", False),
            ("c", "d\ne", False),
        ]

    def test_a_pickle_of_anything_but_text_is_refused_and_not_run(self, tmp_path):
        path = tmp_path / "touched"
        packed = base64.b64encode(zlib.compress(pickle.dumps(Evil(path)))).decode()
        record = problem([("a", "b")], pack=lambda _: packed)
        with pytest.raises(ValueError, match=r"record q1: the field 'private_test_cases' .*text only"):
            score_livecodebench(EXECUTOR, record, "pass")
        assert not path.exists()
        assert pickle.loads(zlib.decompress(base64.b64decode(packed))) is None  # it would have
        assert path.exists()

    @pytest.mark.parametrize(
        "data",
        [
            pickle.dumps([1, 2]),
            pickle.dumps(b"[]"),
            pickle.dumps("no json"),
            pickle.dumps(len),
            pickle.dumps(os.system, protocol=0),
            b"",
            b"\x80",
            b"cos\nsystem\n(S'true'\ntR.",
            b"Pname\n.",
            b"(i__builtin__\nexec\n.",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
            b"0.",
            b"u.",
        ],
    )
    def test_other_pickles_are_one_clear_error(self, data):
        with pytest.raises(ValueError, match="neither JSON nor base64"):
            unpack_private_tests(base64.b64encode(zlib.compress(data)).decode())

    def test_damaged_data_are_one_clear_error(self):
        packed = pickled([])
        for text in ("", "{", "!!", packed[:-8], packed[:8], base64.b64encode(b"plain").decode()):
            with pytest.raises(ValueError, match="neither JSON nor base64"):
                unpack_private_tests(text)

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"public_test_cases": "[{}]"}, "public_test_cases"),
            ({"public_test_cases": "7"}, "public_test_cases"),
            ({"public_test_cases": '[{"input": "", "output": "", "testtype": "other"}]'}, "public_test_cases"),
            ({"public_test_cases": "[]", "private_test_cases": "[]"}, "public_test_cases"),
            ({"private_test_cases": "[1]"}, "private_test_cases"),
            ({"private_test_cases": None}, "private_test_cases"),
            ({"private_test_cases": '[{"input": "", "output": "", "testtype": "stdin"}]'}, "private_test_cases"),
            ({"metadata": "{}"}, "metadata"),
            ({"metadata": '{"func_name": 3}'}, "metadata"),
            ({"metadata": "no json"}, "metadata"),
        ],
    )
    def test_a_wrong_field_is_named(self, change, field):
        with pytest.raises(ValueError, match=f"record q1: the field '{field}'"):
            score_livecodebench(EXECUTOR, self.ADD | change, "pass")

    @pytest.mark.parametrize(
        ("printed", "expected", "same"),
        [
            ("1\n2\n", "1\n2", True),
            ("\n 1 \n 2\n\n", "1\n2", True),
            ("1\n\n2", "1\n2", False),
            ("1", "1\n2", False),
            ("1\n2", "1", False),
            ("1 2", "1\n2", False),
            ("1.0", "1", True),
            ("1e2 3", "100 3.000", True),
            ("0.1", "0.10000000000000001", False),
            ("1 2 3", "1 2", False),
            ("YES", "yes", False),
            ("nan", "nan", True),
            ("nan x", "nan y", False),
            ("sNaN 1", "sNaN 2", False),
            ("NaN 1.0", "NaN 1", False),
            ("1e999999999", "1e999999998", False),
            ("", "", True),
            ("", "1", False),
        ],
    )
    def test_lines(self, printed, expected, same):
        assert same_lines(printed, expected) is same


class TestPassAtK:
    @pytest.mark.parametrize("samples", [1, 2, 5, 7])
    def test_it_is_the_mean_over_all_choices_of_k(self, samples):
        for correct in range(samples + 1):
            results = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                choices = list(combinations(results, k))
                exact = Fraction(sum(any(choice) for choice in choices), len(choices))
                assert pass_at_k(samples, correct, k) == pytest.approx(float(exact), abs=1e-14)

    def test_it_is_unbiased(self):
        draw, rate, k = random.Random(0), 0.3, 3
        estimates = [pass_at_k(8, sum(draw.random() < rate for _ in range(8)), k) for _ in range(20_000)]
        assert sum(estimates) / len(estimates) == pytest.approx(1 - (1 - rate) ** k, abs=0.006)

    def test_large_numbers_neither_overflow_nor_cancel(self):
        assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-12)
        assert pass_at_k(10**6, 1, 1000) == pytest.approx(1e-3, rel=1e-12)

    @pytest.mark.parametrize(("samples", "correct", "k"), [(3, 1, 4), (3, 1, 0), (3, 4, 1), (3, -1, 1), (0, 0, 1)])
    def test_impossible_numbers_are_refused(self, samples, correct, k):
        with pytest.raises(ValueError, match=r"^(k|correct) is "):
            pass_at_k(samples, correct, k)

    def test_samples_of_several_records(self):
        generations = [["    return 2 * x", "    return x", "    return x + x"], ["    return 1"]]
        verdicts = score_samples(EXECUTOR, score_humaneval, [HUMANEVAL, HUMANEVAL], generations)
        assert [[verdict.passed for verdict in row] for row in verdicts] == [[True, False, True], [False]]
        assert mean_pass_at_k(verdicts, 1) == pytest.approx(1 / 3)
        with pytest.raises(ValueError, match="k is 2"):
            mean_pass_at_k(verdicts, 2)
        with pytest.raises(ValueError, match="no verdicts"):
            mean_pass_at_k([], 1)
        with pytest.raises(ValueError, match="2 records"):
            score_samples(EXECUTOR, score_humaneval, [HUMANEVAL, HUMANEVAL], [[]])


def test_the_earliest_stop_cuts():
    assert cut_at("ab\ndef\nclass", ("\nclass", "\ndef")) == "ab"
    assert cut_at("ab", MBPP_STOPS) == "ab"
    assert cut_at("[DONE]x", MBPP_STOPS) == ""


def records(pattern: str) -> list[dict]:
    folder = os.environ.get("LIGHTNING_DSV3_DATA")
    if not folder:
        pytest.skip("LIGHTNING_DSV3_DATA is not set: no benchmark records at hand")
    paths = sorted(Path(folder).glob(pattern))
    if not paths:
        pytest.skip(f"LIGHTNING_DSV3_DATA has no {pattern}")
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def answer(record: dict) -> str:
    return f"assert f({record['input']}) == {record['output']}\n[/ANSWER]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "scorer", "right", "wrong"),
    [
        ("humaneval/*.jsonl", score_humaneval, lambda r: r["canonical_solution"], lambda r: "    return object()\n"),
        ("mbpp/*.jsonl", score_mbpp, lambda r: f"[BEGIN]\n{r['code']}\n[DONE]", lambda r: gutted(r["code"])),
        ("cruxeval/*.jsonl", score_cruxeval_input, answer, lambda r: "assert f(object()) == 1"),
        ("cruxeval/*.jsonl", score_cruxeval_output, answer, lambda r: "assert f() == 'none of them'"),
    ],
    ids=["humaneval", "mbpp", "cruxeval_input", "cruxeval_output"],
)
def test_every_canonical_solution_passes_and_wrong_ones_fail(pattern, scorer, right, wrong):
    rows = records(pattern)
    verdicts = score_samples(EXECUTOR, scorer, rows, [[right(row), wrong(row)] for row in rows])
    assert [
        (row, reason) for row, (good, _) in zip(rows, verdicts, strict=True) if (reason := good.reason) != "passed"
    ] == []
    passed = [row for row, (_, bad) in zip(rows, verdicts, strict=True) if bad.passed]
    assert len(passed) <= 0.01 * len(rows), passed  # a function may ignore its input


def gutted(code: str) -> str:
    """The same functions, which return something that equals nothing."""
    return re.sub(r"^(\s*)return\b.*$", r"\1return object()", code.replace("\r\n", "\n"), flags=re.MULTILINE)


@pytest.mark.parametrize("pattern", ["humaneval/*.jsonl", "mbpp/*.jsonl"])
def test_some_real_records(pattern):
    """A few of them in every run where the data are at hand; all of them under ``-m slow``."""
    scorer, field = (score_humaneval, "canonical_solution") if "human" in pattern else (score_mbpp, "code")
    rows = records(pattern)[::20]
    assert all(row[0].passed for row in score_samples(EXECUTOR, scorer, rows, [[row[field]] for row in rows]))
