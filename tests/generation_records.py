"""Look-alikes of the generation benchmarks' records, in the shape the hub has them; every text is ours."""

import json
from functools import cache

import datasets

from lightning_dsv3.evaluation.data import BENCHMARKS
from lightning_dsv3.evaluation.generation_prompts import AGIEVAL_INTRODUCTIONS, MGSM_WORDS, agieval_query

_NO_DATE = {"day": "", "month": "", "year": ""}


def _drop(number="", spans=(), year="", workers=()):
    """One DROP answer and the others that annotators gave."""
    answer = {"number": number, "spans": list(spans), "date": {**_NO_DATE, "year": year}, "worker_id": "", "hit_id": ""}
    more = {"number": [], "spans": [], "date": [], "worker_id": [], "hit_id": []}
    for worker in workers:
        more["number"].append(worker.get("number", ""))
        more["spans"].append(worker.get("spans", []))
        more["date"].append({**_NO_DATE, "year": worker.get("year", "")})
    return {"answer": answer, "validated_answers": more}


_BRIDGE = "The old bridge of Qarn was built in 1806 for 83.9 marks. Masons came from Lutz and from Ober."
_HARBOUR = "The harbour of Qarn freezes in January."
DROP = [
    {"passage": _BRIDGE, "question": "How many marks did the bridge cost?", **_drop(number="83.9")},
    {"passage": _BRIDGE, "question": "When was the bridge built?", **_drop(year="1806", workers=[{"year": "1806"}])},
    {
        "passage": _BRIDGE,
        "question": "Where did the masons come from?",
        **_drop(spans=["Lutz", "Ober"], workers=[{"spans": ["Lutz"]}, {}]),
    },
    {"passage": _BRIDGE, "question": "Of which place was the bridge?", **_drop(spans=["Qarn"])},
    {"passage": _BRIDGE, "question": "How many towns sent masons?", **_drop(number="2")},
    {"passage": _HARBOUR, "question": "Which month is named?", **_drop(spans=["January"])},
]
for _number, _record in enumerate(DROP):
    _record.update(section_id=f"town_{len(_record['passage'])}", query_id=str(_number))


def _trivia(question, value, *aliases):
    answer = {
        "value": value,
        "aliases": [value, *aliases],
        "normalized_aliases": [value.lower()],
        "type": "WikipediaEntity",
    }
    answer |= {
        "normalized_value": value.lower(),
        "matched_wiki_entity_name": "",
        "normalized_matched_wiki_entity_name": "",
    }
    return {"question": question, "question_id": question[:9], "question_source": "", "answer": answer}


TRIVIAQA = {
    "train": [_trivia(f"Which number comes after {n}?", str(n + 1), f"No. {n + 1}") for n in range(7)],
    "validation": [
        _trivia("Which river of Lutz flows north?", "The Olm", "River Olm"),
        _trivia("Who ate it?", "A. B. Lee"),
    ],
}
NATURALQUESTIONS = {
    "train": [{"question": f"who was king number {n} of lutz", "answer": [f"Otto {n}", "Otto"]} for n in range(7)],
    "validation": [{"question": "when was the mill of lutz built", "answer": ["1,204.5", "the year 1204"]}],
}

BBH_SHOTS = (
    "Say whether a number is even.\n\n",
    [{"input": f"Is {n} even?", "target": f"{n} is twice {n // 2}. So the answer is Yes."} for n in (2, 4, 6)],
)
BBH_SUBSETS = BENCHMARKS["bbh"].subsets
BBH = [{"input": "Is 9 even?", "target": "No"}, {"input": "Close the brackets: [ (", "target": ") ]"}]


def _agieval(subset):
    """Two records of one exam as in its own repository."""
    base = {"passage": f"Passage of {subset}. ", "question": "Which holds?", "other": None}
    if subset in ("math", "gaokao-mathcloze"):
        answers = ["$\\frac{1}{2}$", "7"]
        return [{**base, "passage": None, "options": None, "label": None, "answer": answer} for answer in answers]
    options = ["(A)red", "(B)green", "(C)blue", "(D)grey", *(["(E)none"] if subset in ("aqua-rat", "lsat-ar") else [])]
    several = {"jec-qa-kd": [["A", "C"], ["B"]], "jec-qa-ca": [["B", "D"], ["A"]], "gaokao-physics": ["C", ["A", "B"]]}
    return [{**base, "options": options, "label": label, "answer": None} for label in several.get(subset, ["B", "D"])]


