"""What ``reference_points.py`` is made of: runs of lm-eval on this package's tasks, and texts scored by hand."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cross_entropy

import lightning_dsv3.evaluation
from lightning_dsv3.checkpoint import load_for_inference, save_hf_checkpoint
from lightning_dsv3.data import save_tokenizer
from lightning_dsv3.evaluation.data import BENCHMARKS, VARIABLE

# The task that scores whole texts, and any set of the Pile, as its records name one.
TEXTS_TASK = "dsv3_pile_test"
_SET = "Pile-CC"


class Asked(NamedTuple):
    """A task, and how much of it.

    Attributes:
        task: Its name.
        limit: How many records, its first ones; None for all that are at hand.
        shots: Worked examples; None for the task's own number.
        beats_chance: Whether the model has to.
    """

    task: str
    limit: int | None = None
    shots: int | None = None
    beats_chance: bool = False


class Limits(NamedTuple):
    """What a trial run is cut to; None cuts nothing."""

    records: int | None = None
    new_tokens: int | None = None

    def of(self, records: int | None) -> int | None:
        """Return the smaller number of records; None for all."""
        known = [number for number in (records, self.records) if number is not None]
        return min(known, default=None)


class Outcome(NamedTuple):
    """A row of a table, and lm-eval's samples behind it."""

    row: dict[str, Any]
    samples: list[dict[str, Any]]


class Dummy(LM):
    """Says of an option what a function says of its text, whatever the prompt is."""

    def __init__(self, say: Callable[[str], float]) -> None:
        super().__init__()
        self._say = say

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return what the function says."""
        return [(self._say(request.args[1]), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not for texts."""
        raise NotImplementedError

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Writes nothing."""
        raise NotImplementedError


def characters_of(text: str) -> Callable[[str], float]:
    """Return a model of single characters: log-likelihoods by how often each is in a text, with one half added."""
    counts = Counter(text)
    size = len(text)
    return lambda option: sum(math.log((counts[character] + 0.5) / size) for character in option)


def run_task(lm: Any, asked: Asked, limits: Limits) -> Outcome:
    """Have lm-eval run a task of this package."""
    folders = [Path(folder) / "tasks" for folder in lightning_dsv3.evaluation.__path__]
    manager = TaskManager(include_path=folders, include_defaults=False)
    task = manager.load(asked.task)["tasks"][asked.task]
    if task.OUTPUT_TYPE == "generate_until" and limits.new_tokens is not None:
        task.set_config(key="generation_kwargs", value={"max_gen_toks": limits.new_tokens}, update=True)
    results = simple_evaluate(
        model=lm, tasks=[task], num_fewshot=asked.shots, limit=limits.of(asked.limit), task_manager=manager
    )
    samples = results["samples"][asked.task]
    benchmark = BENCHMARKS[task.config.metadata["benchmark"]]
    values = results["results"][asked.task]
    row = {
        "task": asked.task,
        # Our tasks add to their names in what a score is not the protocol's.
        "notes": values["alias"].removeprefix(asked.task).strip(" ()"),
        "shots": results["n-shot"][asked.task],
        "records": len(samples),
        "of": len(task.eval_docs),
        "metric": benchmark.metric,
        "metrics": _metrics(values),
        "chance": _chance(samples),
        "beyond_window": _beyond_window(lm, samples),
    }
    return Outcome(row, samples)


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    found = {}
    for key, value in values.items():
        name, comma, kept = key.partition(",")
        if comma and not name.endswith("_stderr") and _is_number(value):
            stderr = values.get(f"{name}_stderr,{kept}")
            found[name] = {"value": value, "stderr": stderr if _is_number(stderr) else None}
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _chance(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """Return what guessing gives: the mean of one over the number of options."""
    options = [len(sample["doc"]["choices"]) for sample in samples if sample["doc"].get("choices")]
    return None if len(options) < len(samples) else sum(1 / number for number in options) / len(options)


def _beyond_window(lm: Any, samples: Sequence[Mapping[str, Any]]) -> int | None:
    """Count the records whose longest request does not fit what the model reads: its prompt loses its beginning."""
    if not hasattr(lm, "tok_encode"):
        return None
    count = 0
    for sample in samples:
        longest = max(sample["arguments"], key=lambda arguments: len("".join(map(str, arguments))))
        if len(longest) == 1:  # a text, which is scored in windows
            return None
        prompt, rest = longest
        if isinstance(rest, str):
            # The last token is none that the model reads.
            count += len(lm.tok_encode(prompt + rest)) > lm.max_length + 1
        else:
            count += len(lm.tok_encode(prompt)) > lm.max_length - rest["max_gen_toks"]
    return count


# Texts


def score_texts(lm: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Score whole texts by the task of the Pile, as one benchmark of these texts.

    Returns:
        ``bits_per_byte`` of all of them and of ``each``, the ``stderr`` over documents, ``documents`` and ``bytes``.
    """
    with _in_place_of_the_pile(texts):
        row, samples = run_task(lm, Asked(TEXTS_TASK), Limits())
    pairs = [sample["bits_per_byte"] for sample in samples]
    return {
        "bits_per_byte": row["metrics"]["bits_per_byte"]["value"],
        "stderr": _stderr_of_ratio([(-nats / math.log(2), size) for nats, size in pairs]),
        "documents": len(pairs),
        "bytes": sum(size for _, size in pairs),
        "each": [-nats / math.log(2) / size for nats, size in pairs],
    }


