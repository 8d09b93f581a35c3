"""Result files of lm-eval, ours and those of its other models: the scores of a table's rows, and how they came about.

A score is only as good as what is known of it. So each carries its settings (task version, shots, seeds, window,
records and more), by which two results are held against each other, and its departures from the benchmark's protocol (a
part of the records, other shots), for which it is not held against published numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_dsv3.config import ConfigError
from lightning_dsv3.evaluation.groups import GROUPS, task_name

# What lm-eval 0.4.13 writes, with --output_path, in every file of results.
_PARTS = ("results", "group_subtasks", "configs", "versions", "n-shot", "n-samples", "config")
_SEEDS = {
    "few-shot seed": "fewshot_seed",
    "python seed": "random_seed",
    "numpy seed": "numpy_seed",
    "torch seed": "torch_seed",
}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        section: The part of the table that it stands in.
        label: What the first column says.
        shots: Worked examples of the protocol; None where there is no prompt.
        benchmark: The benchmark, as in `lightning_dsv3.evaluation.data.BENCHMARKS`, and what its task's name adds.
        metric: The metric of lm-eval's task that the row shows.
        bits: Whether the scale is bits per byte, lower is better; else percent, higher is better.
    """

    section: str
    label: str
    shots: int | None
    benchmark: str
    metric: str
    bits: bool = False

    @property
    def scale(self) -> float:
        """What lm-eval's number is multiplied by."""
        return 1.0 if self.bits else 100.0


@dataclass(frozen=True)
class Score:
    """A number of a table.

    Attributes:
        value: In percent or in bits per byte.
        stderr: Its standard error, in the same unit; None where it is not known.
        settings: How it came about, by name; None for what a file does not state. Empty for published numbers.
        departures: In what it departs from the protocol of the row.
        tasks: The tasks of lm-eval that it is from.
    """

    value: float
    stderr: float | None = None
    settings: Mapping[str, str | None] = field(default_factory=dict)
    departures: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """What a results file says of its model; None for what it does not.

    Attributes:
        name: Its path or name.
        architecture: ``MoE`` or ``Dense``.
        activated: Parameters that a token uses.
        total: Parameters.
        window: Longest text in tokens.
    """

    name: str
    architecture: str | None
    activated: int | None
    total: int | None
    window: int | None


