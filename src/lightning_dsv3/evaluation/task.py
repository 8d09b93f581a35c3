"""What our choice and bits-per-byte tasks are to lm-eval: its configurable task, and what a YAML file cannot say.

Three things: a sampler of shots that sees the tested record, requests for an unconditional normalisation, and a name
that says so where a score is of a part of the benchmark or its shots are not those of the protocol.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask

from lightning_dsv3.evaluation.data import BENCHMARKS, coverage, stand_in, used_files


class RecordShots(ContextSampler):
    """The first shots of the tested record's ``group`` (subject, article), never the record itself.

    A pool's documents have ``group`` and ``id``; the ``id`` of one that is also tested is that of the tested one. For a
    tested record with ``before`` only those shots count that stand before it: there may be fewer than asked for.
    """

    document: Mapping[str, Any]

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[Any]:
        """Take the first ``n`` shots for the tested record.

        Raises:
            ValueError: If there are fewer.
        """
        group, number = self.document["group"], self.document["id"]
        pool = [shot for shot in self._groups().get(group, ()) if shot["id"] != number]
        if self.document["before"]:
            return [shot for shot in pool if shot["id"] < number][:n]
        if n > len(pool):
            raise ValueError(
                f"num_fewshot={n}: there are {len(pool)} worked examples {group!r}; ask for at most as many"
            )
        return pool[:n]

    def _groups(self) -> dict[str, list[dict[str, Any]]]:
        if not hasattr(self, "_by_group"):
            self._by_group: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for shot in self.fewshot_docs():
                self._by_group[shot["group"]].append(shot)
        return self._by_group


class BenchmarkTask(ConfigurableTask):
    """A task of ours; its metadata name the ``benchmark`` and, if it is of one, the ``subset``.

    ``neutral_context`` in the metadata asks for the options' likelihoods after that context too: the results that
    ``process_results`` sees are then those after the prompt and, behind them, those after the neutral context.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Make the task and load its records."""
        super().__init__(config={name: value for name, value in config.items() if name != "class"})
        metadata = self.config.metadata
        benchmark, subset = metadata["benchmark"], metadata.get("subset")
        metadata["data"] = used_files(benchmark, subset)
        if notes := self._notes(benchmark, subset):
            self.config.task_alias = f"{self.config.task_alias or self.config.task} ({'; '.join(notes)})"

    def _notes(self, benchmark: str, subset: str | None) -> list[str]:
        entry, notes = BENCHMARKS[benchmark], []
        if subset is None and entry.subsets:
            num_present = len(coverage(benchmark).present)
            if num_present < len(entry.subsets):
                notes.append(f"partial: {num_present} of {len(entry.subsets)} subjects")
        elif entry.size is not None and len(self.eval_docs) < entry.size:
            notes.append(f"partial: {len(self.eval_docs)} of {entry.size}")
        if other := stand_in(benchmark, subset):
            notes.append(f"partial: {other} in place of its own split")
        if self.config.num_fewshot and entry.pool:
            if not used_files(benchmark, subset, "shots"):
                notes.append("shots of the test split")
            elif other := stand_in(benchmark, subset, "shots"):
                notes.append(f"shots of {other}")
        return notes

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Load the records; lm-eval's own way logs a general hint on ``--metadata`` for each task."""
        self.dataset = self.config.custom_dataset(**self.config.metadata, **(dataset_kwargs or {}))

    def fewshot_docs(self) -> datasets.Dataset | None:
        """Return the pool of shots; a task without shots needs no list of them."""
        return None if self.config.num_fewshot == 0 else super().fewshot_docs()

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Render a prompt; the sampler of shots is told of the tested record."""
        if hasattr(self, "sampler"):
            self.sampler.document = doc
        return super().fewshot_context(doc, *args, **kwargs)

    def construct_requests(self, doc: dict[str, Any], ctx: Any, **kwargs: Any) -> Any:
        """Make the requests for a record."""
        requests = super().construct_requests(doc, ctx, **kwargs)
        neutral = self.config.metadata.get("neutral_context")
        if neutral is None:
            return requests
        after_neutral = [
            Instance(
                request_type="loglikelihood",
                doc=doc,
                arguments=(neutral, request.args[1]),
                idx=len(requests) + request.idx,
                metadata=kwargs["metadata"],
            )
            for request in requests
        ]
        return [*requests, *after_neutral]


def without_room(
    tasks: Mapping[str, Any], max_length: int, max_gen_toks: int, changes: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return the tasks that ask a model for so many new tokens that a prompt has no room, and how many they ask for.

    Args:
        tasks: lm-eval's tasks by their names.
        max_length: Longest text of the model in tokens.
        max_gen_toks: New tokens where a task does not say.
        changes: What a run changes of the tasks' ``generation_kwargs``.
    """
    asked = {}
    for name, task in tasks.items():
        options = {**(task.config.generation_kwargs or {}), **(changes or {})}
        new = int(options.get("max_gen_toks", max_gen_toks))
        if task.OUTPUT_TYPE == "generate_until" and new >= max_length:
            asked[name] = new
    return asked
