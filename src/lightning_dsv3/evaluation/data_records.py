"""From a published record to the one shape that a benchmark's tasks read, with a check of every field.

A normaliser takes a `Row` and yields records (one published record may hold several questions). Multiple choice has
``question``, ``choices`` and ``answer`` (an index); the others keep the names that the data sets on the hub have.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

Record = dict[str, Any]

LETTERS = "ABCDEFGHIJ"


class FieldError(ValueError):
    """A field of a record that is missing or wrong."""

    def __init__(self, field: str, fault: str) -> None:
        super().__init__(f"the field {field!r} {fault}")
        self.field = field


class Row:
    """A published record whose fields are checked as they are read.

    Example:
        >>> Row({"question": "Why?", "answer": "B"}).letter("answer", 4)
        1
        >>> Row({"question": " "}).text("question")
        Traceback (most recent call last):
        lightning_dsv3.evaluation.data_records.FieldError: the field 'question' is empty
    """

    def __init__(self, fields: Mapping[str, Any], subset: str = "") -> None:
        self.fields = fields
        self.subset = subset

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def get(self, *names: str) -> Any:
        """Return the first of several names that the record has."""
        for name in names:
            if name in self.fields:
                return self.fields[name]
        raise FieldError(names[0], f"is missing; the record has {sorted(map(str, self.fields))}")

    def text(self, *names: str, empty: bool = False) -> str:
        """Return a text; ``empty`` allows none."""
        value = self.get(*names)
        if value is None and empty:
            return ""
        if not isinstance(value, str):
            raise FieldError(names[0], f"must be text, not {value!r}")
        if not empty and not value.strip():
            raise FieldError(names[0], "is empty")
        return value

    def texts(self, *names: str, least: int = 1, empty: bool = False) -> list[str]:
        """Return a list of ``least`` texts or more, none of them empty."""
        value = self.get(*names)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise FieldError(names[0], f"must be a list of texts, not {value!r}")
        if len(value) < least or not (empty or all(item.strip() for item in value)):
            raise FieldError(names[0], f"must hold {least} texts or more and none that is empty, not {value!r}")
        return value

    def rows(self, name: str) -> list[Row]:
        """Return a list of objects."""
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise FieldError(name, f"must be a list of objects, not a {type(value).__name__}")
        return [Row(item) for item in value]

    def row(self, name: str) -> Row:
        """Return an object."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise FieldError(name, f"must be an object, not a {type(value).__name__}")
        return Row(value)

    def number(self, *names: str) -> int:
        """Return a whole number, which may be written as text."""
        value = self.get(*names)
        if isinstance(value, str) and value.strip().lstrip("-").isdigit():
            return int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise FieldError(names[0], f"must be a whole number, not {value!r}")
        return value

    def index(self, name: str, count: int, first: int = 0) -> int:
        """Return a number that says which of ``count`` options, counted from ``first``, as counted from 0."""
        value = self.number(name) - first
        if not 0 <= value < count:
            raise FieldError(name, f"must be {first} to {first + count - 1}, not {value + first}")
        return value

    def letter(self, name: str, count: int) -> int:
        """Return which of ``count`` options a letter names."""
        value = self.get(name)
        if not isinstance(value, str) or value.strip() not in tuple(LETTERS[:count]):
            raise FieldError(name, f"must be a letter from A to {LETTERS[count - 1]}, not {value!r}")
        return LETTERS.index(value.strip())

    def option(self, name: str, choices: list[str]) -> int:
        """Return which option a text is: the first of equal ones."""
        value = self.text(name)
        if value not in choices:
            raise FieldError(name, f"must be one of the options {choices!r}, not {value!r}")
        return choices.index(value)

    def optional(self, *names: str) -> Record:
        """Return those of some text fields that are there."""
        return {name: self.text(name, empty=True) for name in names if name in self.fields}


