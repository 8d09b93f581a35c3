"""What the YAML files of the benchmarks that are scored by generation refer to: loading and shots.

A loader (``custom_dataset``) returns the tested records as a `datasets.Dataset`, each with the parts of its prompt
(``header``, ``text``, ``target``; see `lightning_dsv3.evaluation.generation_prompts`) and what its scorer needs.
``target`` is what a perfect model writes. Shots are either one pool for all records (split ``shots``, of which lm-eval
takes the first ``num_fewshot``) or, where they depend on the record, its column ``shots``. They are the same in every
run; ``--metadata '{"fewshot_seed": 7}'`` draws others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.samplers import ContextSampler

from lightning_dsv3.evaluation import generation_prompts as prompts
from lightning_dsv3.evaluation import generation_shots as examples
from lightning_dsv3.evaluation.choice_tasks import draw, in_turn
from lightning_dsv3.evaluation.data import found, load_records, load_subsets
from lightning_dsv3.evaluation.generation_prompts import Record, Turn

Document = dict[str, Any]

# Shots that a user can ask for with --num_fewshot where the pool is a training split or a passage.
_MOST_SHOTS = 64
_MOST_SHOTS_OF_PASSAGE = 8
_MBPP_SHOTS = (2, 3, 4)


# Shots


class OwnShots(ContextSampler):
    """The shots that each record brings along (column ``shots``), the first ones."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[Any]:
        """Take the first ``n`` shots of the tested record.

        Raises:
            ValueError: If it has fewer.
        """
        shots = eval_doc["shots"]
        if n > len(shots):
            raise ValueError(f"num_fewshot={n}: this task has {len(shots)} worked examples; ask for at most as many")
        return shots[:n]


class PassageShots(OwnShots):
    """Other questions of the tested record's passage; as many as there are, if it has fewer than asked for."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[Any]:
        """Take the first ``n`` shots of the tested record, or all.

        Raises:
            ValueError: If no record has that many.
        """
        if n > _MOST_SHOTS_OF_PASSAGE:
            raise ValueError(
                f"num_fewshot={n}: this task takes at most {_MOST_SHOTS_OF_PASSAGE} questions of a passage"
            )
        return eval_doc["shots"][:n]


def _split(documents: Iterable[Document], shots: Sequence[Turn] | None = None) -> dict[str, datasets.Dataset]:
    splits = {"test": datasets.Dataset.from_list(list(documents))}
    if shots is not None:
        splits["shots"] = datasets.Dataset.from_list([_document(shot) for shot in shots])
    return splits


def _document(turn: Turn, header: str = "", **fields: Any) -> Document:
    return {"header": header, "text": turn.text, "target": turn.target, **fields}


def _as_shots(turns: Iterable[Turn]) -> list[dict[str, str]]:
    return [{"text": turn.text, "target": turn.target} for turn in turns]


# Worked examples that are the same for every record of a kind


def load_bbh(**metadata: Any) -> dict[str, datasets.Dataset]:
    """BIG-Bench Hard."""

    def documents(subset: str, records: Sequence[Record]) -> Iterator[Document]:
        header, samples = examples.bbh_shots(subset)
        worked = [prompts.bbh(sample["input"], sample["target"]) for sample in samples]
        shots = _as_shots(draw(worked, metadata, subset))
        for record in records:
            turn = prompts.bbh(record["input"], f"So the answer is {record['target']}.")
            yield _document(turn, header, shots=shots, gold=record["target"], subset=subset)

    return _split(in_turn(documents(*item) for item in load_subsets("bbh").items()))


def load_livecodebench(**metadata: Any) -> dict[str, datasets.Dataset]:
    """LiveCodeBench's window."""

    def turns(shots: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, str]]:
        worked = [prompts.livecodebench(shot["question"], shot["starter_code"], shot["answer"]) for shot in shots]
        return _as_shots(draw(worked, metadata, kind))

    methods = turns(examples.LIVECODEBENCH_FUNCTIONAL_SHOTS, "functional")
    scripts = turns(examples.LIVECODEBENCH_STDIN_SHOTS, "stdin")
    documents = []
    for record in load_records("livecodebench"):
        turn = prompts.livecodebench(record["question_content"], record["starter_code"], "")
        documents.append({**record, **_document(turn, shots=methods if record["starter_code"] else scripts)})
    return _split(documents)


def load_humaneval(**_: Any) -> dict[str, datasets.Dataset]:
    """HumanEval."""
    return _split({**record, **_document(prompts.humaneval(record))} for record in load_records("humaneval"))


