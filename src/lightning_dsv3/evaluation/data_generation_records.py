"""Normalisers of the benchmarks that are scored by generation: one record shape, from the hub's rows or from files.

Names are those of the hub's data sets; ``answers`` is always a plain list of texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lightning_dsv3.evaluation.data_records import LETTERS, FieldError, Record, Row


def bbh(row: Row) -> Iterator[Record]:
    """BIG-Bench Hard: rows on the hub, one file of examples for each task as published."""
    for example in row.rows("examples") if "examples" in row else [row]:
        yield {"input": example.text("input"), "target": example.text("target")}


def drop(row: Row) -> Iterator[Record]:
    """DROP: rows on the hub; as published, one object of all passages with their questions."""
    if "passage" in row and "question" in row:
        validated = row.get("validated_answers")
        if not isinstance(validated, dict):
            raise FieldError("validated_answers", f"must be an object of lists, not {validated!r}")
        answer = _drop_answer(row.row("answer"))
        yield {
            **{name: row.text(name) for name in ("passage", "question")},
            **row.optional("query_id", "section_id"),
            "answer": answer,
            "validated_answers": validated,
        }
        return
    for section in row.fields:
        passage = row.row(section)
        for pair in passage.rows("qa_pairs"):
            others = [_drop_answer(other) for other in pair.rows("validated_answers")] if _has_others(pair) else []
            yield {
                "passage": passage.text("passage"),
                "question": pair.text("question"),
                "query_id": pair.text("query_id"),
                "section_id": section,
                "answer": _drop_answer(pair.row("answer")),
                "validated_answers": {name: [other[name] for other in others] for name in ("number", "spans", "date")},
            }


def _has_others(pair: Row) -> bool:
    return "validated_answers" in pair and pair.get("validated_answers") is not None


def _drop_answer(answer: Row) -> Record:
    date = answer.row("date") if answer.fields.get("date") else Row({})
    found: Record = {
        "number": answer.text("number", empty=True),
        "spans": answer.texts("spans", least=0, empty=True),
        "date": {name: str(date.fields.get(name) or "") for name in ("day", "month", "year")},
    }
    return found


def triviaqa(row: Row) -> Iterator[Record]:
    """TriviaQA: ``answers`` begins with the answer itself; its aliases follow. Files hold all under ``Data``."""
    for question in row.rows("Data") if "Data" in row else [row]:
        answer = question.row("Answer" if "Answer" in question else "answer")
        value = answer.text("value") if "value" in answer else answer.text("Value")
        aliases = answer.texts("aliases", least=0) if "aliases" in answer else answer.texts("Aliases", least=0)
        text = question.text("question") if "question" in question else question.text("Question")
        yield {"question": text, "answers": list(dict.fromkeys([value, *aliases]))}


def naturalquestions(row: Row) -> Iterator[Record]:
    """NQ-Open."""
    yield {"question": row.text("question"), "answers": row.texts("answer")}


# Exams in which several letters may be right.
AGIEVAL_SEVERAL = {"gaokao-physics", "jec-qa-ca", "jec-qa-kd"}


def agieval(row: Row) -> Iterator[Record]:
    """AGIEval: parts of the prompt as published; on the hub the whole prompt as ``query`` (else '').

    ``kind`` is ``letter`` (answer: one letter), ``letters`` (exactly these) or ``cloze`` (a written answer). A question
    of jec-qa-kd has no right letter: its answer is ''.
    """
    if "query" in row:
        parts: Record = {"query": row.text("query"), "passage": "", "question": ""}
        options = row.texts("choices", least=0) if "choices" in row else []
        if options:
            gold = row.get("gold")
            if not isinstance(gold, list) or not all(index in range(len(options)) for index in gold):
                raise FieldError("gold", f"must be a list of indices of the {len(options)} options, not {gold!r}")
            answer = "".join(LETTERS[index] for index in sorted(gold))
    else:
        parts = {"query": "", "passage": row.text("passage", empty=True), "question": row.text("question")}
        options = [] if row.get("options") is None else row.texts("options", least=2)
        if options:
            answer = _letters(row.get("label"), len(options))
    if not options:
        yield {**parts, "options": [], "answer": row.text("answer"), "kind": "cloze"}
        return
    several = len(answer) > 1 or row.subset in AGIEVAL_SEVERAL
    yield {**parts, "options": options, "answer": answer, "kind": "letters" if several else "letter"}


def _letters(label: Any, count: int) -> str:
    letters = "".join(label) if isinstance(label, list) and all(isinstance(one, str) for one in label) else label
    if not isinstance(letters, str) or (not letters and label != []) or not set(letters) <= set(LETTERS[:count]):
        raise FieldError("label", f"must be letters from A to {LETTERS[count - 1]}, not {label!r}")
    return "".join(sorted(set(letters)))


def humaneval(row: Row) -> Iterator[Record]:
    """HumanEval."""
    yield {name: row.text(name) for name in ("task_id", "prompt", "canonical_solution", "test", "entry_point")}


def mbpp(row: Row) -> Iterator[Record]:
    """MBPP."""
    yield {
        "task_id": row.number("task_id"),
        **{name: row.text(name) for name in ("text", "code")},
        "test_setup_code": row.text("test_setup_code", empty=True),
        "test_list": row.texts("test_list"),
    }


_LIVECODEBENCH = ("question_title", "question_content", "platform", "question_id", "contest_date", "difficulty")


def livecodebench(row: Row) -> Iterator[Record]:
    """LiveCodeBench: the fields of ``code_generation_lite``; tests stay packed."""
    record = {name: row.text(name) for name in _LIVECODEBENCH}
    record["starter_code"] = row.text("starter_code", empty=True)
    for name in ("public_test_cases", "metadata"):
        try:
            json.loads(row.text(name))
        except json.JSONDecodeError as error:
            raise FieldError(name, f"must be JSON: {error}") from None
    yield record | {name: row.text(name) for name in ("public_test_cases", "private_test_cases", "metadata")}


def cruxeval(row: Row) -> Iterator[Record]:
    """CRUXEval; a function may take no input."""
    yield {**{name: row.text(name) for name in ("id", "code", "output")}, "input": row.text("input", empty=True)}


def gsm8k(row: Row) -> Iterator[Record]:
    """GSM8K: the answer ends in ``#### N``."""
    answer = row.text("answer")
    if not answer.rpartition("####")[2].strip() or "####" not in answer:
        raise FieldError("answer", f"must end in '#### N', not {answer[-40:]!r}")
    yield {"question": row.text("question"), "answer": answer}


