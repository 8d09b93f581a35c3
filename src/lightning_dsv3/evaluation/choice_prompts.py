r"""Prompts of the benchmarks that are scored by perplexity: one function per benchmark, from a record to a `Question`.

A prompt is ``header`` + shots + question; options are scored behind it. Source: DeepSeek-V2 report (arXiv 2405.04434),
appendix G; where it prints nothing (MMLU-Redux, MMLU-Pro, MMMLU, and the cloze forms), ours, and the task says so.

The cloze forms score options as text and do not show them: letters sit at chance for small models (OLMES, arXiv
2406.08446).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dsv3.evaluation.data_records import LETTERS
from lightning_dsv3.evaluation.data_subjects import CEVAL, CMMLU

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked and what can be answered.

    Attributes:
        text: The question, up to where an option begins.
        choices: The options as they are scored: letters or texts.
        answer: Index of the right one.
        header: What stands before the shots.
    """

    text: str
    choices: list[str]
    answer: int
    header: str = ""


def _lettered(record: Record, text: str, closing: str, header: str = "") -> Question:
    letters = list(LETTERS[: len(record["choices"])])
    lines = [f"{letter}. {option}" for letter, option in zip(letters, record["choices"], strict=True)]
    return Question("\n".join([text, *lines, closing]), letters, record["answer"], header)


def _cloze(record: Record, text: str, header: str = "") -> Question:
    return Question(text, list(record["choices"]), record["answer"], header)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def mmlu(record: Record) -> Question:
    """MMLU and those of its family (table 29)."""
    header = f"The following are multiple choice questions (with answers) about {_spaced(record['subject'])}.\n\n"
    return _lettered(record, record["question"].strip(), "Answer:", header)


def mmlu_cloze(record: Record) -> Question:
    """MMLU, options as text."""
    header = f"The following are questions (with answers) about {_spaced(record['subject'])}.\n\n"
    return _cloze(record, f"Question: {record['question'].strip()}\nAnswer:", header)


def arc(record: Record) -> Question:
    """ARC: lettered (table 13)."""
    return _lettered(record, f"Question: {record['question']}", "Answer:")


def arc_cloze(record: Record) -> Question:
    """ARC, options as text."""
    return _cloze(record, f"Question: {record['question']}\nAnswer:")


def hellaswag(record: Record) -> Question:
    """HellaSwag: lm-eval's own text, which is that of table 25."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    text = preprocess(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    return Question(text, [preprocess(ending) for ending in record["choices"]], record["answer"])


def piqa(record: Record) -> Question:
    """PIQA: the bare goal (table 32)."""
    return _cloze(record, record["question"])


def race(record: Record) -> Question:
    """RACE: options as text, behind the article (table 33)."""
    return _cloze(record, f"Q: {record['question']}\n\nA:", f"Article:\n{record['article']}\n\n")


def ceval(record: Record) -> Question:
    """C-Eval (table 15)."""
    header = f"以下是中国关于{CEVAL[record['subject']]}考试的单项选择题，请选出其中的正确答案。\n\n"
    return _lettered(record, record["question"], "答案：", header)


def ceval_cloze(record: Record) -> Question:
    """C-Eval, options as text."""
    header = f"以下是中国关于{CEVAL[record['subject']]}考试的题目，请给出正确答案。\n\n"
    return _cloze(record, f"{record['question']}\n答案：", header)


def cmmlu(record: Record) -> Question:
    """CMMLU (table 19)."""
    header = f"以下是关于{CMMLU[record['subject']]}的单项选择题，请直接给出正确答案的选项。\n\n"
    return _lettered(record, f"题目：{record['question']}", "答案是：", header)


def cmmlu_cloze(record: Record) -> Question:
    """CMMLU, options as text."""
    header = f"以下是关于{CMMLU[record['subject']]}的题目，请直接给出正确答案。\n\n"
    return _cloze(record, f"题目：{record['question']}\n答案是：", header)


def c3(record: Record) -> Question:
    """C3: options as text (table 16)."""
    passage = "\n".join(record["context"])
    return _cloze(record, f"{passage}\n\n请根据上文回答问题：\n\n{record['question']}\n答案：")


def ccpm(record: Record) -> Question:
    """CCPM: the classical lines (table 17)."""
    question = f"以下是将某句古诗文翻译而成的现代表述：{record['question']}\n该翻译所对应的古诗文是："
    return _cloze(record, question)