def load_mbpp(**metadata: Any) -> dict[str, datasets.Dataset]:
    """MBPP's test tasks; shots are tasks 2, 3 and 4 of its ten for prompts, then the others.

    Raises:
        ValueError: If one of the three is not among the data.
    """
    pool = {record["task_id"]: prompts.mbpp(record) for record in load_records("mbpp", split="shots")}
    if absent := [task for task in _MBPP_SHOTS if task not in pool]:
        raise ValueError(f"MBPP's shots must be its tasks 2, 3 and 4; the data at hand have no {absent}")
    first = sorted(pool, key=lambda task: (task not in _MBPP_SHOTS, task))
    shots = draw([pool[task] for task in first], metadata)
    return _split(({**record, **_document(prompts.mbpp(record))} for record in load_records("mbpp")), shots)


def load_cruxeval_i(**metadata: Any) -> dict[str, datasets.Dataset]:
    """CRUXEval-I."""
    return _cruxeval(
        "cruxeval_i", prompts.CRUXEVAL_INPUT_HEADER, prompts.cruxeval_input, examples.CRUXEVAL_INPUT_SHOTS, metadata
    )


def load_cruxeval_o(**metadata: Any) -> dict[str, datasets.Dataset]:
    """CRUXEval-O."""
    return _cruxeval(
        "cruxeval_o", prompts.CRUXEVAL_OUTPUT_HEADER, prompts.cruxeval_output, examples.CRUXEVAL_OUTPUT_SHOTS, metadata
    )


def _cruxeval(
    benchmark: str, header: str, prompt: Callable[[Record], Turn], shots: Sequence[Record], metadata: Mapping[str, Any]
) -> dict[str, datasets.Dataset]:
    worked = [prompt(shot) for shot in shots]
    documents = ({**record, **_document(prompt(record), header)} for record in load_records(benchmark))
    return _split(documents, draw(worked, metadata))


def load_math(**metadata: Any) -> dict[str, datasets.Dataset]:
    """MATH, by subject."""
    worked = [prompts.math(shot) for shot in examples.minerva_shots()]
    subjects: dict[str, list[Document]] = defaultdict(list)
    for record in load_records("math"):
        subject = record["type"].lower().replace("&", "and").replace(" ", "_")
        subjects[subject].append(_document(prompts.math(record), gold=record["solution"], subset=subject))
    return _split(in_turn(subjects.values()), draw(worked, metadata))


def load_cmath(**metadata: Any) -> dict[str, datasets.Dataset]:
    """CMath; its three shots are rows of the data set with solutions of ours.

    Raises:
        ValueError: If the rows are others.
    """
    rows = load_records("cmath", split="shots")
    if [row["golden"] for row in rows] != [answer for answer, _, _ in examples.CMATH_SOLUTIONS]:
        raise ValueError(f"CMath's shots must be the rows 500 to 502 of its development split, got {rows}")
    worked = [
        prompts.cmath(row["question"], solution, answer)
        for row, (_, solution, answer) in zip(rows, examples.CMATH_SOLUTIONS, strict=True)
    ]
    documents = (
        _document(prompts.cmath(record["question"], "", record["golden"]), gold=record["golden"])
        for record in load_records("cmath")
    )
    return _split(documents, draw(worked, metadata))


# Shots that are rows of a data set


def load_triviaqa(**metadata: Any) -> dict[str, datasets.Dataset]:
    """TriviaQA."""
    return _open_questions("triviaqa", metadata)


def load_naturalquestions(**metadata: Any) -> dict[str, datasets.Dataset]:
    """NaturalQuestions."""
    return _open_questions("naturalquestions", metadata)


def _open_questions(benchmark: str, metadata: Mapping[str, Any]) -> dict[str, datasets.Dataset]:
    def turn(record: Record) -> Turn:
        return prompts.open_question(record["question"], record["answers"][0])

    pool = [turn(record) for record in load_records(benchmark, split="shots")]
    documents = (
        _document(turn(record), prompts.OPEN_QUESTIONS_HEADER, golds=record["answers"])
        for record in load_records(benchmark)
    )
    return _split(documents, draw(pool, metadata)[:_MOST_SHOTS])


def load_gsm8k(**metadata: Any) -> dict[str, datasets.Dataset]:
    """GSM8K."""
    pool = load_records("gsm8k", split="shots")
    documents = (_document(prompts.gsm8k(record), gold=record["answer"]) for record in load_records("gsm8k"))
    return _split(documents, [prompts.gsm8k(shot) for shot in draw(pool, metadata)])


