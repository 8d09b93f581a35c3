"""``dsv3 eval``: lm-eval's run with our model and tasks, and what there is to know of the benchmarks before one."""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from difflib import get_close_matches
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dsv3.cli.dsv3 import table
from lightning_dsv3.config import ConfigError, did_you_mean

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

_DESCRIPTION = """\
Evaluates a checkpoint on the benchmarks of the DeepSeek-V3 report with lm-eval, and prints its table. The checkpoint
may be a run folder, a .ckpt, a sharded checkpoint, or a Hugging Face folder. Without a checkpoint: what the benchmarks
are (--list), whether their data are whole (--check-data), and what of them a training text holds (--contamination).
"""

_EPILOG = """\
The same as "lm_eval --model dsv3 --model_args checkpoint=PATH --tasks ...", which has more options. Tasks are names,
patterns or groups of lm-eval's own and of ours: dsv3_base is the report's Table 3, dsv3_zh its Chinese part.

Several GPUs share the records: "torchrun --nproc-per-node 8 -m lightning_dsv3 eval ...".

Data come from the hub, or with --data (or LIGHTNING_DSV3_DATA) from files: a folder for each benchmark, in it the files
as they were published.

--fewshot-seeds K evaluates with K draws of the examples (seeds 0 to K-1) and prints mean, standard deviation, lowest
and highest of each figure; the model is loaded once. Tasks that have nothing to draw, as those without examples, come
out the same each time.

--output writes what "lm_eval --output_path" writes, results_DATE.json in a folder named after the model (one for each
draw, and draws_DATE.json with their means); "dsv3 report eval" reads it.

--contamination SOURCE looks for every run of 13 words (--ngram) of a benchmark's test records in a training text:
  corpus                     the default corpus
  texts/  a.jsonl  b.parquet files, as in data.sources (--field names the column); jsonl:, parquet:, text: before the
                             path say what they are
  hf:NAME                    a data set of the hub

examples:
  dsv3 eval --checkpoint runs/20261125-101500-tiny --tasks dsv3_c3,dsv3_ccpm --limit 100
  dsv3 eval --checkpoint last.ckpt --tasks dsv3_gsm8k --speculative --output results
  dsv3 eval --checkpoint last.ckpt --tasks dsv3_mmlu --fewshot-seeds 5
  dsv3 eval --model hf --checkpoint DeepSeek-V2-Lite --tasks dsv3_zh --batch-size 8
  dsv3 eval --data benchmarks --list
  dsv3 eval --data benchmarks --contamination texts/ --tasks cmath,gsm8k
"""

_INSTALL = "lm-eval is not installed; pip install 'lightning-dsv3[eval]'"


def evaluate(words: Sequence[str]) -> int:
    """Evaluate a checkpoint, or tell of the benchmarks; return the exit code."""
    parser = _parser()
    if not words:
        parser.print_help()
        return 0
    options = parser.parse_args(words)
    _check(options)
    with _environment(options.data):
        if options.list or options.check_data or options.contamination is not None:
            from lightning_dsv3.cli.benchmark_report import tell

            return tell(options)
        return _Evaluation(options).run()


