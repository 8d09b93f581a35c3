"""Prompts of the benchmarks that are scored by generation: one function per benchmark, from a record to a `Turn`.

A prompt is ``header`` + shots + question. Each shot is a `Turn` (``text`` + ``target``) and ends in the benchmark's
delimiter; the question is a `Turn` whose target is left for the model. lm-eval puts them together (a task's
``description``, ``doc_to_text``, ``doc_to_target`` and ``fewshot_delimiter``), so that ``--num_fewshot`` and chat
templates work as for any other task.

Source: DeepSeek-V2 report (arXiv 2405.04434), appendix G, tables 12 to 37; where it prints nothing (MGSM,
LiveCodeBench), the benchmark's own prompt. Records have the field names of the published data sets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_dsv3.evaluation.scoring.mathematics import extract_answer

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """What the prompt asks, up to where the model goes on, and what a worked example has there."""

    text: str
    target: str


def bbh(question: str, reasoning: str) -> Turn:
    """BIG-Bench Hard: chain of thought that ends in "So the answer is ..." (table 14)."""
    return Turn(f"Q: {question}\nA: Let's think step by step.\n", reasoning)


DROP_HEADER = (
    "Passage: {passage}\n\n"
    "Answer the following questions based on the above passage, please calculate carefully if calculation is "
    "necessary.\n"
)


def drop(question: str, answer: Sequence[str], kind: str) -> Turn:
    """DROP: the kind of the answer is given, also of the tested question (table 21).

    Args:
        question: The question.
        answer: The spans of the answer; one for a number or a date.
        kind: ``number``, ``date``, ``span`` or ``spans``.
    """
    text = f"Q: {question}\nA: The answer type is {kind}. So according to above Passage, the answer is"
    return Turn(text, f" {', '.join(answer)}.")


OPEN_QUESTIONS_HEADER = "Answer these questions:\n"


def open_question(question: str, answer: str) -> Turn:
    """TriviaQA and NaturalQuestions: lines of Q and A (tables 30 and 34).

    NaturalQuestions' have no question mark of their own.
    """
    return Turn(f"Q: {question.rstrip().removesuffix('?').rstrip()}?\nA:", f" {answer}")


_EXAM = "以下是一道中国{}，请选择正确的答案。"
_ENGLISH_EXAM = "The following is a {} question. Please select the correct answer."
# The introductory line of table 12 is that of gaokao-biology; the others are OpenCompass's for the same form.
AGIEVAL_INTRODUCTIONS = {
    "aqua-rat": _ENGLISH_EXAM.format("AQUA-RAT"),
    "gaokao-biology": _EXAM.format("高考生物选择题"),
    "gaokao-chemistry": _EXAM.format("高考化学选择题"),
    "gaokao-chinese": _EXAM.format("高考语文选择题"),
    "gaokao-english": _EXAM.format("高考英语选择题"),
    "gaokao-geography": _EXAM.format("高考地理选择题"),
    "gaokao-history": _EXAM.format("高考历史选择题"),
    "gaokao-mathcloze": "以下是一道中国高考数学填空题，请填入正确的答案。",
    "gaokao-mathqa": _EXAM.format("高考数学选择题"),
    "gaokao-physics": _EXAM.format("高考物理选择题"),
    "jec-qa-ca": _EXAM.format("司法考试案例分析题"),
    "jec-qa-kd": _EXAM.format("司法考试基础知识题"),
    "logiqa-en": _ENGLISH_EXAM.format("Logic Reasoning"),
    "logiqa-zh": _EXAM.format("公务员考试题"),
    "lsat-ar": _ENGLISH_EXAM.format("LSAT Analytical Reasoning"),  # codespell:ignore lsat
    "lsat-lr": _ENGLISH_EXAM.format("LSAT Logical Reasoning"),  # codespell:ignore lsat
    "lsat-rc": _ENGLISH_EXAM.format("LSAT Reading Comprehension"),  # codespell:ignore lsat
    "math": "The following is a Math question. Please give the correct answer.",
    "sat-en": _ENGLISH_EXAM.format("SAT English"),
    "sat-en-without-passage": _ENGLISH_EXAM.format("SAT English"),
    "sat-math": _ENGLISH_EXAM.format("SAT Math"),
}
AGIEVAL_CHINESE = frozenset(name for name, line in AGIEVAL_INTRODUCTIONS.items() if not line.isascii())
# Its questions are English, and so is all of its prompt but the first line.
_ENGLISH_PROMPT = frozenset(AGIEVAL_INTRODUCTIONS) - AGIEVAL_CHINESE | {"gaokao-english"}


def agieval_query(subset: str, question: str, options: Sequence[str], passage: str) -> str:
    """AGIEval's official zero-shot prompt.

    Args:
        subset: Name of the exam.
        question: The question.
        options: Options that begin with ``(A)``, ...; none where the answer is written out.
        passage: The text that the question is about, or ''.
    """
    english = subset in _ENGLISH_PROMPT
    opening, closing = ("Q: ", "A: The answer is") if english else ("问题：", "答案：")
    text = passage + opening + question
    if options:
        last = "ABCDEFG"[len(options) - 1]
        text += (" Answer Choices: " if english else " 选项：") + " ".join(options)
        closing = f"A: Among A through {last}, the answer is" if english else f"答案：从A到{last}, 我们应选择"
    return f"{text}\n{closing}"


def agieval(subset: str, query: str, answer: str) -> Turn:
    """AGIEval: an introductory line and the official zero-shot prompt (table 12).

    Args:
        subset: Name of the exam.
        query: The official prompt.
        answer: Letters, or the written answer.
    """
    space = " " if subset in _ENGLISH_PROMPT else ""
    return Turn(f"{AGIEVAL_INTRODUCTIONS[subset]}\n{query}", space + answer)


def humaneval(record: Record) -> Turn:
    """HumanEval: the prompt as it is (table 26)."""
    return Turn(record["prompt"], record["canonical_solution"])


def mbpp(record: Record) -> Turn:
    """MBPP (table 28); the data set's line ends are those of Windows, a prompt's are not."""
    tests = "\n".join(record["test_list"])
    text = f"You are an expert Python programmer, and here is your task: {record['text']} "
    text += f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    return Turn(text, "\n".join(line.rstrip() for line in record["code"].splitlines()) + "\n[DONE]")


def livecodebench(question: str, starter_code: str, answer: str) -> Turn:
    """LiveCodeBench: its own form for base models (``LMStyle.GenericBase``)."""
    starter = f"### Starter Code\n{starter_code}\n\n" if starter_code else ""
    return Turn(f"### Question\n{question}\n\n{starter}### Answer\n\n", answer)


CRUXEVAL_INPUT_HEADER = (
    "You will be given a function f and an output in the form f(??) == output. Find any input such that executing f on "
    "the input leads to the given output. There may be multiple answers, but you should only output one. In [ANSWER] "
    "and [/ANSWER] tags, complete the assertion with one such input that will produce the output when executing the "
    "function.\n\n"
)
CRUXEVAL_OUTPUT_HEADER = (
    "You are given a Python function and an assertion containing an input to the function. Complete the assertion with "
    "a literal (no unsimplified expressions, no function calls) containing the output when executing the provided code "
    "on the given input, even if the function is incorrect or incomplete. Do NOT output any extra information. Provide "
    "the full assertion with the correct output in [ANSWER] and [/ANSWER] tags, following the examples.\n\n"
)


def cruxeval_input(record: Record) -> Turn:
    """CRUXEval-I: find an input (table 36)."""
    return _cruxeval(record, f"f(??) == {record['output']}")


def cruxeval_output(record: Record) -> Turn:
    """CRUXEval-O: find the output (table 37)."""
    return _cruxeval(record, f"f({record['input']}) == ??")


def _cruxeval(record: Record, question: str) -> Turn:
    answer = f"assert f({record['input']}) == {record['output']}\n[/ANSWER]"
    return Turn(f"[PYTHON]\n{record['code']}\nassert {question}\n[/PYTHON]\n[ANSWER]\n", answer)


def gsm8k(record: Record) -> Turn:
    """GSM8K: the solution on one line, without calculator marks (table 24)."""
    solution, _, number = record["answer"].rpartition("####")
    steps = " ".join(re.sub("<<.*?>>", "", solution).split())
    answer = f" {steps} The answer is {number.strip()}."
    return Turn(f"Q: {record['question']}\nA: Let's think step by step.", answer)


def math(record: Record) -> Turn:
    """MATH: the form of Minerva (table 27)."""
    solution = record["solution"]
    if "Final Answer:" not in solution:
        solution += f"\nFinal Answer: The final answer is ${extract_answer(solution)}$. I hope it is correct."
    return Turn(f"Problem:\n{record['problem']}\n\nSolution:", f" {solution}")


@dataclass(frozen=True)
class MgsmWords:
    """The words of one language's exemplars: before the question, before the steps, before the number."""

    question: str
    steps: str
    answer: str