def math(row: Row) -> Iterator[Record]:
    r"""MATH: the solution has its answer in ``\boxed{}``."""
    solution = row.text("solution")
    if "\\boxed" not in solution and "\\fbox" not in solution:
        raise FieldError("solution", "has no \\boxed{} answer")
    yield {"problem": row.text("problem"), "type": row.text("type"), "level": row.text("level"), "solution": solution}


def mgsm(row: Row) -> Iterator[Record]:
    """MGSM: ``answer`` is the number as written; files have no header."""
    question = row.text("question") if "question" in row else row.text("0")
    answer = str(row.get("answer_number", "1")).strip()
    digits = answer.replace(",", "").lstrip("-").replace(".", "", 1)
    if not digits.isdigit():
        raise FieldError("answer_number", f"must be a number, not {answer!r}")
    yield {"question": question, "answer": answer}


def mgsm_shots(row: Row) -> Iterator[Record]:
    """MGSM's exemplars: rows on the hub; as published, of all languages in one object."""
    if "MGSM_EXEMPLARS" not in row:
        yield {"question": row.text("question"), "answer": row.text("answer")}
        return
    exemplars = row.row("MGSM_EXEMPLARS").row(row.subset)
    for number in sorted(exemplars.fields, key=int):
        one = exemplars.row(number)
        yield {"question": one.text("q"), "answer": one.text("a")}


def cmath(row: Row) -> Iterator[Record]:
    """CMath: the question is ``input`` as published and ``question`` on the hub."""
    question = row.text("question") if "question" in row else row.text("input")
    yield {"question": question, "golden": row.text("golden"), "grade": row.number("grade")}


def cluewsc(row: Row) -> Iterator[Record]:
    """CLUEWSC: ``label`` is ``true`` or ``false``."""
    target = row.row("target")
    label = str(row.get("label")).lower()
    if label not in ("true", "false"):
        raise FieldError("label", f"must be true or false, not {row.get('label')!r}")
    yield {
        "text": row.text("text"),
        "target": {
            **{name: target.text(name) for name in ("span1_text", "span2_text")},
            **{name: target.number(name) for name in ("span1_index", "span2_index")},
        },
        "label": label,
    }


def cmrc(row: Row) -> Iterator[Record]:
    """CMRC 2018: rows on the hub; as published, nested as SQuAD is."""
    if "data" not in row:
        yield {
            **{name: row.text(name) for name in ("id", "context", "question")},
            "answers": row.row("answers").texts("text"),
        }
        return
    for article in row.rows("data"):
        for paragraph in article.rows("paragraphs"):
            for question in paragraph.rows("qas"):
                yield {
                    "id": question.text("id"),
                    "context": paragraph.text("context"),
                    "question": question.text("question"),
                    "answers": [answer.text("text") for answer in question.rows("answers")],
                }
