"""Scoring of LiveCodeBench (``code_generation_lite``): all public and private tests of a problem must pass.

Two kinds of problem: *functional* ones call a method with JSON values, one a line; *stdin* ones are scripts. Expected
values stay outside the sandbox, where the answers are compared, so there is no verdict for a program to forge.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from lightning_dsv3.evaluation.code_tasks import Record, Verdict, cut_at, require, wrong
from lightning_dsv3.evaluation.execution import Call, Executor, Outcome, Program

STOPS = ("###",)
SECONDS_PER_TEST = 6.0
_KEY = "question_id"
_LARGEST_TESTS = 1 << 30  # bytes of private tests when unpacked

# What competitors' sites import for them; starter code relies on `List` without an import.
_MODULES = ["string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"]
_MODULES += ["itertools", "functools", "operator", "io", "sys", "json", "typing"]
_STARS, _NAMES = ([form.format(name) for name in _MODULES] for form in ("from {} import *", "import {}"))
PRELUDE = "\n".join([*_STARS, "from builtins import *", *_NAMES, "sys.setrecursionlimit(50000)"])


@dataclass(frozen=True)
class Test:
    """One test: the input's text and the expected output's."""

    __test__ = False  # for pytest, which collects by name

    input: str
    output: str
    functional: bool


class _OnlyText(pickle.Unpickler):
    """Unpickles text; whatever names a class or function is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"private tests may hold text only, not {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"private tests may hold text only, not a persistent object {pid!r}")


def unpack_private_tests(packed: str) -> Any:
    """Decode private tests: JSON, or base64 of zlib of a pickle of JSON text, which can hold nothing but text.

    Raises:
        ValueError: If it is neither.
    """
    try:
        return json.loads(packed)
    except ValueError:
        pass
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(packed, validate=True), _LARGEST_TESTS)
        if not inflate.eof:
            raise ValueError(f"they are cut short or larger than {_LARGEST_TESTS} bytes")
        text = _OnlyText(io.BytesIO(data)).load()
        if not isinstance(text, str):
            raise ValueError(f"the pickle holds a {type(text).__name__}, not text")
        return json.loads(text)
    except Exception as error:  # a malformed pickle may raise anything
        raise ValueError(f"neither JSON nor base64 of zlib of pickled JSON text: {error}") from error


def read_tests(record: Record) -> list[Test]:
    """Read the public and private tests of a record.

    Raises:
        ValueError: If a field is missing or cannot be read, with the record's id and the field.
    """
    tests = []
    for name in ("public_test_cases", "private_test_cases"):
        text = require(record, name, str, _KEY)
        try:
            cases = unpack_private_tests(text) if name == "private_test_cases" else json.loads(text)
            kinds = {"functional": True, "stdin": False}
            tests += [Test(case["input"], case["output"], kinds[case["testtype"]]) for case in cases]
        except (ValueError, KeyError, TypeError) as error:
            raise wrong(record, _KEY, name, f"cannot be read: {error!r}") from error
    if not tests:
        raise wrong(record, _KEY, "public_test_cases", "has no tests, nor have the private ones")
    if len({test.functional for test in tests}) > 1:
        raise wrong(record, _KEY, "private_test_cases", "has tests of another testtype than the public ones")
    return tests


def livecodebench_executor(executor: Executor) -> Executor:
    """The same executor with the benchmark's time limit and imports; make it once for many problems."""
    return replace(executor, limits=replace(executor.limits, seconds=SECONDS_PER_TEST), preload=[*_MODULES, "decimal"])


def score_livecodebench(executor: Executor, record: Record, generation: str) -> Verdict:
    """Run a generation on every test of its problem, up to the first that fails.

    Args:
        executor: Any; the benchmark's limit of 6 s for a test and its imports are set here.
        record: The published fields.
        generation: The text after ``### Answer``; it ends at the next ``###``.
    """
    tests = read_tests(record)
    source = cut_at(generation, STOPS).strip()
    if tests[0].functional:
        function = _function_name(record)
        programs = [_program(source, call=Call(function, _arguments(record, test))) for test in tests]
    else:
        programs = [_program(source, stdin=test.input) for test in tests]
    outcomes = livecodebench_executor(executor).run_in_turn(programs)
    for number, (test, outcome) in enumerate(zip(tests, outcomes, strict=True), 1):
        if (fault := _fault(record, test, outcome)) is not None:
            outcomes.close()
            return Verdict(False, f"test {number} of {len(tests)}: {fault}")
    return Verdict(True)


def _program(source: str, *, stdin: str = "", call: Call | None = None) -> Program:
    module = "__main__" if call is None else "solution"
    return Program([("imports", PRELUDE), ("solution", source)], stdin=stdin, call=call, module=module)


def _function_name(record: Record) -> str:
    text = require(record, "metadata", str, _KEY)
    try:
        name = json.loads(text)["func_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise wrong(record, _KEY, "metadata", f"cannot be read: {error!r}") from error
    if not isinstance(name, str):
        raise wrong(record, _KEY, "metadata", f"has the func_name {name!r}")
    return name


def _arguments(record: Record, test: Test) -> list[Any]:
    try:
        return [json.loads(line) for line in test.input.split("\n") if line.strip()]
    except ValueError as error:
        raise wrong(record, _KEY, "..._test_cases", f"has an input that is no JSON: {error}") from error


def _fault(record: Record, test: Test, outcome: Outcome) -> str | None:
    """Say what is wrong with one outcome, or nothing."""
    if test.functional:
        if outcome.kind != "end":
            return outcome.reason
        try:
            expected = json.loads(test.output)
        except ValueError as error:
            raise wrong(record, _KEY, "..._test_cases", f"has an output that is no JSON: {error}") from error
        return None if outcome.value == expected else f"returned {outcome.value!r:.200}"
    # A script may end with sys.exit(), as the benchmark allows: its printed answer decides.
    if outcome.kind not in ("end", "exit"):
        return outcome.reason
    return None if same_lines(outcome.stdout, test.output) else f"printed {outcome.stdout!r:.200}"


def same_lines(printed: str, expected: str) -> bool:
    r"""Compare two outputs line by line without surrounding space: as text, or else number by number, exactly.

    >>> same_lines("1.0 2\n", " 1 2.00")
    True
    """
    left, right = (_stripped_lines(text) for text in (printed, expected))
    return len(left) == len(right) and all(a == b or _same_numbers(a, b) for a, b in zip(left, right, strict=True))


def _stripped_lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_numbers(left: str, right: str) -> bool:
    try:
        numbers: Sequence[list[Decimal]] = [[Decimal(token) for token in line.split()] for line in (left, right)]
        return numbers[0] == numbers[1]
    except InvalidOperation:
        return False