MGSM_WORDS = {
    "bn": MgsmWords("প্রশ্ন: ", "ধাপে ধাপে উত্তর: ", "উত্তর হল {}।"),
    "de": MgsmWords("Frage: ", "Schritt-für-Schritt-Antwort: ", "Die Antwort ist {}."),  # codespell:ignore ist
    "en": MgsmWords("Question: ", "Step-by-Step Answer: ", "The answer is {}."),
    "es": MgsmWords("Pregunta: ", "Respuesta paso a paso: ", "La respuesta es {}."),
    "fr": MgsmWords("Question : ", "Réponse étape par étape : ", "La réponse est {}."),
    "ja": MgsmWords("問題：", "ステップごとの答え：", "答えは{}です。"),
    "ru": MgsmWords("Задача: ", "Пошаговое решение: ", "Ответ — {}."),
    "sw": MgsmWords("Swali: ", "Jibu la Hatua kwa Hatua: ", "Jibu ni {}."),
    "te": MgsmWords("ప్రశ్న: ", "దశలవారీగా సమాధానం: ", "సమాధానం {}."),
    "th": MgsmWords("โจทย์: ", "คำตอบทีละขั้นตอน: ", "คำตอบคือ {}"),
    "zh": MgsmWords("问题：", "逐步解答：", "答案是 {}。"),
}