@contextmanager
def _environment(data: Path | None) -> Iterator[None]:
    """Say to those who read it in the environment where data are, and as lm-eval does that tokenizers take one core."""
    wanted = {"TOKENIZERS_PARALLELISM": "false"}
    if data is not None:
        wanted["LIGHTNING_DSV3_DATA"] = str(data)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv3 eval",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="what to evaluate; see above")
    parser.add_argument("--tasks", metavar="A,B", help="tasks, patterns or groups, as in dsv3_c3,dsv3_math")
    run = parser.add_argument_group("the run")
    run.add_argument("--limit", metavar="N", help="the first N records of each task; below 1 a share of them")
    run.add_argument("--num-fewshot", type=int, metavar="N", help="examples in a prompt; the task's own number")
    run.add_argument("--fewshot-seeds", type=int, metavar="K", help="draw the examples K times: mean and spread")
    run.add_argument("--gen-kwargs", default="", metavar="K=V,...", help="of generation, as in max_gen_toks=128")
    run.add_argument("--output", type=Path, metavar="FOLDER", help="write results as JSON")
    run.add_argument("--log-samples", action="store_true", help="write prompts and answers too; needs --output")
    run.add_argument("--confirm-run-unsafe-code", action="store_true", help="run programs that the model writes")
    run.add_argument("--include-path", action="append", default=[], metavar="FOLDER", help="with tasks of your own")
    model = parser.add_argument_group("the model")
    model.add_argument("--model", default="dsv3", metavar="NAME", help="dsv3, or hf or another of lm-eval's")
    model.add_argument("--model-args", default="", metavar="K=V,...", help="further arguments of the model")
    model.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json or its folder; the checkpoint's own")
    model.add_argument("--batch-size", default="auto", metavar="N", help="rows of a pass; auto")
    model.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1; cuda where there is one")
    model.add_argument("--dtype", metavar="NAME", help="of the weights, as in bfloat16; as they are stored")
    model.add_argument("--max-length", type=int, metavar="N", help="longest text in tokens")
    model.add_argument("--speculative", action="store_true", help="draft with the MTP modules where text is written")
    data = parser.add_argument_group("the benchmarks; --tasks picks some of them by name")
    data.add_argument("--data", type=Path, metavar="FOLDER", help="take their data from files")
    data.add_argument("--list", action="store_true", help="what there is: method, shots, metric, data, licence")
    data.add_argument("--check-data", action="store_true", help="read every record at hand and say what is wrong")
    data.add_argument("--contamination", metavar="SOURCE", help="what of them is in a training text")
    data.add_argument("--ngram", type=int, default=13, metavar="N", help="words that must be the same; 13")
    data.add_argument("--field", default="text", metavar="NAME", help="of SOURCE's records that holds the text; text")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("num_fewshot", "fewshot_seeds", "max_length", "ngram"):
        value, least = getattr(options, name), 0 if name == "num_fewshot" else 1
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if options.data is not None and not options.data.is_dir():
        raise ConfigError(f"--data {options.data}: there is no such folder")
    told = [name for name in ("list", "check_data", "contamination") if getattr(options, name) not in (None, False)]
    if len(told) > 1:
        raise ConfigError(f"--{told[1].replace('_', '-')}: does not go with --{told[0].replace('_', '-')}")
    if not told:
        _check_run(options)


def _check_run(options: argparse.Namespace) -> None:
    if not options.tasks:
        raise ConfigError("--tasks: is missing, as in --tasks dsv3_c3; dsv3 eval --list shows what there is")
    if options.checkpoint is None and (options.model in ("dsv3", "hf") and not options.model_args):
        raise ConfigError("--checkpoint: is missing; give a run folder, a .ckpt or a Hugging Face folder")
    if options.speculative and options.model != "dsv3":
        raise ConfigError(f"--speculative: the model {options.model} does not draft; leave it out")
    if options.log_samples and options.output is None:
        raise ConfigError("--log-samples: goes into a folder; give --output FOLDER as well")
    for folder in options.include_path:
        if not Path(folder).is_dir():
            raise ConfigError(f"--include-path {folder}: there is no such folder")
    if options.limit is not None:
        _limit(options.limit)
    if find_spec("lm_eval") is None:
        raise ConfigError(_INSTALL)


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 < value < 1 or (value >= 1 and value == int(value))):
        raise ConfigError(f"--limit {text}: must be a number of records, or a share of them above 0 and below 1")
    return value


