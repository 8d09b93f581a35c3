"""Scoring of the generation tasks as lm-eval asks for it: ``process_results``, aggregations, and filters that run code.

The rules are in `lightning_dsv3.evaluation.scoring`; here they meet the columns of a loaded record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_dsv3.evaluation import code_tasks, scoring
from lightning_dsv3.evaluation.execution import Executor
from lightning_dsv3.evaluation.livecodebench import score_livecodebench

Document = Mapping[str, Any]
Scores = dict[str, Any]


def score_bbh(document: Document, results: Sequence[str]) -> Scores:
    """BIG-Bench Hard, with the score of each task."""
    return _with_subset(document, scoring.score_bbh(results[0], document["gold"]), "exact_match")


def score_drop(document: Document, results: Sequence[str]) -> Scores:
    """DROP: the best reference."""
    return dict(scoring.score_drop(results[0], document["golds"]))


def score_answer(document: Document, results: Sequence[str]) -> Scores:
    """TriviaQA and NaturalQuestions: any alias."""
    return dict(scoring.score_answer(results[0], document["golds"]))


def score_agieval(document: Document, results: Sequence[str]) -> Scores:
    """AGIEval: a letter, exactly a set of letters, or a written answer, as the record is."""
    gold = document["gold"]
    if document["kind"] == "cloze":
        scores = scoring.score_agieval_cloze(results[0], gold)
    else:
        scores = scoring.score_agieval_choice(results[0], gold if document["kind"] == "letter" else list(gold))
    return _with_subset(document, scores, "acc")


def score_gsm8k(document: Document, results: Sequence[str]) -> Scores:
    """GSM8K."""
    return dict(scoring.score_gsm8k(results[0], document["gold"]))


def score_mgsm(document: Document, results: Sequence[str]) -> Scores:
    """MGSM, by the number format of the record's language."""
    return dict(scoring.score_gsm8k(results[0], document["gold"], document["language"]))


def score_math(document: Document, results: Sequence[str]) -> Scores:
    """MATH, with the score of each subject."""
    return _with_subset(document, scoring.score_math(results[0], document["gold"]), "exact_match")


def score_cmath(document: Document, results: Sequence[str]) -> Scores:
    """CMath."""
    return dict(scoring.score_cmath(results[0], document["gold"]))


def score_cluewsc(document: Document, results: Sequence[str]) -> Scores:
    """CLUEWSC: any noun that is true of the pronoun."""
    return dict(scoring.score_cluewsc(results[0], document["golds"]))


def score_cmrc(document: Document, results: Sequence[str]) -> Scores:
    """CMRC 2018: the best reference."""
    return dict(scoring.score_cmrc(results[0], document["golds"]))


def _with_subset(document: Document, scores: Mapping[str, float], metric: str) -> Scores:
    subset, value = document["subset"], scores[metric]
    return {**scores, f"{metric}_macro": (subset, value), f"{metric}_{subset}": value}


# Programs. A filter has all generations of a run at once and so runs several at a time; lm-eval comes to it only after
# --confirm_run_unsafe_code, since the tasks are marked `unsafe_code: true`.

Verdicts = list[list[dict[str, Any]]]


def run_humaneval(responses: Sequence[Sequence[str]], documents: Sequence[Document]) -> Verdicts:
    """Run HumanEval's tests on each generation."""
    return _run(code_tasks.score_humaneval, responses, documents)


def run_mbpp(responses: Sequence[Sequence[str]], documents: Sequence[Document]) -> Verdicts:
    """Run MBPP's tests on each generation."""
    return _run(code_tasks.score_mbpp, responses, documents)


def run_livecodebench(responses: Sequence[Sequence[str]], documents: Sequence[Document]) -> Verdicts:
    """Run LiveCodeBench's tests on each generation."""
    return _run(score_livecodebench, responses, documents)


def run_cruxeval_i(responses: Sequence[Sequence[str]], documents: Sequence[Document]) -> Verdicts:
    """Run CRUXEval's functions on each input."""
    return _run(code_tasks.score_cruxeval_input, responses, documents)


def run_cruxeval_o(responses: Sequence[Sequence[str]], documents: Sequence[Document]) -> Verdicts:
    """Compare each output; only what is no literal is run."""
    return _run(code_tasks.score_cruxeval_output, responses, documents)


def _run(scorer: code_tasks.Scorer, responses: Sequence[Sequence[str]], documents: Sequence[Document]) -> Verdicts:
    verdicts = code_tasks.score_samples(Executor(confirmed=True), scorer, list(documents), list(responses))
    return [[{"passed": verdict.passed, "reason": verdict.reason} for verdict in row] for row in verdicts]


def count_passes(document: Document, results: Sequence[Sequence[Mapping[str, Any]]]) -> Scores:
    """pass@k without bias, for each k of 1, 5, 10 and 100 that the number of generations (``repeats``) allows.

    >>> count_passes({}, [[{"passed": True}, {"passed": False}]])
    {'pass@1': 0.5}
    """
    samples = results[0]
    correct = sum(verdict["passed"] for verdict in samples)
    allowed = [k for k in (1, 5, 10, 100) if k <= len(samples)]
    return {f"pass@{k}": code_tasks.pass_at_k(len(samples), correct, k) for k in allowed}
