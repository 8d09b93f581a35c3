"""The requests that ``evaluation.py`` times: lm-eval's own, made once from this package's tasks for every model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

import lightning_dsv3.evaluation

BENCHMARKS = ("cmmlu", "mmlu", "c3", "cmrc", "gsm8k", "bpb")
# Passages, or questions and their solutions, that make a document of BPB.
_PARTS = 4


class Requests(NamedTuple):
    """What is asked.

    Attributes:
        kind: The method of a model that takes them.
        instances: In the order of their documents.
        source: What they are of.
    """

    kind: str
    instances: list[Instance]
    source: str

    def by_document(self) -> list[list[int]]:
        """Return the numbers of each document's requests."""
        documents: dict[int, list[int]] = {}
        for number, instance in enumerate(self.instances):
            documents.setdefault(instance.doc_id, []).append(number)
        return list(documents.values())


def make_requests(name: str, *, subjects: int, questions: int, documents: int, new_tokens: int) -> Requests:
    """Make the requests of a benchmark.

    Args:
        name: One of ``BENCHMARKS``; ``bpb`` scores the texts of others as documents, all their tokens.
        subjects: How many subjects, where there are any.
        questions: How many questions of each.
        documents: How many documents of a benchmark without subjects.
        new_tokens: Tokens that a generated answer may have at most.
    """
    if name == "bpb":
        texts = _texts(documents)
        instances = [Instance("loglikelihood_rolling", {}, (text,), 0, (name, i, 1)) for i, text in enumerate(texts)]
        return Requests("loglikelihood_rolling", instances, "texts of dsv3_cmrc and dsv3_gsm8k")
    task = _task(name)
    task.set_fewshot_seed(seed=1234)
    if task.OUTPUT_TYPE == "generate_until":
        task.set_config(key="generation_kwargs", value={"max_gen_toks": new_tokens}, update=True)
    with redirect_stderr(io.StringIO()):  # a progress bar
        task.build_all_requests(samples=_chosen(task.eval_docs, subjects, questions, documents))
    kind = "loglikelihood" if task.OUTPUT_TYPE == "multiple_choice" else task.OUTPUT_TYPE
    return Requests(kind, task.instances, f"dsv3_{name}")


def _task(name: str) -> Task:
    folders = [Path(folder) / "tasks" for folder in lightning_dsv3.evaluation.__path__]
    task: Task = TaskManager(include_path=folders, include_defaults=False).load(f"dsv3_{name}")["tasks"][f"dsv3_{name}"]
    return task


def _chosen(docs: Sequence[dict[str, Any]], subjects: int, questions: int, documents: int) -> list[int]:
    """Return the numbers of the first documents, or of the first ones of the first subjects."""
    if "subject" not in docs[0]:
        return list(range(min(documents, len(docs))))
    by_subject: dict[str, list[int]] = {}
    for number, doc in enumerate(docs):
        by_subject.setdefault(doc["subject"], []).append(number)
    return [number for subject in sorted(by_subject)[:subjects] for number in by_subject[subject][:questions]]


def _texts(count: int) -> list[str]:
    """Return Chinese and English documents in turn."""
    chinese = list(dict.fromkeys(doc["header"] for doc in _task("cmrc").eval_docs))
    english = [doc["text"] + doc["target"] for doc in _task("gsm8k").eval_docs]
    texts = []
    for start in range(0, min(len(chinese), len(english)), _PARTS):
        texts += ["\n\n".join(parts[start : start + _PARTS]) for parts in (chinese, english)]
    return texts[:count]
