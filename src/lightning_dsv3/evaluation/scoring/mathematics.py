r"""MATH: the final answer of a solution, its normal form, and equivalence of two answers.

Three steps, the cheap ones first: equal strings after `normalize_answer`; two plain numbers as rationals; and what is
left read by latex2sympy2_extended (the reader of math-verify) and compared by value: expressions at three points to
nine digits, sets and unions in any order, intervals with their ends, tuples and matrices entry by entry, relations up
to a factor.

An answer comes from a language model and may be anything, such as ``9^{9^{9^9}}``, whose value no time-out can stop
once Python multiplies it out. So only short texts of known commands and small exponents are read at all, nothing is
simplified or solved, and values are computed in floating point: the work is bounded before it starts.
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

_UNBOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\(?:boxed|fbox) +([^$\s]+)")


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{..}`` (or ``\fbox``); None if there is none or its brace never closes.

    Example:
        >>> last_boxed(r"so $\boxed{1}$ or rather $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
    """
    boxes = list(_UNBOXED.finditer(text))
    if not boxes:
        return None
    if boxes[-1][1]:
        return boxes[-1][1]
    start, depth = boxes[-1].end() + 1, 0
    for at in range(start - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return None


def extract_answer(solution: str) -> str:
    r"""The answer that a solution states: after "the final answer is", else the last ``\boxed``, else ''.

    The first statement counts, as a base model may go on with problems of its own.

    Example:
        >>> extract_answer("Final Answer: The final answer is $[2,5)$. I hope it is correct.")
        '$[2,5)$'
    """
    stated = re.search(r"final answer is:?(.*)", solution, re.IGNORECASE)
    if stated:
        return last_boxed(stated[1]) or re.split(r"\.?\s*I hope", stated[1])[0].strip()
    return last_boxed(solution) or ""


def score_math(prediction: str, gold: str) -> dict[str, float]:
    r"""MATH: ``exact_match`` is equivalence with the gold answer, ``exact_match_string`` equality of normal forms.

    Args:
        prediction: A solution, with "Final Answer: The final answer is $..$." or ``\boxed{..}``.
        gold: The gold solution with its ``\boxed{..}``, or the bare answer.

    Source: Lewkowycz et al. 2022, appendix D (what is normalised and why), with our own rules.

    Example:
        >>> score_math("Final Answer: The final answer is $0.5$. I hope it is correct.", r"\boxed{\frac12}")
        {'exact_match': 1.0, 'exact_match_string': 0.0}
    """
    answer, target = extract_answer(prediction), last_boxed(gold) or gold
    if not normalize_answer(target):
        raise ValueError(f"gold has no answer: {gold!r}")
    return {
        "exact_match": float(is_equivalent(answer, target)),
        "exact_match_string": float(normalize_answer(answer) == normalize_answer(target)),
    }


def _without_thousands(match: re.Match[str]) -> str:
    """1,000 as 1000; not called where brackets make it a pair or an interval."""
    return re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", lambda m: m.group().replace(",", ""), match.group())


# In this order. Spaces are still there, so that words end where they end.
_REWRITES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # layout, dollars and percent, which no answer of MATH depends on
    (r"\\left(?![a-z])|\\right(?![a-z])|\\(?:displaystyle|limits|big|Big|bigl|bigr)(?![a-z])", ""),
    (r"(?<=\d)(?:,\s*\\!|\{,\})\s*(?=\d{3})", ""),
    (r"(?<!\\)\\[!,;:]", ""),
    (r"(?<!\\)\\ |~|\\q?quad", " "),
    (r"\\\$|\\?%|\$|\\[()]", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\(?:cdot|ast)(?![a-z])", r"\\times "),
    (r"\\leq?(?![a-z])|≤", r"\\le "),
    (r"\\geq?(?![a-z])|≥", r"\\ge "),
    (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|°", ""),
    # words: "and" separates; a unit after a mathematical answer goes; other text stays without its command
    (r"\\(?:text|mbox|textrm|textnormal)\s*\{\s*(?:,\s*)?(?:and|or)\s*\}|(?<=[\d}),])\s+(?:and|or)\s+", ","),
    (r"(?<=[\w})\]])\s*\\(?:text|mbox|textrm|textnormal|mathrm|rm)\s*\{\s*[A-Za-z][A-Za-z .]+\}(?:\^\{?[23]\}?)?", ""),
    (r"\\(?:text|mbox|textrm|textnormal|textbf|textit|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}", r"\1"),
    (r"(?<=[\d})])(?: +(?!pi|sqrt|sin|cos|tan|log|ln)[a-z]{2,}\.?)+$", ""),
    # one form of each number, fraction and root
    (r"^[^(\[]*$", _without_thousands),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"\\frac\s*([^\s{\\])\s*([^\s{\\])", r"\\frac{\1}{\2}"),
    (r"\\frac\s*([^\s{\\])\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\s*\{[^{}]*\})\s*([^\s{\\])", r"\1{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"(?<=\^)\s*(\d+|[A-Za-z])|(?<=_)\s*(\w)", r"{\1\2}"),
]
_RULES = [(re.compile(pattern), into) for pattern, into in _REWRITES]
_CIRCLED = {ord(char): rf"\textcircled{{{number}}}" for number, char in enumerate("①②③④⑤⑥⑦⑧⑨", 1)}


def normalize_answer(answer: str) -> str:
    r"""A normal form of an answer in LaTeX or plain text, without whitespace.

    Layout, dollars, percent, degrees, units and the thousands comma go; ``\dfrac12`` becomes ``\frac{1}{2}``,
    ``.5`` ``0.5``; ``x = 3``, ``f(x) = 3`` and ``x \in S`` become ``3`` and ``S``, while other equations stay.

    Example:
        >>> normalize_answer(r"$\$16,\!386.16$"), normalize_answer(r"x = 8\sqrt3 \text{ square inches}")
        ('16386.16', '8\\sqrt{3}')
    """
    return re.sub(r"^(?:\\?[A-Za-z]+|[A-Za-z]\([A-Za-z]\))(?:=|\\in ?)(?=[^=]+$)", "", _clean(answer))


def _clean(answer: str) -> str:
    answer = answer.strip().translate(_CIRCLED).replace("−", "-").replace("π", r"\pi ").replace("∞", r"\infty ")
    for rule, into in _RULES:
        answer = rule.sub(into, answer).strip()
    answer = re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])", r"\1\0", answer.rstrip("."))
    answer = re.sub(r"^\(([A-Za-z])\)$", r"\1", re.sub(r"\s+", "", answer).replace("\0", " "))
    return answer.casefold() if answer.isalpha() and len(answer) > 1 else answer