def load_mgsm(subset: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """One language of MGSM: ``subset`` is its code."""
    shots = [
        prompts.mgsm_exemplar(subset, shot["question"], shot["answer"])
        for shot in load_records("mgsm", subset, "shots")
    ]
    documents = (
        _document(prompts.mgsm(subset, record["question"], record["answer"]), gold=record["answer"], language=subset)
        for record in load_records("mgsm", subset)
    )
    return _split(documents, draw(shots, metadata))


def load_cluewsc(**metadata: Any) -> dict[str, datasets.Dataset]:
    """CLUEWSC: one document per pronoun that means something, with every noun that it may mean."""
    pool = [turn for turn, _ in _pronouns(load_records("cluewsc", split="shots"))]
    documents = (_document(turn, golds=nouns) for turn, nouns in _pronouns(load_records("cluewsc")))
    return _split(documents, draw(pool, metadata)[:_MOST_SHOTS])


def _pronouns(records: Iterable[Record]) -> Iterator[tuple[Turn, list[str]]]:
    nouns: dict[tuple[str, int, str], list[str]] = defaultdict(list)
    for record in records:
        target = record["target"]
        if record["label"] == "true":
            nouns[record["text"], target["span2_index"], target["span2_text"]].append(target["span1_text"])
    for (text, _, pronoun), accepted in nouns.items():
        yield prompts.cluewsc(text, pronoun, accepted[0]), accepted


# Shots that are other questions of the same passage


def load_cmrc(**metadata: Any) -> dict[str, datasets.Dataset]:
    """CMRC 2018."""

    def documents() -> Iterator[Document]:
        for records in _by_passage(load_records("cmrc"), "context"):
            golds = [record["answers"] for record in records]
            turns = [
                prompts.cmrc(record["question"], answers[0].strip())
                for record, answers in zip(records, golds, strict=True)
            ]
            header = prompts.CMRC_HEADER.format(context=records[0]["context"])
            for shots, turn, answers in zip(_others(turns, metadata), turns, golds, strict=True):
                yield _document(turn, header, shots=shots, golds=answers)

    return _split(documents())


def load_drop(**metadata: Any) -> dict[str, datasets.Dataset]:
    """DROP."""

    def documents() -> Iterator[Document]:
        for records in _by_passage(load_records("drop"), "passage"):
            golds = [_drop_answers(record) for record in records]
            turns = [
                prompts.drop(record["question"], answers[0], _drop_kind(record["answer"]))
                for record, answers in zip(records, golds, strict=True)
            ]
            header = prompts.DROP_HEADER.format(passage=records[0]["passage"])
            for shots, turn, answers in zip(_others(turns, metadata), turns, golds, strict=True):
                yield _document(turn, header, shots=shots, golds=answers)

    return _split(documents())


def _by_passage(records: Iterable[Record], name: str) -> Iterator[list[Record]]:
    passages = defaultdict(list)
    for record in records:
        passages[record[name]].append(record)
    yield from passages.values()


def _others(turns: Sequence[Turn], metadata: Mapping[str, Any]) -> Iterator[list[dict[str, str]]]:
    """For each question of a passage, the others (the same question asked twice is no other)."""
    for turn in turns:
        others = [other for other in turns if other.text != turn.text]
        yield _as_shots(draw(others, metadata, turn.text)[:_MOST_SHOTS_OF_PASSAGE])


def _drop_answers(record: Record) -> list[list[str]]:
    """The distinct references, each with its spans; those that say nothing are left out."""
    from lm_eval.tasks.drop.utils import get_answers

    return [list(answer) for answer in get_answers(record) if answer[0].strip()] or [[""]]


def _drop_kind(answer: Record) -> str:
    if answer["number"]:
        return "number"
    if answer["spans"]:
        return "span" if len(answer["spans"]) == 1 else "spans"
    return "date"


# AGIEval, without shots


def load_agieval(part: str, **_: Any) -> dict[str, datasets.Dataset]:
    """AGIEval: ``part`` is ``all``, ``en`` or ``zh``."""
    wanted = [
        exam
        for exam in prompts.AGIEVAL_INTRODUCTIONS
        if part == "all" or (exam in prompts.AGIEVAL_CHINESE) is (part == "zh")
    ]
    # A local folder may have some of the exams.
    exams = load_subsets("agieval", subsets=[exam for exam in wanted if found("agieval", exam)] or wanted)
    return _split(in_turn([_agieval(name, record) for record in exam] for name, exam in exams.items()))


def _agieval(subset: str, record: Record) -> Document:
    # the hub has the prompt ready-made
    query = record["query"] or prompts.agieval_query(subset, record["question"], record["options"], record["passage"])
    turn = prompts.agieval(subset, query, record["answer"])
    return _document(turn, subset=subset, gold=record["answer"], kind=record["kind"])