def mgsm(language: str, question: str, number: str) -> Turn:
    """MGSM: question and steps in the language itself, as in its exemplars."""
    words = MGSM_WORDS[language]
    label = words.steps.rstrip()
    return Turn(f"{words.question}{question}\n{label}", words.steps[len(label) :] + words.answer.format(number))


def mgsm_exemplar(language: str, question: str, steps: str) -> Turn:
    """One of MGSM's exemplars; its two texts bring the words before them along, which end in a colon."""
    turn = mgsm(language, _after_colon(question), "")
    words = MGSM_WORDS[language]
    return Turn(turn.text, words.steps[len(words.steps.rstrip()) :] + _after_colon(steps))


def _after_colon(text: str) -> str:
    return re.split("[:：]", text, maxsplit=1)[-1].strip()


def cmath(question: str, solution: str, number: str) -> Turn:
    """CMath (table 18)."""
    stated = f"所以答案是：{number}。"
    return Turn(f"Q: {question}\nA:", f" {solution}。{stated}" if solution else f" {stated}")


def cluewsc(text: str, pronoun: str, noun: str) -> Turn:
    """CLUEWSC: what a pronoun refers to (table 23)."""
    return Turn(f'{text}\n上面的句子中的"{pronoun}"指的是\n', noun)


CMRC_HEADER = "文章：{context}\n\n根据上文回答下面的问题。\n"


def cmrc(question: str, answer: str) -> Turn:
    """CMRC 2018 (table 20)."""
    return Turn(f"问题：{question}\n答案：", answer)
