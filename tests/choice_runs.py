"""Models that say what a function says, and a hub of look-alike records, for the tests of tasks that lm-eval runs."""

import csv
import json
from collections import defaultdict

import choice_records as records
import datasets
import lm_eval.evaluator
import pytest
from conftest import ROOT
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lightning_dsv3.evaluation.likelihood import Likelihood

FOLDER = ROOT / "src" / "lightning_dsv3" / "evaluation" / "tasks"


class Fixed(LM):
    """Says of each request what a function of it and of its record says."""

    def __init__(self, likelihood):
        super().__init__()
        self.likelihood, self.requests = likelihood, defaultdict(list)

    def loglikelihood(self, requests):
        for request in requests:
            self.requests[request.task_name].append(request)
        return [self.likelihood(request) for request in requests]

    def loglikelihood_rolling(self, requests):
        for request in requests:
            self.requests[request.task_name].append(request)
        return [self.likelihood(request) for request in requests]

    generate_until = None


def knowing(request):
    """Prefers the right option, whatever it is divided by."""
    right = request.idx % len(request.doc["choices"]) == request.doc["answer"]
    after_neutral = request.idx >= len(request.doc["choices"])
    pair = -1.0 if right and not after_neutral else -5000.0
    return Likelihood(pair, right, num_tokens=1, context_logprob=-3.0, context_tokens=4)


def mistaken(request):
    """Prefers the options that are not the right one."""
    value = knowing(request)[0]
    if request.idx >= len(request.doc["choices"]):
        return Likelihood(value, False, num_tokens=1, context_logprob=-3.0, context_tokens=4)
    return Likelihood(-5001.0 - value, False, num_tokens=1, context_logprob=-3.0, context_tokens=4)


def shortest(request):
    """Prefers short continuations; of equally long ones all alike."""
    return -float(len(request.args[1])), False


def run(manager, model, tasks, **options):
    options = {"log_samples": False, "bootstrap_iters": 0, **options}
    with pytest.MonkeyPatch.context() as patch:  # a description of this machine, which takes two seconds to collect
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
        return simple_evaluate(model, tasks=tasks, task_manager=manager, **options)


def evaluate(manager, tasks, likelihood, **options):
    model = Fixed(likelihood)
    return run(manager, model, tasks, **options), model.requests


def scores_of(result):
    return {key.partition(",")[0]: value for key, value in result.items() if "," in key and "_stderr" not in key}


def manager_of(**metadata):
    return TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata or None)


def replace_hub(patch):
    splits = records.hub()
    patch.delenv("LIGHTNING_DSV3_DATA", raising=False)

    def load(path, name=None, *, split="test", data_files=None, **_):
        return splits[data_files[split][0] if data_files else path, name, split]

    patch.setattr(datasets, "load_dataset", load)
    return splits


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(list(rows)).to_json(path, force_ascii=False)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_csv(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=options.pop("encoding", "utf-8"), newline="") as file:
        csv.writer(file, **options).writerows(rows)