def is_equivalent(answer: str, gold: str) -> bool:
    r"""Whether two answers mean the same; no answer makes it raise or takes it long.

    Example:
        >>> is_equivalent(r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}"), is_equivalent("(1,2)", "(2,1)")
        (True, False)
    """
    ours, theirs = normalize_answer(answer), normalize_answer(gold)
    if not ours or not theirs or ours == theirs:
        return bool(ours) and ours == theirs
    values = _rational(ours), _rational(theirs)
    if None not in values:
        return values[0] == values[1]
    if re.fullmatch(r"[^\W\d_]{2,}", ours) or re.fullmatch(r"[^\W\d_]{2,}", theirs):
        return False  # a word is not a product of letters
    if "=" in ours or "=" in theirs:
        ours, theirs = _clean(answer), _clean(gold)
    return is_readable(ours) and is_readable(theirs) and _same_reading(ours, theirs)


def _rational(text: str) -> Fraction | None:
    """An integer, decimal, fraction or mixed number."""
    match = re.fullmatch(r"(-?)(\d{1,60}(?:\.\d{1,60})?)?(?:\\frac\{(-?\d{1,60})\}\{(\d{1,60})\})?", text)
    if not match:
        match = re.fullmatch(r"(-?)()(\d{1,60})/(\d{1,60})", text)
    if not match or match[2] == match[3] or (match[4] and not int(match[4])):
        return None
    value = Fraction(match[2] or 0) + (Fraction(int(match[3]), int(match[4])) if match[3] else 0)
    return -value if match[1] else value


_UNKNOWN_COMMAND = re.compile(
    r"\\(?!(?:frac|sqrt|pi|infty|cup|cap|pm|times|div|le|ge|ne|lt|gt|begin|end|sin|cos|tan|cot|sec|csc|arcsin|arccos"
    r"|arctan|log|ln|alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|emptyset)(?![A-Za-z]))[A-Za-z]"
)
_TERM = r"(?:\d{0,2}(?:\\pi|[A-Za-z]){1,2}|\d{1,2}|\\frac\{\d{1,2}\}\{\d{1,2}\}|\d{1,2}/\d{1,2})"
_EXPONENT = re.compile(rf"\^(?:\\pi|\{{-?{_TERM}(?:[+-]{_TERM}){{0,3}}\}})(?!\^)")