def _stderr_of_ratio(pairs: Sequence[tuple[float, int]]) -> float | None:
    """Return the standard error of ``sum of bits / sum of bytes`` over documents, to first order."""
    if len(pairs) < 2:
        return None
    size = sum(number for _, number in pairs)
    ratio = sum(bits for bits, _ in pairs) / size
    squares = sum((bits - ratio * number) ** 2 for bits, number in pairs)
    return math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / size


@contextmanager
def _in_place_of_the_pile(texts: Sequence[str]) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "pile" / "test.jsonl"
        file.parent.mkdir()
        records = [json.dumps({"text": text, "meta": {"pile_set_name": _SET}}) for text in texts]
        file.write_text("\n".join(records) + "\n", encoding="utf-8")
        os.environ[VARIABLE] = name
        try:
            yield
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


def plain_losses(model: torch.nn.Module, prefix: int, ids: Sequence[int], window: int) -> Tensor:
    """Return the cross entropy of each token, from plain forward passes over lm-eval's windows.

    A window's tokens are predicted from those before them in it and from one token before it. The last window reaches
    back as far as there is room.

    Args:
        model: A model of transformers.
        prefix: What the first token is predicted from.
        ids: The text's tokens.
        window: Tokens that the model reads at once.
    """
    before = [prefix, *ids[:-1]]
    losses = []
    for start in range(0, len(ids), window):
        end = min(start + window, len(ids))
        begin = max(0, end - window)
        logits = model(torch.tensor([before[begin:end]])).logits[0].float()
        losses.append(cross_entropy(logits[start - begin :], torch.tensor(ids[start:end]), reduction="none"))
    return torch.cat(losses)


# Equal weights


def export(checkpoint: str | os.PathLike[str], folder: Path) -> None:
    """Write a checkpoint as ``hf`` reads it; its tokenizer puts before a text what training put there."""
    loaded = load_for_inference(checkpoint)
    save_hf_checkpoint(loaded.model, folder)
    tokenizer = loaded.tokenizer
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for kind, index in (("eos_token", next(iter(loaded.eos_token_ids), None)), ("pad_token", loaded.pad_token_id)):
        if index is not None:
            config[kind] = tokenizer.id_to_token(index)
    if loaded.prefix:
        (index,) = loaded.prefix
        config["bos_token"] = prefix = tokenizer.id_to_token(index)
        tokenizer.post_processor = TemplateProcessing(single=[prefix, "$A"], special_tokens=[(prefix, index)])
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def compare(ours: Outcome, theirs: Outcome) -> dict[str, Any]:
    """Hold two models' answers to the same requests against each other.

    Returns:
        The largest ``difference`` of two log-likelihoods in nats, or the share of ``equal_texts``.
    """
    pairs = [
        (mine, other)
        for a, b in zip(ours.samples, theirs.samples, strict=True)
        for mine, other in zip(_answers(a), _answers(b), strict=True)
    ]
    if isinstance(pairs[0][0], str):
        return {"requests": len(pairs), "equal_texts": sum(mine == other for mine, other in pairs) / len(pairs)}
    differences = [abs(mine - other) for mine, other in pairs]
    # `max` may pass over nan.
    worst = max(differences) if all(map(math.isfinite, differences)) else math.nan
    return {"requests": len(pairs), "difference": worst}


def _answers(sample: Mapping[str, Any]) -> list[Any]:
    answers = [answer for answers in sample["resps"] for answer in answers]
    return [answer[0] if isinstance(answer, (tuple, list)) else answer for answer in answers]
