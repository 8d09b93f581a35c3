"""Worked examples that are no rows of a data set: lm-eval's own ones, and a few in our words.

Ours are two of CRUXEval (the official two; lm-eval's copy has lost the quotes of their strings), the worked solutions
of CMath's three (the data set has none) and the six of LiveCodeBench (its own files hold two of a kind, and the
DeepSeek-V3 report does not print its three).
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import yaml

CRUXEVAL_INPUT_SHOTS = [
    {
        "code": "def f(my_list):\n    count = 0\n    for i in my_list:\n        if len(i) % 2 == 0:\n"
        "            count += 1\n    return count",
        "input": '["mq", "px", "zy"]',
        "output": "3",
    },
    {"code": "def f(s1, s2):\n    return s1 + s2", "input": '"ba", "nana"', "output": '"banana"'},
]
CRUXEVAL_OUTPUT_SHOTS = [
    {"code": "def f(n):\n    return n", "input": "17", "output": "17"},
    {"code": 'def f(s):\n    return s + "a"', "input": '"x9j"', "output": '"x9ja"'},
]

# (the row's answer in the data set, solution, answer of the shot). The third answer of the data set is wrong: the two
# cars cover 3/5 of the way in three hours, so the 135 + 165 km that are left are 2/5 of it.
CMATH_SOLUTIONS = [
    (
        "1200",
        "二班捐款1500+200=1700元，四班和五班一共捐款8000-1500-1700-1600=3200元，四班占其中的3÷(3+5)，即3200×3÷8=1200元",
        "1200",
    ),
    (
        "900",
        "他先向东跑了800米，要回到出发点须向西跑800米，再到出发点西边100米处，所以第二段向西跑了800+100=900米",
        "900",
    ),
    (
        "775",
        "相遇后两车又行驶3小时，共行驶全程的3÷5，还剩下全程的2÷5，剩下的路程是135+165=300千米，所以全程是300÷2×5=750千米",
        "750",
    ),
]

LIVECODEBENCH_STDIN_SHOTS: list[dict[str, Any]] = [
    {
        "question": "A row of N lamps is numbered 1 to N; all are off. Q commands follow, each a pair L R: every lamp "
        "from L to R is switched over. Print how many lamps are on after all commands.\n\nInput\n\nThe first line "
        "holds N and Q. Each of the next Q lines holds L and R.\n\nOutput\n\nOne integer.\n\n"
        "Sample Input\n\n5 2\n1 3\n3 4\n\nSample Output\n\n3\n\nConstraints\n\n1 <= N, Q <= 200000\n1 <= L <= R <= N",
        "starter_code": "",
        "answer": "import sys\n\n\ndef main():\n    data = list(map(int, sys.stdin.read().split()))\n"
        "    n, q = data[0], data[1]\n    change = [0] * (n + 2)\n    for k in range(q):\n"
        "        left, right = data[2 + 2 * k], data[3 + 2 * k]\n        change[left] ^= 1\n"
        "        change[right + 1] ^= 1\n    on = 0\n    state = 0\n    for lamp in range(1, n + 1):\n"
        "        state ^= change[lamp]\n        on += state\n    print(on)\n\n\nmain()",
        "tests": [("5 2\n1 3\n3 4\n", "3"), ("1 1\n1 1\n", "1"), ("4 2\n1 4\n1 4\n", "0")],
    },
    {
        "question": "You are given a string S of lowercase letters. Print the length of the longest run of equal "
        "letters in S.\n\nInput\n\nThe string S on one line.\n\nOutput\n\nOne integer.\n\n"
        "Sample Input\n\nabbbca\n\nSample Output\n\n3\n\nConstraints\n\n1 <= |S| <= 100000",
        "starter_code": "",
        "answer": 's = input().strip()\nbest = 0\nrun = 0\nprevious = ""\nfor letter in s:\n'
        "    run = run + 1 if letter == previous else 1\n    previous = letter\n    best = max(best, run)\nprint(best)",
        "tests": [("abbbca\n", "3"), ("z\n", "1"), ("aabb\n", "2")],
    },
    {
        "question": "A shop sells N cakes with prices P_1, ..., P_N. You have M coins and buy cakes one at a time, the "
        "cheapest first, as long as the money lasts. Print the number of cakes and the coins left.\n\nInput\n\nThe "
        "first line holds N and M, the second the N prices.\n\nOutput\n\nTwo integers on one line.\n\n"
        "Sample Input\n\n4 10\n7 2 5 3\n\nSample Output\n\n3 0\n\nConstraints\n\n"
        "1 <= N <= 100000\n0 <= M <= 10^15\n1 <= P_i <= 10^9",
        "starter_code": "",
        "answer": "n, m = map(int, input().split())\nprices = sorted(map(int, input().split()))\nbought = 0\n"
        "for price in prices:\n    if price > m:\n        break\n    m -= price\n    bought += 1\nprint(bought, m)",
        "tests": [("4 10\n7 2 5 3\n", "3 0"), ("1 0\n1\n", "0 0"), ("2 100\n3 4\n", "2 93")],
    },
]
LIVECODEBENCH_FUNCTIONAL_SHOTS: list[dict[str, Any]] = [
    {
        "question": "You are given an integer array nums and an integer k. Return the number of pairs of indices i < j "
        "whose values differ by exactly k.\n\nExample 1:\n\nInput: nums = [1,3,5,3], k = 2\nOutput: 4\n\n"
        "Constraints:\n\n1 <= nums.length <= 10^5\n1 <= k <= 10^9",
        "starter_code": "class Solution:\n    def countPairs(self, nums: List[int], k: int) -> int:\n        ",
        "answer": "from collections import defaultdict\n\n\nclass Solution:\n"
        "    def countPairs(self, nums: List[int], k: int) -> int:\n        seen = defaultdict(int)\n"
        "        pairs = 0\n        for value in nums:\n            pairs += seen[value - k] + seen[value + k]\n"
        "            seen[value] += 1\n        return pairs",
        "tests": [("[1,3,5,3]\n2", "4"), ("[1]\n1", "0")],
    },
    {
        "question": "You are given a string s of words that are separated by single spaces. Return the string with "
        "every word reversed and the words in their old order.\n\nExample 1:\n\n"
        'Input: s = "read me"\nOutput: "daer em"\n\nConstraints:\n\n1 <= s.length <= 5 * 10^4',
        "starter_code": "class Solution:\n    def reverseWords(self, s: str) -> str:\n        ",
        "answer": "class Solution:\n    def reverseWords(self, s: str) -> str:\n"
        '        return " ".join(word[::-1] for word in s.split(" "))',
        "tests": [('"read me"', '"daer em"'), ('"x"', '"x"')],
    },
    {
        "question": "You climb a stair of n steps and take one, two or three steps at a time. Return the number of "
        "ways to reach the top, modulo 10^9 + 7.\n\nExample 1:\n\nInput: n = 4\nOutput: 7\n\n"
        "Constraints:\n\n1 <= n <= 10^6",
        "starter_code": "class Solution:\n    def countWays(self, n: int) -> int:\n        ",
        "answer": "class Solution:\n    def countWays(self, n: int) -> int:\n        modulus = 10**9 + 7\n"
        "        first, second, third = 0, 0, 1\n        for _ in range(n):\n"
        "            first, second, third = second, third, (first + second + third) % modulus\n        return third",
        "tests": [("4", "7"), ("1", "1")],
    },
]


def _lm_eval_file(name: str) -> Path:
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / name
    if not path.is_file():
        raise FileNotFoundError(
            f"lm_eval ships no {name} any more: install lm-eval 0.4.13, whose worked examples we use."
        )
    return path


@cache
def minerva_shots() -> list[dict[str, Any]]:
    """Minerva's four examples for MATH, read from lm-eval's source: importing it needs an old antlr4."""
    tree = ast.parse(_lm_eval_file("minerva_math/utils.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "list_fewshot_samples":
            (returned,) = (step.value for step in node.body if isinstance(step, ast.Return) and step.value)
            return ast.literal_eval(returned)
    raise LookupError("lm_eval's minerva_math/utils.py has no list_fewshot_samples: install lm-eval 0.4.13.")


@cache
def bbh_shots(subset: str) -> tuple[str, list[dict[str, str]]]:
    """The instruction of one BIG-Bench Hard task and its three worked examples, from lm-eval's own task."""
    path = _lm_eval_file(f"bbh/cot_fewshot/{subset}.yaml")
    task = yaml.safe_load(path.read_text(encoding="utf-8"))
    return task["description"], task["fewshot_config"]["samples"]