def is_readable(text: str) -> bool:
    """Whether a text is short and tame enough to be read and evaluated in bounded time."""
    plain = re.sub(r"\\(?:begin|end)\{[pbv]?matrix\}", " ", text)
    return (
        len(text) <= 160
        and re.fullmatch(r"[\w\s\\{}()\[\],.+*/^=<>|&-]*", text, re.ASCII) is not None
        and not re.search(r"\d_|\d{31}|\.\d*\.", text)  # 204_5 is a numeral in base 5, 1.2.3 none at all
        and not _UNKNOWN_COMMAND.search(plain)
        and text.count("^") == len(_EXPONENT.findall(text)) <= 8
        and not re.search(r"[)\]}]\^\{-?\d\d", text)  # powers of powers grow by multiplication
        and _depth(plain) <= 6  # forty brackets take the reader ten seconds, eighty bars forty
        and text.count("|") <= 4
    )


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _same_reading(answer: str, gold: str) -> bool:
    try:
        from latex2sympy2_extended import latex2sympy
    except ImportError as error:
        raise ImportError(f"{error}. Formulas are read with it: pip install 'lightning-dsv3[eval]'") from error
    try:
        return _same(*(latex2sympy(text, normalization_config=None) for text in (answer, gold)))
    except Exception:
        # The reader raises plain Exception at what is no formula, sympy nearly anything at formulas without sense, such
        # as the sum of a matrix and a number: what cannot be read or compared is not equal.
        return False


def _same(a: Any, b: Any) -> bool:
    import sympy
    from sympy.core.relational import Relational

    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return getattr(a, "shape", 0) == getattr(b, "shape", 0) and _pairwise(_same, list(a), list(b))
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        ends = (a.left_open, a.right_open) == (b.left_open, b.right_open)
        return ends and _same(a.start, b.start) and _same(a.end, b.end)
    if isinstance(a, Relational) and isinstance(b, Relational):
        return _same_relation(a, b)
    if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple):
        return _pairwise(_same, a.args, b.args)
    for unordered in (sympy.FiniteSet, sympy.Union, sympy.And):
        if isinstance(a, unordered) and isinstance(b, unordered):
            return _in_any_order(a.args, b.args)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return bool(a == b) or _pairwise(_near, _values(a, b), _values(b, a))
    return bool(a == b)


def _pairwise(test: Callable[[Any, Any], bool], first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(map(test, first, second))


def _in_any_order(first: Sequence[Any], second: Sequence[Any]) -> bool:
    if len(first) != len(second):
        return False
    rest = list(second)
    for item in first:
        match = next((index for index, other in enumerate(rest) if _same(item, other)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _same_relation(a: Any, b: Any) -> bool:
    """Whether a relation is a multiple of the other: 2x = 4y and x - 2y = 0, or x < 1 and 1 > x."""
    import sympy

    if not all(isinstance(side, sympy.Expr) for side in (*a.args, *b.args)):
        return type(a) is type(b) and _pairwise(_same, a.args, b.args)
    symmetric = isinstance(a, (sympy.Eq, sympy.Ne))
    if type(a) is not type(b):
        b = b.reversed
    if type(a) is not type(b):
        return False
    left, right = a.lhs - a.rhs, b.lhs - b.rhs
    ratios = [x / y if x and y else None for x, y in zip(_values(left, right), _values(right, left), strict=True)]
    first = ratios[0]
    return first is not None and (symmetric or first.real > 0) and all(_near(ratio, first) for ratio in ratios)


def _values(expression: Any, partner: Any) -> list[complex | None]:
    """Values of an expression at three fixed points of the symbols of both, None where it has none."""
    import sympy

    symbols = sorted(expression.free_symbols | partner.free_symbols, key=str)
    constants = {symbol: {"i": sympy.I, "e": sympy.E}[symbol.name] for symbol in symbols if symbol.name in {"i", "e"}}
    unknown = [symbol for symbol in symbols if symbol not in constants]
    values: list[complex | None] = []
    for point in range(3):
        # Fractions of primes, away from the whole and half numbers at which different formulas like to agree.
        chosen = {symbol: sympy.Rational(31 + 22 * place + 14 * point, 13) for place, symbol in enumerate(unknown)}
        try:
            value = complex(expression.xreplace(constants).evalf(25, subs=chosen))
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            values.append(None)
            continue
        # What is too large for a difference counts as no value, and so do NaN and infinity.
        values.append(value if abs(value.real) < 1e150 and abs(value.imag) < 1e150 else None)
    return values


def _near(a: complex | None, b: complex | None) -> bool:
    return a is not None and b is not None and abs(a - b) <= 1e-9 * max(abs(a), abs(b))
