"""lm-eval's benchmarks on the model that is being trained."""

from __future__ import annotations

import io
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from tokenizers import Tokenizer

from lightning_dsv3.config import did_you_mean
from lightning_dsv3.model import DeepSeekV3

# lm-eval's own: of Python, NumPy and torch, and of the few-shot samplers.
_SEEDS, _FEWSHOT_SEED = (0, 1234, 1234), 1234


class LMEvalCallback(Callback):
    """Evaluates the model with lm-eval while ``fit`` runs, on the weights as they are at that moment.

    Training goes on as if nothing had been: weights are shared and not copied, modules get back the mode that each was
    in, gradients and optimizer are not touched, and the random states of Python, NumPy and torch, which lm-eval seeds,
    are restored. Nothing counts these passes, neither ``AuxFreeBalanceCallback``, wherever it stands among the
    callbacks, nor ``ExpertLoadMonitor``. A compiled model runs eagerly here.

    Logged, to all loggers and for callbacks that monitor a key, are ``eval/<task>/<metric>``, and
    ``eval/<task>/<metric>/<filter>`` where a task has filters, at the step whose weights were evaluated. A group has
    its own figures alone if it has any, else those of its members. One line has of each task what comes first in its
    file, and bits per byte; lm-eval prints nothing.

    Ranks that each have the whole model (DDP) divide the requests, those that begin alike staying together, and all get
    the scores, which are those of one rank but for rounding. Sampled text, of tasks that draw, does depend on the
    number of ranks. Scoring itself, which for tasks that run code is most of the work, is repeated on each.

    lm-eval, the tasks' names, data and first prompt, the tokenizer and the strategy are checked in ``setup``, and what
    depends on the model before the first step.

    Letter answers sit at chance for a small model. So the default is ``dsv3_small``: the ``_cloze`` tasks of MMLU, ARC,
    CMMLU, C-Eval and C3, which score options as text, without shots, and whose bits per byte of the right answer tell
    its progress. Of a group those tasks run whose data are at hand, in the folder that LIGHTNING_DSV3_DATA names or on
    the hub; a warning names the others.

    What it does not do: evaluate sharded weights (FSDP, expert parallelism, DeepSpeed). Save a checkpoint and run
    ``lm_eval --model dsv3`` on it.

    Args:
        tasks: Names of tasks, groups or tags: this package's, lm-eval's own, or those in ``include_path``.
        limit: Documents of each task, the first ones (of each subject in turn); below 1 a share of them. None takes
            all. Scores of the same documents can be compared from step to step; for a table take all.
        every_n_steps: Evaluate after each so many optimizer steps; None does not.
        at_validation_end: Evaluate after each validation, too.
        at_fit_end: Evaluate when training ends, too, unless that step has been evaluated.
        tokenizer: A tokenizer, or the path of a ``tokenizer.json`` or of a folder with one. Default: the data module's.
        include_path: Folders with more tasks, as YAML files.
        batch_size: Rows of a pass; ``auto`` for as many as suit the engine. Scores do not depend on it.
        max_length: Longest text in tokens; by default 4096 or what the model has if less.
        confirm_run_unsafe_code: Allow tasks that run what the model wrote.

    Attributes:
        scores: The latest, by key as logged.
        seconds: How long all evaluations took together; ``RunFolder`` leaves them out of its throughput.

    Raises:
        ValueError: An argument that cannot be.
        MisconfigurationException: lm-eval is not installed, there is no such task, none of its data, no tokenizer, no
            whole ``DeepSeekV3`` in the module, or a task that this model cannot do.

    Example:
        >>> callback = LMEvalCallback(every_n_steps=500)
        >>> callback.tasks, callback.limit, callback.scores
        (['dsv3_small'], 100, {})
    """

    def __init__(
        self,
        tasks: str | Sequence[str] = "dsv3_small",
        limit: float | None = 100,
        every_n_steps: int | None = None,
        *,
        at_validation_end: bool = False,
        at_fit_end: bool = True,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        include_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        batch_size: int | str = "auto",
        max_length: int | None = None,
        confirm_run_unsafe_code: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        if not self.tasks:
            raise ValueError("tasks=[]: name one task at least, as in tasks=['dsv3_c3_cloze']")
        if limit is not None and not limit > 0:
            raise ValueError(f"limit={limit}: must be above 0, or None for all documents")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: must be 1 at least, or None")
        if every_n_steps is None and not at_validation_end and not at_fit_end:
            raise ValueError("every_n_steps=None: nothing says when to evaluate; give it a number of steps")
        self.limit = limit
        self.every_n_steps = every_n_steps
        self.at_validation_end = at_validation_end
        self.at_fit_end = at_fit_end
        self.scores: dict[str, float] = {}
        self.seconds = 0.0
        self._given_tokenizer = tokenizer
        paths = [include_path] if isinstance(include_path, (str, os.PathLike)) else include_path
        self._include_paths = [Path(path) for path in paths]
        self._batch_size = batch_size
        self._max_length = max_length
        self._confirm_run_unsafe_code = confirm_run_unsafe_code
        self._loaded: Any = None
        self._lm: Any = None
        self._model: DeepSeekV3 | None = None
        self._global_step = 0
        self._evaluated_at = -1
        self._said: set[str] = set()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the tasks, and say now what would fail in the middle of the run."""
        if stage != "fit":
            return
        for folder in self._include_paths:
            if not folder.is_dir():
                raise MisconfigurationException(f"include_path={str(folder)!r}: there is no such folder of tasks")
        if getattr(trainer.strategy, "restore_checkpoint_after_setup", False):  # what FSDP and the like have in common
            raise MisconfigurationException(
                f"LMEvalCallback needs the whole model on every rank, and {type(trainer.strategy).__name__} shards it. "
                "Leave the callback out and evaluate checkpoints: dsv3 eval --checkpoint PATH --tasks "
                f"{','.join(self.tasks)}"
            )
        try:
            import lm_eval  # noqa: F401
        except ModuleNotFoundError as error:
            raise MisconfigurationException(
                f"LMEvalCallback needs lm-eval ({error}); pip install 'lightning-dsv3[eval]'"
            ) from error
        from lightning_dsv3.evaluation.data import DataError

        self._tokenizer(trainer)
        with isolate_rng(), self._aside(logging.LogRecord.getMessage):
            try:
                self._loaded = _load(self.tasks, self._include_paths)
            except DataError as error:
                raise MisconfigurationException(f"tasks: {error}") from error
            for name, task in self._loaded["tasks"].items():
                if getattr(task, "UNSAFE_CODE", False) and not self._confirm_run_unsafe_code:
                    raise MisconfigurationException(
                        f"tasks: {name} runs code that the model wrote; LMEvalCallback(confirm_run_unsafe_code=True) "
                        "allows it"
                    )
                task.build_all_requests(limit=1)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the model, now where it will be trained, behind lm-eval's interface."""
        from lightning_dsv3.evaluation.lm import DSV3LM
        from lightning_dsv3.evaluation.task import without_room

        self._model = next((m for m in pl_module.modules() if isinstance(m, DeepSeekV3)), None)
        if self._model is None:
            raise MisconfigurationException(f"LMEvalCallback finds no DeepSeekV3 in {type(pl_module).__name__}")
        tokenizer = self._tokenizer(trainer)
        if tokenizer.get_vocab_size() > self._model.config.vocab_size:
            raise MisconfigurationException(
                f"tokenizer: it has {tokenizer.get_vocab_size()} ids and the model vocab_size="
                f"{self._model.config.vocab_size}; give the one that the model is trained with"
            )
        self._lm = DSV3LM(
            model=self._model,
            tokenizer=tokenizer,
            device=str(pl_module.device),
            batch_size=self._batch_size,
            max_length=self._max_length,
        )
        asked = without_room(self._loaded["tasks"], self._lm.max_length, self._lm.max_gen_toks)
        if asked:
            name, new = next(iter(asked.items()))
            raise MisconfigurationException(
                f"tasks: {name} asks for {new} new tokens, and max_length={self._lm.max_length} leaves no room for its "
                "prompt; leave the task out or give the model a larger max_position_embeddings"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count steps from here: 0, or where a checkpoint stopped."""
        self._global_step = trainer.global_step
        self._evaluated_at = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate if it is time."""
        before, self._global_step = self._global_step, trainer.global_step
        every = self.every_n_steps
        # Several optimizers make several steps of a batch.
        if every is not None and trainer.global_step // every > before // every:
            self._evaluate(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate if it is time."""
        if self.at_validation_end and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._evaluate(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate what training ends with."""
        if self.at_fit_end:
            self._evaluate(trainer, has_ended=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the model and the tasks."""
        self._loaded = self._lm = self._model = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the model and the tasks."""
        self._loaded = self._lm = self._model = None

    def _evaluate(self, trainer: pl.Trainer, *, has_ended: bool = False) -> None:
        if trainer.global_step == self._evaluated_at:
            return
        self._evaluated_at = trainer.global_step
        from lm_eval.evaluator import evaluate

        begin = time.monotonic()
        assert self._model is not None
        # Of what is said of one request after the other, the first will do.
        aside = self._aside(lambda record: str(record.msg))
        # Validation hooks run in inference mode, whose tensors training could not use, should anything keep one.
        with _in_evaluation(self._model), isolate_rng(), aside, torch.inference_mode(False), torch.no_grad():
            self._seed(trainer.global_rank)
            results = evaluate(
                lm=_DividedLM(self._lm, trainer.global_rank, trainer.world_size),
                task_dict=self._loaded,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
                confirm_run_unsafe_code=self._confirm_run_unsafe_code,
            )
        spent = time.monotonic() - begin
        self.seconds += spent
        self.scores = _scores(results["results"], self._loaded)
        # As Lightning's own LearningRateMonitor does: `log` is not allowed in all of these hooks, and would keep the
        # scores of a step that is none of log_every_n_steps from the loggers.
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({key: torch.tensor(score, device=device) for key, score in self.scores.items()})
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - has_ended
        for logger in trainer.loggers:
            logger.log_metrics(self.scores, step=step)
        short = _headlines(self.scores, self._loaded["tasks"])
        listed = ", ".join(f"{key.removeprefix('eval/')} {score:.4f}" for key, score in short.items())
        rank_zero_info(f"lm-eval at step {trainer.global_step} ({spent:.1f} s): {listed}")

    @contextmanager
    def _aside(self, kind: Callable[[logging.LogRecord], str]) -> Iterator[None]:
        """Let nothing print, and then pass on what this package has warned of: of each kind the first, once a run."""
        with _quiet() as records:
            yield
        for record in records:
            if kind(record) not in self._said:
                self._said.add(kind(record))
                rank_zero_warn(record.getMessage())

    def _seed(self, rank: int) -> None:
        """Seed what draws as lm-eval does before each run, so that shots are those of the runs before."""
        random.seed(_SEEDS[0])
        np.random.seed(_SEEDS[1])
        torch.manual_seed(_SEEDS[2] + rank)  # what the ranks sample should not be the same
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)

    def _tokenizer(self, trainer: pl.Trainer) -> Tokenizer:
        given = self._given_tokenizer
        if given is None:
            given = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            if given is None:
                raise MisconfigurationException(
                    "LMEvalCallback has no tokenizer: the Trainer's data module has none; give tokenizer="
                )
        if isinstance(given, Tokenizer):
            return given
        path = Path(given)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise MisconfigurationException(f"tokenizer={str(given)!r}: there is no such file")
        return Tokenizer.from_file(str(path))


class _DividedLM:
    """A model of lm-eval whose requests are divided among ranks; to lm-eval, one rank that does all of them.

    lm-eval's own division deals documents out in turn: each rank would compute every few-shot block and passage, and
    draw other shots than one rank does.
    """

    rank, world_size = 0, 1

    def __init__(self, lm: Any, rank: int, world_size: int) -> None:
        self._lm, self._rank, self._ranks = lm, rank, world_size

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        return self._divided("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        return self._divided("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        return self._divided("generate_until", requests)

    def _divided(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        run = getattr(self._lm, kind)
        if self._ranks == 1:
            return list(run(list(requests), disable_tqdm=True))
        order = sorted(range(len(requests)), key=lambda number: requests[number].args[0])
        begin, end = (len(order) * rank // self._ranks for rank in (self._rank, self._rank + 1))
        own = run([requests[number] for number in order[begin:end]], disable_tqdm=True)
        parts: list[Any] = [None] * self._ranks
        dist.all_gather_object(parts, own)
        in_order = dict(zip(order, (result for part in parts for result in part), strict=True))
        return [in_order[number] for number in range(len(requests))]


def _load(names: Sequence[str], include_paths: Sequence[Path]) -> Any:
    """Return lm-eval's tasks and groups. Its own hundreds, slow to index, are left out where they are not needed."""
    from lm_eval.tasks import TaskManager

    import lightning_dsv3.evaluation
    from lightning_dsv3.evaluation.groups import is_indexed

    # Later folders win.
    folders = [Path(folder) / "tasks" for folder in lightning_dsv3.evaluation.__path__] + list(include_paths)
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not all(is_indexed(name, manager.task_index) for name in names):
        manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            raise MisconfigurationException(
                f"tasks: lm-eval knows no {name!r}; {did_you_mean(name, manager.all_tasks)}"
            )
    loaded = manager.load(list(names))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _scores(results: Mapping[str, Mapping[str, Any]], loaded: Mapping[str, Any]) -> dict[str, float]:
    """Return lm-eval's figures by the keys that they are logged under."""
    members: Mapping[str, Sequence[str]] = loaded["group_map"]
    inner = {name for names in members.values() for name in names}
    pending = [name for name in (*loaded["groups"], *loaded["tasks"]) if name not in inner]
    scores: dict[str, float] = {}
    while pending:
        name = pending.pop(0)
        own = {}
        for key, value in results.get(name, {}).items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                own[f"eval/{name}/{metric}" + ("" if kind == "none" else f"/{kind}")] = float(value)
        scores |= own
        if not own:
            pending = [*members.get(name, ()), *pending]
    return scores


def _headlines(scores: Mapping[str, float], tasks: Mapping[str, Any]) -> dict[str, float]:
    """Return what a line can hold: of each task its first metric and bits per byte, of a group all that it has."""
    short: dict[str, float] = {}
    for key, score in scores.items():
        name, metric = key.split("/")[1:3]
        declared = [entry["metric"] for entry in tasks[name].config.metric_list or ()] if name in tasks else []
        if not declared or metric in (declared[0], "bpb"):
            short[key] = score
    return short


@contextmanager
def _in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _quiet() -> Iterator[list[logging.LogRecord]]:
    """Let nothing print or draw a progress bar, and lm-eval log errors alone; yield what this package warns of."""
    handler = _Kept(logging.WARNING)
    theirs, ours = logging.getLogger("lm_eval"), logging.getLogger("lightning_dsv3")
    level, propagate = theirs.level, ours.propagate
    theirs.setLevel(logging.ERROR)
    ours.propagate = False
    ours.addHandler(handler)
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield handler.records
    finally:
        ours.removeHandler(handler)
        ours.propagate = propagate
        theirs.setLevel(level)