class _Evaluation:
    """A run of lm-eval, or several with other examples in the prompts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._arguments = _model_arguments(options)
        self._generation = _pairs("--gen-kwargs", options.gen_kwargs)
        self._include = [str(files("lightning_dsv3") / "evaluation" / "tasks"), *options.include_path]
        self._words = [word.strip() for word in options.tasks.split(",") if word.strip()]
        self._with_defaults = False
        self._tasks: Mapping[str, Any] = {}

    def run(self) -> int:
        """Evaluate, print, and write what is asked for; return the exit code."""
        from lm_eval.utils import make_table, setup_logging

        setup_logging(logging.WARNING)
        for name in ("lm_eval.api.task", "lm_eval.api.group"):
            logging.getLogger(name).addFilter(_is_news)
        index = self._index()
        names = self._names(index)
        lm: LM | None = None
        draws: list[dict[str, Any]] = []
        for number in range(self._options.fewshot_seeds or 1):
            seed = number if self._options.fewshot_seeds else None
            # Before the model, which may take minutes to load.
            manager = index if seed is None else self._manager(seed)
            with _one_error():
                tasks = self._loaded(manager, names)
                lm = lm or self._model()
            self._check_room(lm)
            results = self._results(lm, manager, tasks, seed)
            if results is None:  # of several processes the first one has them
                continue
            draws.append(results)
            print(self._title(results, seed))
            print(make_table(results))
            if "groups" in results:
                print(make_table(results, "groups"))
        if self._options.fewshot_seeds and draws:
            self._summarise(draws)
        return 0

    def _manager(self, seed: int | None = None) -> TaskManager:
        from lm_eval.tasks import TaskManager

        # Loaders of tasks are told of the model, as in lm-eval's own command; ours draw their examples by the seed.
        metadata = self._arguments | ({} if seed is None else {"fewshot_seed": seed})
        return TaskManager(include_path=self._include, include_defaults=self._with_defaults, metadata=metadata)

    def _index(self) -> TaskManager:
        manager = self._manager()
        # To read all tasks of lm-eval takes seconds, and few runs need any.
        if not all(_is_whole(word, manager) for word in self._words):
            self._with_defaults = True
            manager = self._manager()
        return manager

    def _names(self, manager: TaskManager) -> list[str]:
        names: dict[str, None] = {}
        for word in self._words:
            matches = manager.match_tasks([word])
            if not matches:
                # Of thousands of names a list would help nobody.
                close = get_close_matches(word, manager.all_tasks, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "dsv3 eval --list shows ours, lm_eval ls tasks all"
                raise ConfigError(f"--tasks {word}: there is no such task; {hint}")
            names |= dict.fromkeys(matches)
        return list(names)

    def _loaded(self, manager: TaskManager, names: Sequence[str]) -> list[Any]:
        """Load the tasks' data; return what stands for the names: groups, and the tasks of tags one by one."""
        try:
            loaded = manager.load(list(names))
        except ValueError as error:
            if "Duplicate task" not in str(error):
                raise
            raise ConfigError(f"--tasks: {error}; leave one of them out") from error
        groups, tasks = loaded.get("groups", {}), loaded["tasks"]
        self._tasks = tasks
        if not self._options.confirm_run_unsafe_code:
            for name, task in tasks.items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise ConfigError(
                        f"--tasks: {name} runs programs that the model writes; give --confirm-run-unsafe-code if this "
                        "machine may, or leave the task out"
                    )
        items: list[Any] = []
        for name in names:
            of_tag = () if name in groups or name in tasks else sorted(manager.task_index[name].tags)
            items += [groups.get(part) or tasks[part] for part in of_tag or (name,)]
        return items

    def _model(self) -> LM:
        import lm_eval.models  # noqa: F401  (registers lm-eval's models, which it does in an empty registry only)
        from lm_eval.api.registry import get_model, model_registry

        options = self._options
        if options.model == "dsv3":
            from lightning_dsv3.evaluation.lm import DSV3LM

            kind: type[LM] = DSV3LM
        elif options.model in model_registry:
            kind = get_model(options.model)
        else:
            known = {"dsv3", *model_registry}
            raise ConfigError(f"--model {options.model}: {did_you_mean(options.model, sorted(known))}")
        try:
            return kind.create_from_arg_obj(self._arguments, {"batch_size": options.batch_size, "device": self._device})
        except TypeError as error:  # an argument that the model does not have
            raise ConfigError(f"--model-args: {error}") from error

    def _check_room(self, lm: LM) -> None:
        """Say before the first pass what a model of short contexts cannot write."""
        from lightning_dsv3.evaluation.lm import DSV3LM
        from lightning_dsv3.evaluation.task import without_room

        if not isinstance(lm, DSV3LM):
            return
        if asked := without_room(self._tasks, lm.max_length, lm.max_gen_toks, self._generation):
            listed = ", ".join(f"{name} ({new})" for name, new in asked.items())
            raise ConfigError(
                f"--tasks: max_length={lm.max_length} leaves no room for a prompt beside the new tokens of {listed}; "
                "give --gen-kwargs max_gen_toks=N, or leave them out"
            )

    @property
    def _device(self) -> str | None:
        """Where the model runs. As lm-eval's command does, ask for a GPU: hf takes the CPU where there is none."""
        options = self._options
        is_open = options.device is None and options.model != "dsv3" and "device" not in self._arguments
        return "cuda:0" if is_open else options.device

    def _results(self, lm: LM, manager: TaskManager, tasks: list[Any], seed: int | None) -> dict[str, Any] | None:
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        options = self._options
        tracker = EvaluationTracker(output_path=None if options.output is None else str(options.output))
        results: dict[str, Any] | None = simple_evaluate(
            model=lm,
            model_args=self._arguments,
            tasks=tasks,
            num_fewshot=options.num_fewshot,
            gen_kwargs=self._generation or None,
            batch_size=options.batch_size,
            device=self._device,
            limit=None if options.limit is None else _limit(options.limit),
            log_samples=options.log_samples,
            evaluation_tracker=tracker,
            task_manager=manager,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            **({} if seed is None else {"fewshot_random_seed": seed}),
        )
        if results is not None:
            results["config"]["model"] = options.model  # as where lm-eval makes the model by its name
            if options.output is not None:
                self._save(tracker, results)
        return results

    def _save(self, tracker: EvaluationTracker, results: dict[str, Any]) -> None:
        from lm_eval.utils import sanitize_model_name

        general, samples = tracker.general_config_tracker, results.pop("samples", None)
        general.model_source = self._options.model
        general.model_name = str(self._options.checkpoint or self._options.model)
        general.model_name_sanitized = sanitize_model_name(general.model_name)
        tracker.save_results_aggregated(results=results, samples=samples)
        for name in results["configs"] if samples else ():
            tracker.save_results_samples(task_name=name, samples=samples[name])
        self._folder = self._options.output / general.model_name_sanitized
        written = self._folder / f"results_{tracker.date_id}.json"
        if not written.is_file():  # of which lm-eval only warns
            raise ConfigError(f"--output {self._options.output}: {written} could not be written")
        print(f"dsv3: wrote {written}", file=sys.stderr)

    def _title(self, results: Mapping[str, Any], seed: int | None) -> str:
        options = self._options
        words = [f"{options.model} ({', '.join(f'{name}={value}' for name, value in self._arguments.items())})"]
        words += [f"limit: {options.limit}", f"num_fewshot: {options.num_fewshot}", f"batch_size: {options.batch_size}"]
        if seed is not None:
            words.append(f"seed of the examples: {seed}")
        return ", ".join(words)

    def _summarise(self, draws: Sequence[Mapping[str, Any]]) -> None:
        figures = _figures(draws)
        rows = [["task", "metric", "filter", "mean", "std", "lowest", "highest"]]
        for (task, metric, kept), values in figures.items():
            numbers = [statistics.fmean(values), _spread(values), min(values), max(values)]
            rows.append([task, metric, kept, *(f"{number:.4f}" for number in numbers)])
        print(f"{len(draws)} draws of the examples, seeds 0 to {len(draws) - 1}")
        print(table(rows, left=(0, 1, 2)))
        if self._options.output is None:
            return
        content: dict[str, Any] = {"seeds": list(range(len(draws))), "results": {}}
        for (task, metric, kept), values in figures.items():
            content["results"].setdefault(task, {})[f"{metric},{kept}"] = {
                "mean": statistics.fmean(values),
                "std": _spread(values),
                "values": values,
            }
        path = self._folder / f"draws_{datetime.now().isoformat().replace(':', '-')}.json"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        print(f"dsv3: wrote {path}", file=sys.stderr)


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out what lm-eval says of all tasks that load data by a function, and of our groups of several metrics."""
    said = record.getMessage()
    return "Custom kwargs can be passed" not in said and not ("Group 'dsv3_" in said and "is missing in" in said)


def _model_arguments(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "checkpoint" if options.model == "dsv3" else "pretrained": options.checkpoint,
        "tokenizer": options.tokenizer,
        "dtype": options.dtype,
        "max_length": options.max_length,
        "speculative": options.speculative or None,
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    further = _pairs("--model-args", options.model_args)
    if twice := sorted(set(arguments) & set(further)):
        raise ConfigError(f"--model-args {twice[0]}=...: an option of its own gives it as well; leave one out")
    return arguments | further


def _pairs(option: str, text: str) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    if any("=" not in word for word in text.split(",") if word):
        raise ConfigError(f"{option} {text}: must be name=value, with commas between")
    pairs: dict[str, Any] = simple_parse_args_string(text)
    return pairs


def _is_whole(word: str, manager: TaskManager) -> bool:
    """Tell whether an index without lm-eval's tasks has all that a word stands for."""
    from lightning_dsv3.evaluation.groups import is_indexed

    names = manager.match_tasks([word])
    if not word.startswith("dsv3_") and (not names or any(sign in word for sign in "*?[")):
        return False
    return all(is_indexed(name, manager.task_index) for name in names)


def _figures(draws: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[float]]:
    """Return the values of each task's metrics, in the order of the draws."""
    figures: dict[tuple[str, str, str], list[float]] = {}
    for results in draws:
        # Groups with a mean of their own are in both; those of the group are the same.
        for task, values in (results["results"] | results.get("groups", {})).items():
            for name, value in values.items():
                metric, comma, kept = name.partition(",")
                if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                    figures.setdefault((task, metric, kept), []).append(float(value))
    return figures


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


@contextmanager
def _one_error() -> Iterator[None]:
    """Turn what tasks and models refuse to load into the command's one line."""
    from lightning_dsv3.checkpoint import CheckpointError

    try:
        yield
    except ConfigError:
        raise
    except (CheckpointError, OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
