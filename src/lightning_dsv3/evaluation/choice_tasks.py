"""What the YAML files of the perplexity and bits-per-byte benchmarks refer to: loading, shots and scores.

A loader (``custom_dataset``) returns the tested records as documents: the prompt's parts (``header``, ``text``,
``choices``, ``answer``), ``subject`` where there is one, and ``group``, which says whose shots are whose (see
`lightning_dsv3.evaluation.task.RecordShots`). Shots are a split of their own and the same in every run;
``--metadata '{"fewshot_seed": 7}'`` draws others.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import datasets

from lightning_dsv3.evaluation import choice_prompts as prompts
from lightning_dsv3.evaluation.choice_prompts import Question, Record
from lightning_dsv3.evaluation.data import BENCHMARKS, MissingDataError, load_records, load_subsets
from lightning_dsv3.evaluation.scoring import score_choices

Document = dict[str, Any]
Splits = dict[str, datasets.Dataset]
Prompt = Callable[[Record], Question]
T = TypeVar("T")

# Shots that a user can ask for with --num_fewshot where the pool is a training split.
_MOST_SHOTS = 64

_log = logging.getLogger(__name__)


# Documents


def _document(question: Question, number: int, group: str, subject: str | None = None) -> Document:
    document = {
        "id": number,
        "group": group,
        "before": False,
        "header": question.header,
        "text": question.text,
        "choices": question.choices,
        "answer": question.answer,
    }
    return document if subject is None else {**document, "subject": subject}


def _splits(tested: Iterable[Document], shots: Iterable[Document] | None = None) -> Splits:
    splits = {"test": datasets.Dataset.from_list(list(tested))}
    if shots is not None:
        splits["shots"] = datasets.Dataset.from_list(list(shots))
    return splits


def in_turn(groups: Iterable[Iterable[T]]) -> Iterator[T]:
    """One record of each group, then the next of each: any ``--limit`` sees all groups."""
    for row in zip_longest(*groups):
        yield from (record for record in row if record is not None)


def draw(pool: Sequence[T], metadata: Mapping[str, Any], key: str = "") -> list[T]:
    """The pool in its own order, or in another one if the run names a seed.

    Args:
        pool: Worked examples.
        metadata: Of the run; ``fewshot_seed`` is its seed.
        key: What is drawn for: what has another key is drawn independently.

    Raises:
        ValueError: If the seed is no whole number.

    >>> draw("abc", {}), draw("abc", {"fewshot_seed": 7})
    (['a', 'b', 'c'], ['a', 'c', 'b'])
    """
    seed = metadata.get("fewshot_seed")
    if seed is None:
        return list(pool)
    if not isinstance(seed, int):
        raise ValueError(f"fewshot_seed must be a whole number, not {seed!r}")
    return random.Random(f"{seed} {key}").sample(list(pool), len(pool))


def _from_one_pool(benchmark: str, prompt: Prompt, metadata: Mapping[str, Any]) -> Splits:
    """Shots are the same for all records: the first of the training split."""
    tested = [_document(prompt(record), number, "") for number, record in enumerate(load_records(benchmark))]
    try:
        pool = [_document(prompt(record), -1, "") for record in load_records(benchmark, split="shots")]
    except MissingDataError as error:
        if BENCHMARKS[benchmark].needs_pool:
            raise
        _log.warning("%s. Shots are other records of the tested split: the score is marked.", error)
        pool = list(tested)
    # One more: a tested record is not its own shot.
    return _splits(tested, draw(pool, metadata, benchmark)[: _MOST_SHOTS + 1])


def _by_subject(
    tested: Mapping[str, Sequence[Record]],
    shots: Mapping[str, Sequence[Record]] | None,
    prompt: Prompt,
    metadata: Mapping[str, Any],
) -> Splits:
    """Each subject has its own shots; without a pool, other records of the subject."""
    records = list(in_turn([[{**record, "subject": name} for record in records] for name, records in tested.items()]))
    documents = [
        _document(prompt(record), number, record["subject"], record["subject"]) for number, record in enumerate(records)
    ]
    pools: dict[str, list[Document]] = defaultdict(list)
    if shots is None:
        for document in documents:
            pools[document["group"]].append(document)
    else:
        pools = {
            name: [_document(prompt({**shot, "subject": name}), -1, name, name) for shot in shots[name]]
            for name in tested
        }
    drawn = [shot for name, pool in pools.items() for shot in draw(pool, metadata, name)[: _MOST_SHOTS + 1]]
    return _splits(documents, drawn)


def _by_column(records: Iterable[Record]) -> dict[str, list[Record]]:
    subjects = defaultdict(list)
    for record in records:
        subjects[record["subject"]].append(record)
    return dict(subjects)


# Subjects


def _load_subjects(benchmark: str, prompt: Prompt, metadata: Mapping[str, Any]) -> Splits:
    tested = load_subsets(benchmark)
    return _by_subject(tested, load_subsets(benchmark, "shots", list(tested)), prompt, metadata)


def load_mmlu(**metadata: Any) -> Splits:
    """MMLU."""
    return _load_subjects("mmlu", prompts.mmlu, metadata)


def load_mmlu_cloze(**metadata: Any) -> Splits:
    """MMLU, options as text."""
    return _load_subjects("mmlu", prompts.mmlu_cloze, metadata)


def load_mmlu_redux(rows: str, **metadata: Any) -> Splits:
    """MMLU-Redux: ``rows`` is ``ok``, ``all`` (with MMLU's answers) or ``corrected`` (where there is a right one)."""
    if rows not in ("ok", "all", "corrected"):
        raise ValueError(f"rows must be ok, all or corrected, not {rows!r}")
    tested = {}
    for subject, records in load_subsets("mmlu_redux").items():
        if rows == "ok":
            records = [record for record in records if record["error_type"] == "ok"]
        elif rows == "corrected":
            known = [record for record in records if record["corrected"] is not None]
            records = [{**record, "answer": record["corrected"]} for record in known]
        tested[subject] = records
    return _by_subject(tested, load_subsets("mmlu_redux", "shots", list(tested)), prompts.mmlu, metadata)


def load_mmlu_pro(**metadata: Any) -> Splits:
    """MMLU-Pro."""
    tested, shots = (_by_column(load_records("mmlu_pro", split=split)) for split in ("test", "shots"))
    if absent := sorted(set(tested) - set(shots)):
        raise ValueError(f"mmlu_pro: the validation split has no shots for {', '.join(absent)}")
    return _by_subject(tested, shots, prompts.mmlu, metadata)


def load_mmmlu(subset: str, **metadata: Any) -> Splits:
    """One language of MMMLU, which has no split for shots."""
    return _by_subject(_by_column(load_records("mmmlu", subset)), None, prompts.mmlu, metadata)


def load_ceval(**metadata: Any) -> Splits:
    """C-Eval."""
    return _load_subjects("ceval", prompts.ceval, metadata)


def load_ceval_cloze(**metadata: Any) -> Splits:
    """C-Eval, options as text."""
    return _load_subjects("ceval", prompts.ceval_cloze, metadata)


def load_cmmlu(**metadata: Any) -> Splits:
    """CMMLU."""
    return _load_subjects("cmmlu", prompts.cmmlu, metadata)


def load_cmmlu_cloze(**metadata: Any) -> Splits:
    """CMMLU, options as text."""
    return _load_subjects("cmmlu", prompts.cmmlu_cloze, metadata)


# One pool of shots, or none


def load_arc(benchmark: str, **metadata: Any) -> Splits:
    """ARC: ``benchmark`` is ``arc_easy`` or ``arc_challenge``."""
    return _from_one_pool(benchmark, prompts.arc, metadata)


def load_arc_cloze(benchmark: str, **metadata: Any) -> Splits:
    """ARC, options as text."""
    return _from_one_pool(benchmark, prompts.arc_cloze, metadata)


def load_hellaswag(**metadata: Any) -> Splits:
    """HellaSwag."""
    return _from_one_pool("hellaswag", prompts.hellaswag, metadata)


def load_winogrande(**metadata: Any) -> Splits:
    """WinoGrande: the ``choices`` are the sentence up to the gap with either name in it, ``text`` is what follows."""
    from lm_eval.tasks.winogrande import preprocess_winogrande as lm_eval_form

    def halves(record: Record) -> Question:
        first, second = record["choices"]
        doc = {"sentence": record["question"], "option1": first, "option2": second}
        return Question(lm_eval_form.doc_to_target(doc), lm_eval_form.doc_to_choice(doc), record["answer"])

    return _from_one_pool("winogrande", halves, metadata)


def _without_shots(benchmark: str, prompt: Prompt) -> Splits:
    return _splits(_document(prompt(record), number, "") for number, record in enumerate(load_records(benchmark)))


def load_piqa(**_: Any) -> Splits:
    """PIQA."""
    return _without_shots("piqa", prompts.piqa)


def load_c3(**_: Any) -> Splits:
    """C3."""
    return _without_shots("c3", prompts.c3)


def load_ccpm(**_: Any) -> Splits:
    """CCPM."""
    return _without_shots("ccpm", prompts.ccpm)


def load_race(benchmark: str, **metadata: Any) -> Splits:
    """RACE: shots are the questions before it of the same article, as many as there are."""
    articles = defaultdict(list)
    for number, record in enumerate(load_records(benchmark)):
        document = _document(prompts.race(record), number, record["article"])
        articles[record["article"]].append({**document, "before": True})
    documents = sorted((one for questions in articles.values() for one in questions), key=lambda one: int(one["id"]))
    shots = [shot for article, pool in articles.items() for shot in draw(pool, metadata, article)]
    return _splits(documents, shots)


def load_pile(**_: Any) -> Splits:
    """The Pile's test set; empty documents have nothing to score."""
    return _splits(record for record in load_records("pile_test") if record["text"])


# Scores


def score_letters(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """Score a question by the likelihoods of its letters."""
    scores = score_texts(document, results)
    del scores["bpb"]  # of a letter
    return scores


def score_texts(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """Score a question by the likelihoods of its options, with ``bpb``, the bits per byte of the right one."""
    return _scores(document, document["choices"], results)


def score_halves(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """WinoGrande: the same text behind each of two contexts."""
    return _scores(document, [document["text"]] * len(document["choices"]), results)


def _scores(document: Mapping[str, Any], options: Sequence[str], results: Sequence[Any]) -> dict[str, Any]:
    given, neutral = results[: len(options)], results[len(options) :]
    # Our model says how many tokens an option has; for another one, bytes stand for them.
    counted = all(hasattr(pair, "num_tokens") for pair in given)
    whole = counted and all(pair.context_logprob is not None for pair in given)
    scores: dict[str, Any] = score_choices(
        options,
        document["answer"],
        [pair[0] for pair in given],
        num_tokens=[pair.num_tokens for pair in given] if counted else [len(text.encode()) for text in options],
        unconditional=[pair[0] for pair in neutral] if neutral else None,
        full_log_likelihoods=[pair.context_logprob + pair[0] for pair in given] if whole else None,
        full_num_tokens=[pair.context_tokens + pair.num_tokens for pair in given] if whole else None,
    )
    if "subject" in document:
        scores["acc_ppl_macro"] = (document["subject"], scores["acc_ppl"])
    return scores


def macro_mean(items: Iterable[tuple[str, float]]) -> float:
    """Mean over subjects of the means within each.

    >>> macro_mean([("a", 1.0), ("a", 0.0), ("b", 1.0)])
    0.75
    """
    subjects = defaultdict(list)
    for subject, value in items:
        subjects[subject].append(value)
    return sum(sum(values) / len(values) for values in subjects.values()) / len(subjects)


def score_pile(document: Mapping[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood and bytes of a text, for the whole and for the set that it is from."""
    pair = results[0], len(document["text"].encode())
    return {"bits_per_byte": pair, f"bits_per_byte_{pile_set(document['subject'])}": pair}


def pile_set(name: str) -> str:
    """Name a set of the Pile within a metric.

    >>> pile_set("Gutenberg (PG-19)")
    'gutenberg_pg_19'
    """
    return "_".join("".join(char if char.isalnum() else " " for char in name.lower()).split())
