"""Look-alikes of the choice benchmarks' records, in the shape the hub has them; every text is ours."""

import datasets

from lightning_dsv3.evaluation.data_subjects import CEVAL, CMMLU, MMLU, MMMLU

# A few subjects are enough; the others have one question each.
TOWNS = ["Qarn", "Lutz", "Ober", "Tild", "Wesk"]


def _mmlu(subject, number):
    place = TOWNS[number % len(TOWNS)]
    return {
        "question": f" Which number is {number} + 1 in the {subject} of {place}? ",
        "choices": [str(number + step) for step in (2, 1, 3, 10)],
        "answer": (number + 1) % 4,
        "subject": subject,
    }


_ANSWER = datasets.ClassLabel(names=list("ABCD"))
_MMLU_FEATURES = datasets.Features(
    {
        "question": datasets.Value("string"),
        "choices": [datasets.Value("string")],
        "answer": _ANSWER,
        "subject": datasets.Value("string"),
    }
)
_TWICE = {"abstract_algebra", "high_school_us_history"}
MMLU_TEST = [_mmlu(subject, n) for subject in MMLU for n in range(2 if subject in _TWICE else 1)]
MMLU_DEV = [_mmlu(subject, 100 + n) for subject in MMLU for n in range(5)]

_ERRORS = ["ok", "wrong_groundtruth", "bad_question_clarity", "ok"]


def _redux(subject, number):
    row = _mmlu(subject, number)
    del row["subject"]
    error = _ERRORS[number]
    right = "2" if error == "wrong_groundtruth" else None
    return {**row, "error_type": error, "source": "", "correct_answer": right, "potential_reason": None}


REDUX = {subject: [_redux(subject, n) for n in range(len(_ERRORS))] for subject in MMLU}


def _pro(category, number, count):
    return {
        "question_id": number,
        "question": f"Which sign stands at place {number} in {category}?",
        "options": [f"sign {number}.{n}" for n in range(count)],
        "answer": "ABCDEFGHIJ"[count - 1],
        "answer_index": count - 1,
        "cot_content": "A: Let's think step by step.",
        "category": category,
        "src": "ours",
    }


PRO = {
    "test": [_pro("law", 0, 10), _pro("law", 1, 3), _pro("health", 2, 4)],
    "validation": [_pro(category, 10 + n, 10 - n) for category in ("health", "law") for n in range(5)],
}


def _mmmlu(language, subject, number):
    options = {letter: f"{language} {number}{letter}" for letter in "ABCD"}
    question = f"{language}: {subject} {number}?"
    return {"Unnamed: 0": number, "Question": question, **options, "Answer": "BDAC"[number % 4], "Subject": subject}


MMMLU_ROWS = {
    language: [_mmmlu(language, subject, n) for subject in ("anatomy", "us_foreign_policy") for n in range(7)]
    for language in MMMLU
}


def _arc(number):
    count = (4, 3, 5)[number % 3]
    labels = list("12345" if number % 2 else "ABCDE")[:count]
    return {
        "id": f"town_{number}",
        "question": f"What falls on {TOWNS[number % 5]} in month {number}?",
        "choices": {"text": [f"rain {number}-{n}" for n in range(count)], "label": labels},
        "answerKey": labels[number % count],
    }


ARC = {"test": [_arc(n) for n in range(6)], "train": [_arc(100 + n) for n in range(30)]}


def _hellaswag(number):
    return {
        "ind": number,
        "activity_label": "Mending nets",
        "ctx_a": f"[header] How to mend net {number} [title] Find the hole. [step] A man sits down.",
        "ctx_b": "the man",
        "ctx": f"net {number}",
        "endings": [f"cuts knot {n}  with a knife. [substeps] He rests." for n in range(4)],
        "source_id": "ours",
        "split": "val",
        "split_type": "indomain",
        "label": str(number % 4),
    }


HELLASWAG = {"validation": [_hellaswag(n) for n in range(3)], "train": [_hellaswag(100 + n) for n in range(12)]}

PIQA = [
    {"goal": "How to dry a boot?", "sol1": "Stuff it with paper.", "sol2": "Stuff it with wet paper.", "label": 0},
    {"goal": "Open a jar", "sol1": "Turn the jar's bottom.", "sol2": "Turn its lid.", "label": 1},
]


def _winogrande(number):
    first, second = TOWNS[number % 5], TOWNS[(number + 1) % 5]
    sentence = f"{first} has more wells than {second}, so _ had water in the dry year {number}."
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(1 + number % 2)}


WINOGRANDE = {"validation": [_winogrande(n) for n in range(4)], "train": [_winogrande(100 + n) for n in range(8)]}