AGIEVAL = {subset: _agieval(subset) for subset in AGIEVAL_INTRODUCTIONS}

HUMANEVAL = [
    {
        "task_id": "Lookalike/0",
        "prompt": 'def twice(n):\n    """Twice the number.\n    >>> twice(2)\n    4\n    """\n',
        "canonical_solution": "    return n * 2\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
        "entry_point": "twice",
    }
]


def _mbpp(task, name, setup=""):
    return {
        "task_id": task,
        "text": f"Write a function {name} that adds {task}.",
        "code": f"def {name}(n):\r\n  return n + {task}",
        "test_list": [f"assert {name}({n}) == {n + task}" for n in range(3)],
        "test_setup_code": setup,
        "challenge_test_list": [],
    }


MBPP = {
    "prompt": [_mbpp(task, f"shot_{task}") for task in range(1, 11)],
    "test": [_mbpp(11, "plus"), _mbpp(12, "more", "base = 12")],
}

CRUXEVAL = [
    {"id": "sample_0", "code": "def f(s):\n    return s + '=='", "input": "'a'", "output": "'a=='"},
    {"id": "sample_1", "code": "def f(n):\n    return {n}", "input": "3", "output": "{3}"},
]


def _livecodebench(number, functional, date):
    """A problem whose answer is the line or the list backwards."""
    kind = "functional" if functional else "stdin"
    pairs = [('["a","b"]', '["b","a"]'), ("[]", "[]")] if functional else [("abc\n", "cba"), ("x\n", "x")]
    tests = [{"input": source, "output": wanted, "testtype": kind} for source, wanted in pairs]
    return {
        "question_title": "Backwards",
        "question_content": "Print the line backwards." if not functional else "Return the list backwards.",
        "platform": "leetcode" if functional else "atcoder",
        "question_id": f"problem_{number}",
        "contest_id": "c",
        "contest_date": f"{date}T00:00:00",
        "starter_code": "class Solution:\n    def back(self, items: List[str]) -> List[str]:\n        " * functional,
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": json.dumps(tests[1:]),
        "metadata": json.dumps({"func_name": "back"} if functional else {}),
    }


LIVECODEBENCH = [
    _livecodebench(0, False, "2024-08-01"),
    _livecodebench(1, True, "2024-11-01"),
    _livecodebench(2, False, "2024-07-31"),
    _livecodebench(3, False, "2024-11-02"),
]
LIVECODEBENCH_ANSWERS = {
    "problem_0": "print(input()[::-1])",
    "problem_1": "class Solution:\n    def back(self, items: List[str]) -> List[str]:\n        return items[::-1]",
}


def _gsm8k(n):
    """One word problem; its number says which row it is."""
    return {
        "question": f"Ann has {n} pens and buys 2 more. How many has she?",
        "answer": f"She had {n} pens.\nNow she has {n}+2=<<{n}+2={n + 2}>>{n + 2:,} pens.\n#### {n + 2:,}",
    }


GSM8K = {"train": [_gsm8k(n) for n in range(7473)], "test": [_gsm8k(9000), _gsm8k(12)]}

MINERVA_SHOTS = [
    {
        "problem": f"Find $x$ if $x={n}$.",
        "solution": f"So $x=\\boxed{{{n}}}$.\nFinal Answer: The final answer is ${n}$. I hope it is correct.",
    }
    for n in range(1, 5)
]
MATH_SUBJECTS = ["Algebra", "Counting & Probability", "Geometry", "Intermediate Algebra", "Number Theory", "Prealgebra"]
MATH_SUBJECTS += ["Precalculus"]
MATH = {
    subject: [
        {"problem": "Halve one.", "level": "Level 1", "type": subject, "solution": "It is $\\boxed{\\frac{1}{2}}$."},
        {"problem": "Name a pair.", "level": "Level 5", "type": subject, "solution": "Take $\\boxed{(1,-2)}$."},
    ]
    for subject in MATH_SUBJECTS
}

MGSM = {
    language: {
        "train": [
            {
                "question": f"{words.question}{n} + 1 = ?",
                "answer": f"{words.steps}{n} + 1 = {n + 1}. {words.answer.format(n + 1)}",
                "answer_number": n + 1,
                "equation_solution": "",
            }
            for n in range(8)
        ],
        "test": [
            {"question": "2000 + 125: ?", "answer": None, "answer_number": 2125, "equation_solution": None},
            {"question": "1 + 1 = ?", "answer": None, "answer_number": 2, "equation_solution": None},
        ],
    }
    for language, words in MGSM_WORDS.items()
}