class ResultFile:
    """One ``results_DATE.json``.

    Args:
        path: The file.

    Raises:
        ConfigError: It is not there, or no result of lm-eval, or lacks a part of one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _read(path)
        self.model = _model_info(self._data)
        self._samples: dict[Row, dict[tuple[str, int, str], float] | None] = {}

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """What there is of each task or group, by its name."""
        results: Mapping[str, Mapping[str, Any]] = self._data["results"]
        return results

    def score(self, row: Row) -> Score | str:
        """Return the score of a row, or why there is none.

        Raises:
            ConfigError: The file has the score and lacks what belongs to it.
        """
        name = self._task(row.benchmark)
        if name is None:
            return self._why_absent(row.benchmark)
        entry = self.tasks[name]
        keys = [key for key in entry if key.partition(",")[0] == row.metric and "," in key]
        if len(keys) != 1:
            return self._why_no_metric(name, row.metric, keys)
        value: Any = entry[keys[0]]
        stderr: Any = entry.get(keys[0].replace(",", "_stderr,", 1))
        if not _is_number(value):
            return f"its {row.metric} is {value!r}, no number"
        leaves = self._leaves(name)
        return Score(
            value=value * row.scale,
            stderr=stderr * row.scale if _is_number(stderr) else None,
            settings=self._settings(row, name, leaves),
            departures=tuple(self._departures(row, name, leaves)),
            tasks=tuple(leaves),
        )

    def samples(self, row: Row, score: Score) -> dict[tuple[str, int, str], float] | None:
        """Return the metric of each record, by task, number and hash, as ``--log_samples`` writes it beside the file.

        Returns:
            None where there are no samples, or where the score is not their mean.
        """
        if row not in self._samples:
            self._samples[row] = self._read_samples(row, score)
        return self._samples[row]

    def _read_samples(self, row: Row, score: Score) -> dict[tuple[str, int, str], float] | None:
        values: dict[tuple[str, int, str], float] = {}
        for task in score.tasks:
            path = self.path.with_name(self.path.name.replace("results_", f"samples_{task}_", 1)).with_suffix(".jsonl")
            if not self.path.name.startswith("results_") or not path.is_file():
                return None
            with path.open(encoding="utf-8") as file:
                for line in file:
                    try:
                        sample = json.loads(line)
                        key, value = (task, sample["doc_id"], sample["doc_hash"]), sample[row.metric]
                    except (ValueError, KeyError, TypeError) as error:
                        raise ConfigError(f"{path}: no samples of lm-eval ({error!r}); move the file away") from error
                    if key in values or not _is_number(value):
                        return None
                    values[key] = value * row.scale
        # Not the mean: a score over all records at once, or one of several filters.
        if not values or not math.isclose(math.fsum(values.values()) / len(values), score.value, abs_tol=1e-6):
            return None
        return values

    def _task(self, benchmark: str) -> str | None:
        name = task_name(benchmark)
        plain = f"dsv3_{benchmark}"
        if name not in self.tasks and plain in self._data["configs"]:  # MATH by the name of its group
            name = plain
        return name if name in self.tasks else None

    def _why_absent(self, benchmark: str) -> str:
        parts = [part for part in map(task_name, GROUPS.get(task_name(benchmark), ())) if part in self.tasks]
        if parts:
            return f"only {', '.join(parts)} ran and not the group"
        for group, leaves in GROUPS.items():
            if benchmark in leaves and group in self._data["group_subtasks"]:
                return f"{group} ran without it, as its data were not at hand (see dsv3 eval --list)"
        if benchmark in self.tasks:
            return "the file has lm-eval's own task, which is another protocol"
        return "not run"

    def _why_no_metric(self, name: str, metric: str, keys: Sequence[str]) -> str:
        if keys:
            return f"its {metric} is there {len(keys)} times ({', '.join(keys)})"
        known = dict.fromkeys(key.partition(",")[0] for key in self.tasks[name] if "," in key)
        metrics = [key for key in known if not key.endswith("_stderr")]
        return f"no {metric} among its metrics ({', '.join(metrics) or 'none at all'})"

    def _leaves(self, name: str) -> list[str]:
        leaves = self._data["group_subtasks"].get(name)
        return [name] if not leaves else list(leaves)

    def _stated(self, part: str, task: str) -> Any:
        try:
            return self._data[part][task]
        except KeyError as error:
            raise ConfigError(
                f"{self.path}: has a score of {task} and no {part}.{task}; give the file as lm-eval wrote it"
            ) from error

    def _settings(self, row: Row, name: str, leaves: Sequence[str]) -> dict[str, str | None]:
        data, config = self._data, self._data["config"]
        configs = [self._stated("configs", leaf) for leaf in leaves]
        metadata = [leaf.get("metadata") or {} for leaf in configs]
        counts = [self._stated("n-samples", leaf) for leaf in leaves]
        settings: dict[str, str | None] = {
            "version": _alike(self._stated("versions", leaf) for leaf in leaves),
            "shots": _alike(self._stated("n-shot", leaf) for leaf in leaves),
            **{label: None if key not in config else str(config[key]) for label, key in _SEEDS.items()},
            "seed of the drawn shots": _alike(item.get("fewshot_seed", "none") for item in metadata),
            "window": None if self.model.window is None else str(self.model.window),
            "records": " + ".join(str(count["effective"]) for count in counts),
            "decoding": _alike(
                json.dumps([leaf.get("generation_kwargs"), leaf.get("repeats")], sort_keys=True) for leaf in configs
            ),
            "chat template": str(data.get("chat_template_sha") or "none"),
            "system instruction": str(data.get("system_instruction_sha") or "none"),
        }
        settings["source of the shots"] = _alike(_notes(self.tasks[leaf], "shots") or "its own" for leaf in leaves)
        if name in self._data["group_subtasks"]:
            settings["tasks"] = ", ".join(leaves)
        if self._by_length(row, name):
            settings["length of options"] = self._unit_of_length
        if any(_notes(self.tasks[leaf], "partial") for leaf in leaves):
            # Halves of a benchmark are often of one size.
            settings["data"] = ", ".join(str(file) for item in metadata for file in item.get("data", []))
        return settings

    def _departures(self, row: Row, name: str, leaves: Sequence[str]) -> list[str]:
        departures = []
        whole = [task_name(leaf) for leaf in GROUPS.get(name, ())]
        if absent := [leaf.removeprefix(f"{name}_") for leaf in whole if leaf not in leaves]:
            departures.append(f"partial: {len(whole) - len(absent)} of {len(whole)} tasks, without {', '.join(absent)}")
        notes = [note for leaf in leaves for note in _notes(self.tasks[leaf], "partial", "shots")]
        departures += dict.fromkeys(notes)
        counts = [self._stated("n-samples", leaf) for leaf in leaves]
        effective, original = (sum(count[key] for count in counts) for key in ("effective", "original"))
        if effective < original:
            departures.append(f"limited: {effective} of {original} records")
        shots = _alike(self._stated("n-shot", leaf) for leaf in leaves)
        if shots != str(row.shots or 0):
            departures.append(f"{shots}-shot, the table has {row.shots or 0}-shot")
        if self._by_length(row, name) and self._unit_of_length != "tokens":
            departures.append("the length of options is in bytes, as this model of lm-eval does not count tokens")
        return departures

    @property
    def _unit_of_length(self) -> str:
        # Our model says how many tokens an option has; for others acc_ppl divides by bytes.
        return "tokens" if "dsv3_model_info" in self._data["config"] else "bytes"

    def _by_length(self, row: Row, name: str) -> bool:
        """Tell whether a choice depends on how the length of an option is counted: not among letters."""
        # WinoGrande's two options are one text behind two contexts.
        has_texts = any(key.partition(",")[0] == "bpb" for key in self.tasks[name])
        return row.metric == "acc_ppl" and has_texts and row.benchmark != "winogrande"


def _read(path: Path) -> dict[str, Any]:
    hint = "give a results_DATE.json that dsv3 eval --output or lm_eval --output_path wrote"
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; {hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); {hint}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: no result of lm-eval, as it is no JSON ({error}); {hint}") from error
    if problem := _problem(data):
        raise ConfigError(f"{path}: no result of lm-eval, as {problem}; {hint}")
    content: dict[str, Any] = data
    return content


def _problem(data: Any) -> str | None:
    """Return what parts a file's content from a result of lm-eval."""
    if not isinstance(data, dict):
        return "it holds no object"
    for part in _PARTS:
        if not isinstance(data.get(part), dict):
            return f"it has no object {part!r}"
    for part in ("results", "configs", "n-samples"):
        for name, value in data[part].items():
            if not isinstance(value, dict):
                return f"{part}.{name} is no object"
    for name, counts in data["n-samples"].items():
        for key in ("original", "effective"):
            if not isinstance(counts.get(key), int):
                return f"n-samples.{name}.{key} is no number"
    return None


def _model_info(data: Mapping[str, Any]) -> ModelInfo:
    config = data["config"]
    info = config.get("dsv3_model_info") or {}
    total = info.get("num_parameters_total", config.get("model_num_parameters"))
    return ModelInfo(
        name=str(info.get("name") or data.get("model_name") or config.get("model") or "model"),
        architecture=info.get("architecture"),
        activated=info.get("num_parameters_activated"),
        total=total if isinstance(total, int) and total > 0 else None,  # -1 is lm-eval's "not known"
        window=info.get("max_length", data.get("max_length")),
    )


def _notes(entry: Mapping[str, Any], *kinds: str) -> list[str]:
    """Return what our tasks add to their names where a score is not that of the protocol.

    >>> _notes({"alias": "dsv3_winogrande (partial: 633 of 1267; shots of the test split)"}, "shots")
    ['shots of the test split']
    """
    found = re.search(r"\((.+)\)$", str(entry.get("alias", "")))
    return [note for note in found.group(1).split("; ") if note.startswith(kinds)] if found else []


def _alike(values: Any) -> str:
    """Join what differs among the parts of a group; mostly nothing does."""
    return ", ".join(dict.fromkeys(map(str, values)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