def _race(article, number):
    return {
        "example_id": f"{article}.txt",
        "article": f"The mill of {article} has {number and 2} wheels.",
        "question": f"What of {article} is asked in question {number}?",
        "options": [f"{article} {number} {n}" for n in "wxyz"],
        "answer": "ABCD"[number % 4],
    }


def _article(article, count):
    return [{**_race(article, n), "article": f"The mill of {article} has two wheels."} for n in range(count)]


RACE = {level: [*_article(f"Lutz {level}", 7), *_article(f"Ober {level}", 1)] for level in ("middle", "high")}


def _chinese(subject, number, question="question", answer="answer"):
    row = {question: f"{subject}第{number}题？", **{letter: f"{number}{letter}项" for letter in "ABCD"}}
    return {"id": number, **row, answer: "CADB"[number % 4]}


CEVAL_ROWS = {
    (subject, split): [{**_chinese(subject, first + n), "explanation": ""} for n in range(count)]
    for subject in CEVAL
    for split, first, count in (("val", 0, 1), ("dev", 10, 5))
}
CMMLU_ROWS = {
    (subject, split): [_chinese(subject, first + n, "Question", "Answer") for n in range(count)]
    for subject in CMMLU
    for split, first, count in (("test", 0, 1), ("dev", 10, 5))
}

C3 = [
    {
        "id": 0,
        "context": ["男：磨坊几点开门？", "女：八点。"],
        "question": "磨坊什么时候开门？",
        "choice": ["七点", "八点", "九点半"],
        "answer": "八点",
    },
    {
        "id": 1,
        "context": ["旧桥很窄。"],
        "question": "桥怎么样？",
        "choice": ["宽", "不知道", "窄", "宽"],
        "answer": "宽",
    },
]

CCPM = [
    {
        "translation": "雨停以后，小路上落满了花。",
        "choices": ["雨歇花满径", "雨来花满径", "风歇花满径", "雨歇叶满径"],
        "answer": 0,
    },
    {
        "translation": "远处的钟声传到船上。",
        "choices": ["钟声到客船", "远钟到我船", "远钟来船上", "远笛到船头"],
        "answer": 2,
    },
]

PILE = [
    {"text": "A mill by the river.\nIt turns.", "meta": {"pile_set_name": "Pile-CC"}},
    {"text": "", "meta": {"pile_set_name": "Github"}},
    {"text": "def f(): return 'ß'", "meta": {"pile_set_name": "Github"}},
    {"text": "河边的磨坊 turns.", "meta": {"pile_set_name": "Pile-CC"}},
    {"text": "Chapter one.", "meta": {"pile_set_name": "Gutenberg (PG-19)"}},
]


class Rows(list):
    """As much of a `datasets.Dataset` as loading needs; making hundreds of real ones takes seconds."""

    @property
    def features(self):
        return {}

    def to_list(self):
        return [dict(row) for row in self]

    def select(self, numbers):
        return Rows(self[number] for number in numbers)


def hub():
    """What a fake hub holds: a data set (or file), a configuration and a split, and its rows."""
    splits = {
        ("cais/mmlu", "all", "test"): datasets.Dataset.from_list(MMLU_TEST, features=_MMLU_FEATURES),
        ("cais/mmlu", "all", "dev"): datasets.Dataset.from_list(MMLU_DEV, features=_MMLU_FEATURES),
    }
    rows = {
        **{("edinburgh-dawg/mmlu-redux-2.0", subject, "test"): found for subject, found in REDUX.items()},
        **{("TIGER-Lab/MMLU-Pro", None, split): found for split, found in PRO.items()},
        **{("openai/MMMLU", language, "test"): found for language, found in MMMLU_ROWS.items()},
        **{("allenai/ai2_arc", f"ARC-{level}", split): ARC[split] for level in ("Easy", "Challenge") for split in ARC},
        **{("Rowan/hellaswag", None, split): found for split, found in HELLASWAG.items()},
        ("baber/piqa", None, "validation"): PIQA,
        **{("allenai/winogrande", "winogrande_xl", split): found for split, found in WINOGRANDE.items()},
        **{("ehovy/race", level, "test"): found for level, found in RACE.items()},
        **{("ceval/ceval-exam", subject, split): found for (subject, split), found in CEVAL_ROWS.items()},
        **{("haonan-li/cmmlu", subject, split): found for (subject, split), found in CMMLU_ROWS.items()},
        ("clue/clue", "c3", "validation"): C3,
        ("https://raw.githubusercontent.com/THUNLP-AIPoet/CCPM/HEAD/valid.jsonl", None, "test"): CCPM,
        ("test.jsonl.zst", None, "test"): PILE,
    }
    return splits | {key: Rows(found) for key, found in rows.items()}
