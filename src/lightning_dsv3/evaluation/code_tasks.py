"""Scoring of generated code: HumanEval, MBPP, LiveCodeBench and CRUXEval, and pass@k.

A scorer takes an `Executor`, a record with the published field names and one raw generation; it cuts the code out of
the generation, runs it in the sandbox and returns a `Verdict`. Where the generation stops is decided here too, so that
a model's text gives one verdict whatever stop strings the generating loop honoured.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_dsv3.evaluation.execution import Executor, Program

Record = Mapping[str, Any]
Scorer = Callable[[Executor, Record, str], "Verdict"]

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("[DONE]",)
CRUXEVAL_STOPS = ("[/ANSWER]",)
# Longer texts are no answers to CRUXEval.
_LONGEST_EXPRESSION = 10_000
_STRING = re.compile(
    r"""('''|\"\"\")(?:\\.|(?!\1).)*\1  # between three quotes
    |'(?:\\.|[^'\\\n])*' | "(?:\\.|[^"\\\n])*" """,
    re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True)
class Verdict:
    """Whether one generation passed, and one line that says why not."""

    passed: bool
    reason: str = "passed"


def wrong(record: Record, key: str, name: str, fault: str) -> ValueError:
    """Make the error about one field of a record, which is named by its field ``key``."""
    return ValueError(f"record {record.get(key, '(unnamed)')}: the field {name!r} {fault}.")


def require(record: Record, name: str, kind: type | tuple[type, ...], key: str) -> Any:
    """Get one field of a record.

    Raises:
        ValueError: If it is missing or of another type, with the record's name (its field ``key``) and the field's.
    """
    if name not in record:
        raise wrong(record, key, name, f"is missing; it has {sorted(record)}")
    value = record[name]
    if not isinstance(value, kind):
        raise wrong(record, key, name, f"is a {type(value).__name__}")
    return value


def cut_at(text: str, stops: Sequence[str]) -> str:
    r"""Keep what is before the first of the stop strings.

    >>> cut_at("    return 1\n\ndef g():", HUMANEVAL_STOPS)
    '    return 1\n'
    """
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def score_humaneval(executor: Executor, record: Record, generation: str) -> Verdict:
    """Run prompt + completion, then the record's test on the entry point.

    The stop at a comment in column 0 is the benchmark's own.
    """
    prompt, test, entry = (require(record, name, str, "task_id") for name in ("prompt", "test", "entry_point"))
    solution = prompt + cut_at(generation, HUMANEVAL_STOPS)
    return _verdict(executor, [("solution", solution), ("test", f"{test}\n\ncheck({entry})")])


def score_mbpp(executor: Executor, record: Record, generation: str) -> Verdict:
    r"""Run the record's setup, the code (between ``[BEGIN]`` and ``[DONE]``, should they be there) and its tests.

    The data set's ``\r\n`` are newlines like any other to Python's compiler, also inside strings.
    """
    setup = require(record, "test_setup_code", str, "task_id")
    tests = require(record, "test_list", list, "task_id")
    if not tests:
        raise wrong(record, "task_id", "test_list", "is empty")
    code = cut_at(generation, MBPP_STOPS).rpartition("[BEGIN]")[2].strip()
    parts = [("setup", setup), ("solution", code), ("test", "\n".join(tests))]
    return _verdict(executor, parts)


def _verdict(executor: Executor, parts: Sequence[tuple[str, str]]) -> Verdict:
    outcome = executor.run(Program(parts))
    return Verdict(outcome.kind == "end", "passed" if outcome.kind == "end" else outcome.reason)


# CRUXEval: what the model writes is one comparison, `assert f(<input>) == <output>`.


def split_comparison(text: str) -> tuple[str, str | None]:
    """Split at the first ``==`` that is outside strings and brackets; None where there is none.

    >>> split_comparison("f('a == b', [1]) == 'c'")
    ("f('a == b', [1])", "'c'")
    """
    depth, position = 0, 0
    while position < len(text):
        if text[position] in "'\"" and (match := _STRING.match(text, position)):
            position = match.end()
            continue
        if depth == 0 and text.startswith("==", position):
            return text[:position].strip(), text[position + 2 :].strip()
        depth += (text[position] in "([{") - (text[position] in ")]}")
        position += 1
    return text.strip(), None


def _answer(generation: str) -> str:
    text = cut_at(generation, CRUXEVAL_STOPS).rpartition("[ANSWER]")[2].strip()
    return text.removeprefix("assert").strip()


def extract_input(generation: str) -> str | None:
    r"""Find the call ``f(...)`` in an answer of CRUXEval-I; None if it is not exactly one such call.

    >>> extract_input("assert f('==') == 3\n[/ANSWER]")
    "f('==')"
    """
    call = split_comparison(_answer(generation))[0]
    match _parse(call):
        case ast.Expression(body=ast.Call(func=ast.Name(id="f"))):
            return call
    return None


def extract_output(generation: str) -> str:
    r"""Find the predicted output in an answer of CRUXEval-O: after ``==``, or all of it.

    >>> extract_output("assert f('==') == {'a': '=='}\n[/ANSWER]")
    "{'a': '=='}"
    """
    left, right = split_comparison(_answer(generation))
    return left if right is None else right


def _assert_equal(left: str, right: str) -> str:
    return f"assert ({left}\n) == ({right}\n)"  # on lines of their own: a text may end in a comment


def score_cruxeval_input(executor: Executor, record: Record, generation: str) -> Verdict:
    """Run the record's code and hold ``f`` of the predicted input against its output."""
    code, output = (require(record, name, str, "id") for name in ("code", "output"))
    call = extract_input(generation)
    if call is None:
        return Verdict(False, "no call f(...) in the answer")
    return _verdict(executor, [("code", code), ("test", _assert_equal(call, output))])


def score_cruxeval_output(executor: Executor, record: Record, generation: str) -> Verdict:
    """Compare the predicted output with the record's."""
    code, output = (require(record, name, str, "id") for name in ("code", "output"))
    prediction = extract_output(generation)
    equal = outputs_equal(code, prediction, output, executor=executor)
    return Verdict(equal, "passed" if equal else f"{prediction[:200]!r} is not {output[:200]}")


def outputs_equal(code: str, prediction: str, gold: str, *, executor: Executor) -> bool:
    """Tell whether two texts of Python values are equal: as literals, or else (``set()``, ``2 ** 3``) in the sandbox.

    Args:
        code: The record's code, which may define what the texts name.
        prediction: The model's text. One that calls ``f`` itself answers nothing and is not equal.
        gold: The record's text.
        executor: Runs what is no literal.
    """
    left, right = _literal(prediction), _literal(gold)
    if left is not None and right is not None:
        return bool(left[0] == right[0])
    tree = _parse(prediction)
    if tree is None or any(isinstance(node, ast.Name) and node.id == "f" for node in ast.walk(tree)):
        return False
    return _verdict(executor, [("code", code), ("test", _assert_equal(gold, prediction))]).passed


def _parse(text: str) -> ast.Expression | None:
    """Parse one expression, outside the sandbox: nothing is evaluated, and length bounds the parser's work."""
    if len(text) > _LONGEST_EXPRESSION:
        return None
    try:
        return ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _literal(text: str) -> tuple[Any] | None:
    tree = _parse(text.strip())
    if tree is None:
        return None
    try:
        return (ast.literal_eval(tree),)
    except (ValueError, TypeError, MemoryError, RecursionError):  # it holds more than literals
        return None


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Estimate without bias the chance that one of ``k`` samples passes, from ``correct`` of ``samples`` that did.

    ``1 - C(n - c, k) / C(n, k)`` as a product, which neither overflows nor cancels (Chen et al. 2021, section 2.1).

    >>> pass_at_k(10, 3, 1)
    0.3
    """
    if not 0 < k <= samples:
        raise ValueError(f"k is {k}: pass@k needs 1 <= k <= {samples}, the number of samples.")
    if not 0 <= correct <= samples:
        raise ValueError(f"correct is {correct}: it counts some of {samples} samples.")
    if samples - correct < k:
        return 1.0
    return -math.expm1(sum(math.log1p(-k / i) for i in range(samples - correct + 1, samples + 1)))


def score_samples(
    executor: Executor, scorer: Scorer, records: Sequence[Record], generations: Sequence[Sequence[str]]
) -> list[list[Verdict]]:
    """Score every generation of every record, several at a time; the shape is that of ``generations``."""
    if len(records) != len(generations):
        raise ValueError(f"There are {len(records)} records but generations for {len(generations)}.")
    pairs = [(record, text) for record, texts in zip(records, generations, strict=True) for text in texts]
    verdicts: Iterator[Verdict] = iter(executor.map(lambda pair: scorer(executor, *pair), pairs))
    return [[next(verdicts) for _ in texts] for texts in generations]


def mean_pass_at_k(verdicts: Sequence[Sequence[Verdict]], k: int) -> float:
    """Average `pass_at_k` over the records; each may have another number of samples, at least ``k``."""
    if not verdicts:
        raise ValueError("There are no verdicts to average.")
    estimate = partial(pass_at_k, k=k)
    return sum(estimate(len(row), sum(verdict.passed for verdict in row)) for row in verdicts) / len(verdicts)