CMATH_SHOTS = [
    {"grade": "6", "question": f"第{n}题：得多少？", "golden": golden}
    for n, golden in enumerate(["1200", "900", "775"])
]
CMATH = [
    {"grade": "1", "question": "二分之一是几分之几？", "golden": "2/4"},
    {"grade": "2", "question": "三加四？", "golden": "7"},
]


def _cluewsc(text, noun, pronoun, index, label):
    target = {"span1_text": noun, "span1_index": text.index(noun), "span2_text": pronoun, "span2_index": index}
    return {"text": text, "target": target, "label": label, "idx": 0}


_CAT = "小猫看见小狗，它叫了。"
CLUEWSC = {
    "train": [
        _cluewsc(f"阿{name}说他累了，阿丁没说话。", noun, "他", 3, label)
        for name in "甲乙丙己庚辛"
        for noun, label in [("阿丁", False), (f"阿{name}", True)]
    ],
    "validation": [
        _cluewsc(_CAT, "小猫", "它", 7, True),
        _cluewsc(_CAT, "小狗", "它", 7, True),
        _cluewsc(_CAT, "看见", "它", 7, False),
    ],
}


def _cmrc(number, context, question, *answers):
    texts = list(answers)
    return {
        "id": f"DEV_{number}",
        "context": context,
        "question": question,
        "answers": {"text": texts, "answer_start": [context.find(text.strip()) for text in texts]},
    }


_TOWER = "旧塔建于1806年，塔高三十米，由石匠王五所建。"
CMRC = [
    _cmrc(0, _TOWER, "旧塔建于哪一年？", "1806年", " 1806年"),
    _cmrc(1, _TOWER, "塔有多高？", "三十米", "高三十米"),
    _cmrc(2, "新桥很短。", "新桥怎么样？", "很短"),
]

_CLUEWSC_LABEL = datasets.ClassLabel(names=["true", "false"])


def _with_label(rows):
    """The label as the hub has it: a number with a name."""
    split = datasets.Dataset.from_list([{**row, "label": int(not row["label"])} for row in rows])
    return split.cast_column("label", _CLUEWSC_LABEL)


@cache
def hub():
    """Every split, by what `datasets.load_dataset` is asked for: (path or file, configuration, split)."""
    lists = {
        ("EleutherAI/drop", None, "validation"): DROP,
        ("openai/openai_humaneval", None, "test"): HUMANEVAL,
        ("cruxeval-org/cruxeval", None, "test"): CRUXEVAL,
        ("hf://datasets/livecodebench/code_generation_lite/test4.jsonl", None, "test"): LIVECODEBENCH,
        ("cmath_dev.jsonl", None, "test"): [{"grade": "1", "question": "?", "golden": "0"}] * 500 + CMATH_SHOTS,
        ("cmath_test.jsonl", None, "test"): CMATH,
        ("hfl/cmrc2018", None, "validation"): CMRC,
    }
    for split in ("train", "validation"):
        lists["mandarjoshi/trivia_qa", "rc.nocontext", split] = TRIVIAQA[split]
        lists["google-research-datasets/nq_open", None, split] = NATURALQUESTIONS[split]
    for split, rows in MBPP.items():
        lists["google-research-datasets/mbpp", "full", split] = rows
    for split, rows in GSM8K.items():
        lists["openai/gsm8k", "main", split] = rows
    for language, splits in MGSM.items():
        for split, rows in splits.items():
            lists["juletxara/mgsm", language, split] = rows
    for subset in BBH_SUBSETS:
        lists["SaylorTwift/bbh", subset, "test"] = BBH
    for subset, rows in AGIEVAL.items():
        lists[f"hails/agieval-{subset}", None, "test"] = [_as_on_the_hub(subset, row) for row in rows]
    for subject, rows in MATH.items():
        name = subject.lower().replace("&", "and").replace(" ", "_")
        lists["EleutherAI/hendrycks_math", name, "test"] = rows
    splits = {key: datasets.Dataset.from_list(rows) for key, rows in lists.items()}
    return splits | {("clue/clue", "cluewsc2020", split): _with_label(rows) for split, rows in CLUEWSC.items()}


def _as_on_the_hub(subset, row):
    """An AGIEval record with its prompt made and its letters numbered."""
    query = agieval_query(subset, row["question"], row["options"] or [], row["passage"] or "")
    if row["label"] is None:
        return {"query": query, "answer": row["answer"]}
    return {"query": query, "choices": row["options"], "gold": ["ABCDE".index(letter) for letter in row["label"]]}