def _question(question: str, choices: list[str], answer: int, **more: Any) -> Iterator[Record]:
    yield {"question": question, "choices": choices, "answer": answer, **more}


# Multiple choice


def mmlu(row: Row) -> Iterator[Record]:
    """MMLU: ``choices`` and an index on the hub; columns of their own and an index or a letter in files."""
    choices = row.texts("choices", least=4) if "choices" in row else [row.text(f"choice{n}") for n in range(4)]
    answer = row.get("answer")
    lettered = isinstance(answer, str) and answer.strip() in tuple("ABCD")
    gold = row.letter("answer", 4) if lettered else row.index("answer", len(choices))
    return _question(row.text("question"), choices, gold)


# Spelling and case vary; these are the published names.
REDUX_ERRORS = {
    "ok",
    "bad_question_clarity",
    "bad_options_clarity",
    "no_correct_answer",
    "multiple_correct_answers",
    "wrong_groundtruth",
    "expert",
}


def mmlu_redux(row: Row) -> Iterator[Record]:
    """MMLU-Redux: the options may be written as a Python list; ``corrected`` is the new answer, or None."""
    choices = row.get("choices")
    if isinstance(choices, str):
        try:
            choices = ast.literal_eval(choices)
        except (ValueError, SyntaxError):
            raise FieldError("choices", f"must be a list of texts, not {choices!r}") from None
    choices = Row({"choices": choices}).texts("choices", least=4)
    error = "_".join(row.text("error_type").lower().split())
    if error not in REDUX_ERRORS:
        raise FieldError("error_type", f"must be one of {sorted(REDUX_ERRORS)}, not {error!r}")
    answer = row.index("answer", len(choices))
    corrected = answer if error == "ok" else None
    if error == "wrong_groundtruth":
        corrected = _corrected(row.get("correct_answer"), choices)
    return _question(row.text("question"), choices, answer, error_type=error, corrected=corrected)


def _corrected(answer: Any, choices: list[str]) -> int | None:
    """The option that an annotator named, by its number, letter or text (in this order); None for anything else."""
    answer = str(answer).strip()
    for names in (["0", "1", "2", "3"], ["A", "B", "C", "D"], choices):
        if answer in names:
            return names.index(answer)
    return None


def mmlu_pro(row: Row) -> Iterator[Record]:
    """MMLU-Pro: three to ten options; its subject is a column."""
    choices = row.texts("options", least=3)
    answer = row.letter("answer", len(choices))
    if "answer_index" in row and row.index("answer_index", len(choices)) != answer:
        raise FieldError("answer_index", f"must agree with the answer {LETTERS[answer]!r}")
    return _question(row.text("question"), choices, answer, subject=row.text("category"))


def _lettered(row: Row, question: str, answer: str, **more: Any) -> Iterator[Record]:
    choices = [row.text(letter) for letter in "ABCD"]
    return _question(row.text(question), choices, row.letter(answer, 4), **more)


def mmmlu(row: Row) -> Iterator[Record]:
    """MMMLU: the subject is a column."""
    return _lettered(row, "Question", "Answer", subject=row.text("Subject"))


def ceval(row: Row) -> Iterator[Record]:
    """C-Eval; the test split has no answers."""
    return _lettered(row, "question", "answer")


def cmmlu(row: Row) -> Iterator[Record]:
    """CMMLU."""
    return _lettered(row, "Question", "Answer")


def arc(row: Row) -> Iterator[Record]:
    """ARC: three to five options, lettered or numbered; lists on the hub, objects within the question as published."""
    if isinstance(row.fields.get("question"), dict):
        stem = row.row("question")
        question, options = stem.text("stem"), stem.rows("choices")
        choices, labels = [[one.text(name) for one in options] for name in ("text", "label")]
    else:
        question, lists = row.text("question"), row.row("choices")
        choices, labels = [lists.texts(name, least=2) for name in ("text", "label")]
    if len(choices) != len(labels):
        raise FieldError("choices", f"must have as many labels as texts, not {labels!r}")
    return _question(question, choices, row.option("answerKey", labels))


