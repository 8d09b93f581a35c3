"""The requests that ``evaluation.py`` times: lm-eval's own, made once from its tasks and given to every model.

Where a task of this package is not there yet, its prompts are made here in the same structure, from the same files; a
row of the result says which it was.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

import lightning_dsv3.evaluation

VARIABLE = "LIGHTNING_DSV3_DATA"
Document = dict[str, Any]


class Requests(NamedTuple):
    """What is asked.

    Attributes:
        kind: The method of a model that takes them.
        instances: In the order of their documents.
        source: The task that they are of, or that the prompts are this benchmark's.
    """

    kind: str
    instances: list[Instance]
    source: str

    def pairs_by_document(self) -> dict[int, list[int]]:
        """Return which requests are the options of a document."""
        documents: dict[int, list[int]] = {}
        for number, instance in enumerate(self.instances):
            documents.setdefault(instance.doc_id, []).append(number)
        return documents


def make_requests(
    name: str, *, subjects: int, questions: int, documents: int, new_tokens: int, own_prompts: bool = False
) -> Requests:
    """Make the requests of a benchmark.

    Args:
        name: One of ``BENCHMARKS``.
        subjects: How many subjects, where there are any.
        questions: How many questions of each.
        documents: How many documents of a benchmark without subjects.
        new_tokens: Tokens that a generated answer may have at most.
        own_prompts: Make the prompts here even where there is a task.
    """
    manager = TaskManager(
        include_path=[Path(folder) / "tasks" for folder in lightning_dsv3.evaluation.__path__], include_defaults=False
    )
    task_name = f"dsv3_{name}"
    if task_name in manager.all_subtasks and not own_prompts:
        task, source = manager.load(task_name)["tasks"][task_name], f"task {task_name}"
    else:
        options, load = STAND_INS[name]
        config = {"task": task_name, "test_split": "test", "doc_to_text": "prompt", "target_delimiter": "", **options}
        task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: {"test": _dataset(load(_folder()))}})
        source = "prompts of this benchmark"
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)
    if task.OUTPUT_TYPE == "generate_until":
        task.set_config(key="generation_kwargs", value={"max_gen_toks": new_tokens}, update=True)
    with redirect_stderr(io.StringIO()):  # a progress bar
        task.build_all_requests(samples=_chosen(task.eval_docs, subjects, questions, documents))
    kind = "loglikelihood" if task.OUTPUT_TYPE == "multiple_choice" else task.OUTPUT_TYPE
    return Requests(kind, task.instances, source)


def _chosen(docs: Sequence[Document], subjects: int, questions: int, documents: int) -> list[int]:
    """Return the numbers of the first documents, or of the first ones of the first subjects."""
    key = next((key for key in ("subject", "subset") if key in docs[0]), None)
    if key is None:
        return list(range(min(documents, len(docs))))
    by_subject: dict[str, list[int]] = {}
    for number, doc in enumerate(docs):
        by_subject.setdefault(doc[key], []).append(number)
    return [number for subject in sorted(by_subject)[:subjects] for number in by_subject[subject][:questions]]


def _folder() -> Path:
    if VARIABLE not in os.environ:
        raise SystemExit(f"{VARIABLE} is not set: name the folder with the benchmarks' data")
    return Path(os.environ[VARIABLE])


def _dataset(documents: Iterator[Document]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(documents))


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _cmmlu(folder: Path) -> Iterator[Document]:
    def asked(row: dict[str, str]) -> str:
        options = "".join(f"{letter}. {row[letter]}\n" for letter in "ABCD")
        return f"{row['Question']}\n{options}答案："

    for path in sorted((folder / "cmmlu" / "test").glob("*.csv")):
        shots = "".join(f"{asked(row)}{row['Answer']}\n\n" for row in _table(folder / "cmmlu" / "dev" / path.name)[:5])
        header = f"以下是关于{path.stem}的单项选择题，请直接给出正确答案的选项。\n\n"
        for row in _table(path):
            yield {"prompt": header + shots + asked(row), "choices": list("ABCD"), "gold": "ABCD".index(row["Answer"]),
                   "subject": path.stem}  # fmt: skip


def _mmlu(folder: Path) -> Iterator[Document]:
    def asked(row: dict[str, str]) -> str:
        options = "".join(f"{letter}. {row[f'choice{n}']}\n" for n, letter in enumerate("ABCD"))
        return f"{row['question']}\n{options}Answer:"

    for path in sorted((folder / "mmlu" / "test").glob("*.csv")):
        subject = path.stem.removesuffix("_test")
        rows = _table(folder / "mmlu" / "dev" / f"{subject}_dev.csv")[:5]
        shots = "".join(f"{asked(row)} {'ABCD'[int(row['answer'])]}\n\n" for row in rows)
        header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for row in _table(path):
            yield {"prompt": header + shots + asked(row), "choices": [f" {letter}" for letter in "ABCD"],
                   "gold": int(row["answer"]), "subject": subject}  # fmt: skip


def _c3(folder: Path) -> Iterator[Document]:
    for part in ("m", "d"):
        for paragraphs, questions, _ in json.loads((folder / "c3" / f"c3-{part}-dev.json").read_text("utf-8")):
            passage = "\n".join(paragraphs)
            for question in questions:
                prompt = f"{passage}\n问题：{question['question']}\n答案："
                gold = question["choice"].index(question["answer"])
                yield {"prompt": prompt, "choices": question["choice"], "gold": gold}


def _squad(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for article in json.loads((folder / "cmrc2018" / "cmrc2018_trial.squad.json").read_text("utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            yield paragraph["context"], paragraph["qas"]


def _cmrc(folder: Path) -> Iterator[Document]:
    for context, questions in _squad(folder):
        turns = [f"问题：{question['question']}\n答案：" for question in questions]
        for number, turn in enumerate(turns):
            other = (number + 1) % len(turns)
            shot = "" if other == number else turns[other] + questions[other]["answers"][0]["text"] + "\n"
            yield {"prompt": f"文章：{context}\n根据上文，回答如下问题。\n{shot}{turn}"}


def _gsm8k(folder: Path) -> Iterator[Document]:
    def lines(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (folder / "gsm8k" / name).read_text("utf-8").splitlines()]

    shots = "".join(f"Q: {r['question']}\nA: {r['answer']}\n\n" for r in lines("train.v2_report_8shots.jsonl"))
    for record in lines("test.first660.jsonl"):
        yield {"prompt": f"{shots}Q: {record['question']}\nA:"}


def _bpb(folder: Path) -> Iterator[Document]:
    """Passages of CMRC and solutions of GSM8K, one of each in turn; three passages are a longer document."""
    passages = [context for context, _ in _squad(folder)]
    solutions = [document["prompt"] for document in _gsm8k(folder)]
    for number in range(min(len(passages) // 3, len(solutions))):
        yield {"prompt": "", "text": "\n".join(passages[3 * number : 3 * number + 3])}
        yield {"prompt": "", "text": solutions[number][-2500:]}


def _metric(name: str, aggregation: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": aggregation, "higher_is_better": aggregation == "mean"}]


_CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
    "metric_list": _metric("acc", "mean"),
}  # fmt: skip
_GENERATION: dict[str, Any] = {
    "output_type": "generate_until", "doc_to_target": "", "metric_list": _metric("exact_match", "mean"),
}  # fmt: skip
_ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling", "doc_to_target": "text",
    "metric_list": _metric("bits_per_byte", "bits_per_byte"),
}  # fmt: skip
# Of each benchmark, until its task is there: what lm-eval is told, and the documents.
STAND_INS: dict[str, tuple[dict[str, Any], Callable[[Path], Iterator[Document]]]] = {
    "cmmlu": (_CHOICE, _cmmlu),
    "mmlu": (_CHOICE, _mmlu),
    "c3": (_CHOICE, _c3),
    "cmrc": (_GENERATION | {"generation_kwargs": {"until": ["\n"], "do_sample": False}}, _cmrc),
    "gsm8k": (_GENERATION | {"generation_kwargs": {"until": ["\nQ:", "\n\n"], "do_sample": False}}, _gsm8k),
    "bpb": (_ROLLING, _bpb),
}
BENCHMARKS = tuple(STAND_INS)
