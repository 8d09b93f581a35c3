"""CRUXEval: the value or the call that a completion states, read as Python syntax and never run."""

import ast
import warnings

_STOP = "[/ANSWER]"


def extract_output(prediction: str) -> str:
    r"""The expression that a CRUXEval-O completion gives as the output.

    It is the right side of ``assert f(..) == ..``, or the bare expression, before ``[/ANSWER]``. Being read as syntax,
    a string may hold ``==`` or an apostrophe.

    Example:
        >>> extract_output("assert f('x') == 'a == b'\n[/ANSWER]")
        "'a == b'"
    """
    for candidate in _candidates(prediction):
        expression = _expression(candidate)
        if isinstance(expression, ast.Compare) and isinstance(expression.ops[0], ast.Eq):
            expression = expression.comparators[0]
        if expression is not None:
            return ast.get_source_segment(candidate, expression) or ""
    return ""


def extract_call(prediction: str) -> str | None:
    r"""The call ``f(..)`` that a CRUXEval-I completion proposes; None if it has none.

    Example:
        >>> extract_call("assert f('a==b', [1]) == 3\n[/ANSWER]")
        "f('a==b', [1])"
    """
    for candidate in _candidates(prediction):
        expression = _expression(candidate)
        if isinstance(expression, ast.Compare):
            expression = expression.left
        if isinstance(expression, ast.Call) and getattr(expression.func, "id", None) == "f":
            return ast.get_source_segment(candidate, expression)
    return None


def score_cruxeval_output(prediction: str, gold: str) -> dict[str, float] | None:
    r"""CRUXEval-O without running code: equality of two literals, by Python's ``==`` as in the official assertion.

    Args:
        prediction: The completion.
        gold: The record's ``output``.

    Returns:
        ``exact_match``, or None if one side is an expression that is no literal (``"a" * 3``): then
        ``assert <gold> == <extract_output(prediction)>`` has to be executed.

    Example:
        >>> score_cruxeval_output("assert f(1) == [1, 'a==b']", '[1, "a==b"]')
        {'exact_match': 1.0}
    """
    answer = extract_output(prediction)
    if not answer:
        return {"exact_match": 0.0}
    try:
        return {"exact_match": float(ast.literal_eval(answer) == ast.literal_eval(gold))}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _candidates(prediction: str) -> tuple[str, str]:
    """The answer part of a completion, and its first line in case that more text follows."""
    text = prediction.partition(_STOP)[0].strip().removeprefix("[ANSWER]").strip().removeprefix("==").strip()
    return text, text.partition("\n")[0].strip()


def _expression(source: str) -> ast.expr | None:
    """The asserted or bare expression of one statement; None if the text is not one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's escapes are not our concern
            body = ast.parse(source).body
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if len(body) != 1 or not isinstance(body[0], (ast.Assert, ast.Expr)):
        return None
    return body[0].test if isinstance(body[0], ast.Assert) else body[0].value