def hellaswag(row: Row) -> Iterator[Record]:
    """HellaSwag: the two parts of the context and the label of the activity stay apart."""
    endings = row.texts("endings", least=2)
    parts = {name: row.text(name, empty=True) for name in ("activity_label", "ctx_a", "ctx_b")}
    return _question(row.text("ctx"), endings, row.index("label", len(endings)), **parts)


def piqa(row: Row) -> Iterator[Record]:
    """PIQA; in the published files labels are a file of their own."""
    return _question(row.text("goal"), [row.text("sol1"), row.text("sol2")], row.index("label", 2))


def winogrande(row: Row) -> Iterator[Record]:
    """WinoGrande: a sentence with one gap."""
    sentence = row.text("sentence")
    if sentence.count("_") != 1:
        raise FieldError("sentence", f"must have one gap '_', not {sentence!r}")
    return _question(sentence, [row.text("option1"), row.text("option2")], row.index("answer", 2, first=1))


def race(row: Row) -> Iterator[Record]:
    """RACE: a row for each question on the hub, a file for each article as published."""
    article = row.text("article")
    if "questions" not in row:
        options = row.texts("options", least=2)
        yield from _question(row.text("question"), options, row.letter("answer", len(options)), article=article)
        return
    questions, options, answers = row.texts("questions"), row.get("options"), row.texts("answers")
    if not isinstance(options, list) or not len(questions) == len(options) == len(answers):
        raise FieldError("options", "must be a list for each question, as the answers are letters")
    for question, one, answer in zip(questions, options, answers, strict=True):
        fields = Row({"options": one, "answer": answer})
        choices = fields.texts("options", least=2)
        yield from _question(question, choices, fields.letter("answer", len(choices)), article=article)


def c3(row: Row) -> Iterator[Record]:
    """C3: a row for each question on the hub; a list of paragraphs, questions and id as published."""
    if "context" in row:
        choices = row.texts("choice", least=2)
        yield from _question(row.text("question"), choices, row.option("answer", choices), context=row.texts("context"))
        return
    context = row.texts("0")
    for question in row.rows("1"):
        choices = question.texts("choice", least=2)
        answer = question.option("answer", choices)
        yield from _question(question.text("question"), choices, answer, context=context)


def ccpm(row: Row) -> Iterator[Record]:
    """CCPM: which classical line a translation is of."""
    choices = row.texts("choices", least=2)
    return _question(row.text("translation"), choices, row.index("answer", len(choices)))


PILE_SETS = (
    "ArXiv",
    "BookCorpus2",
    "Books3",
    "DM Mathematics",
    "Enron Emails",
    "EuroParl",
    "FreeLaw",
    "Github",
    "Gutenberg (PG-19)",
    "HackerNews",
    "NIH ExPorter",
    "OpenSubtitles",
    "OpenWebText2",
    "PhilPapers",
    "Pile-CC",
    "PubMed Abstracts",
    "PubMed Central",
    "StackExchange",
    "USPTO Backgrounds",
    "Ubuntu IRC",
    "Wikipedia (en)",
    "YoutubeSubtitles",
)


def pile(row: Row) -> Iterator[Record]:
    """The Pile's test set: a text and the set that it is from."""
    meta = row.get("meta")
    if isinstance(meta, str):  # some copies hold it as text
        try:
            meta = ast.literal_eval(meta)
        except (ValueError, SyntaxError):
            raise FieldError("meta", f"must be an object, not {meta!r}") from None
    if not isinstance(meta, dict):
        raise FieldError("meta", f"must be an object, not {meta!r}")
    name = Row(meta).text("pile_set_name")
    if name not in PILE_SETS:
        raise FieldError("pile_set_name", f"must be one of {', '.join(PILE_SETS)}, not {name!r}")
    yield {"text": row.text("text", empty=True), "subject": name}
