"""Benchmarks while training: the scores are lm-eval's, and training is what it is without them."""

import ast
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import FSDPStrategy
from ranks import run_on_ranks
from tiny_run import assert_same, balance, biases, quiet_trainer, tiny_data, tiny_module, weights
from tiny_tasks import write_tasks

import lightning_dsv3
import lightning_dsv3.pytorch_lightning
from lightning_dsv3.callbacks import AuxFreeBalanceCallback, ExpertLoadMonitor, LMEvalCallback
from lightning_dsv3.callbacks import lm_eval as lm_eval_callback
from lightning_dsv3.data import load_tokenizer

pytest.importorskip("lm_eval")

PLAIN_KEYS = {"eval/tiny_choice/acc", "eval/tiny_choice/acc_norm"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


class Recorder(Logger):
    """Keeps what is logged under ``eval/``, or another beginning."""

    name, version = "recorder", "0"

    def __init__(self, beginning: str = "eval/") -> None:
        super().__init__()
        self.beginning = beginning
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        scores = {key: value for key, value in metrics.items() if key.startswith(self.beginning)}
        if scores:
            assert step is not None
            self.rows.append((step, scores))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.rows]


class Copies(L.Callback):
    """Keeps the weights behind each step, biases included."""

    def __init__(self) -> None:
        self.of_step: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.of_step[trainer.global_step] = {name: t.clone() for name, t in pl_module.state_dict().items()}


class RandomStates(L.Callback):
    """Keeps the next number of each generator at the start of each batch, which does not change them."""

    def __init__(self) -> None:
        self.next: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        python, numpy, torches = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.next.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torches)


def evaluator(tasks: Path, names: Any = "tiny_choice", **arguments: Any) -> LMEvalCallback:
    return LMEvalCallback(names, include_path=tasks, **arguments)


def fit(*callbacks: Any, module: Any = None, logger: Any = False, **arguments: Any) -> tuple[Any, Any]:
    module = module or tiny_module()
    data = tiny_data()
    trainer = quiet_trainer(*callbacks, logger=logger, **({"limit_val_batches": 0} | arguments))
    trainer.fit(module, data)
    return trainer, module


def scores_by_lm_eval(tasks: Path, names: list[str], state: dict[str, torch.Tensor], limit: int | None) -> dict:
    """What lm-eval's own entry point says of these weights."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from lightning_dsv3.evaluation.lm import DSV3LM

    module = tiny_module()
    module.load_state_dict(state)
    results = simple_evaluate(
        model=DSV3LM(model=module.model.eval(), tokenizer=load_tokenizer(300), device="cpu"),
        tasks=names,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
    )
    return results["results"]


def test_scores_are_lm_evals_of_the_weights_of_that_step(tasks):
    logger, copies = Recorder(), Copies()
    names = ["tiny_choice", "tiny_text", "tiny_generation"]
    callback = evaluator(tasks, names, limit=5, every_n_steps=2)
    fit(balance(), copies, callback, logger=logger, max_steps=3, log_every_n_steps=50)
    # Rows have the step of the losses of the same optimizer step, and the last step's come at the end of training.
    assert logger.steps == [1, 2]
    for step, scores in logger.rows:
        expected = scores_by_lm_eval(tasks, names, copies.of_step[step + 1], limit=5)
        assert scores == pytest.approx(
            {
                "eval/tiny_choice/acc": expected["tiny_choice"]["acc,none"],
                "eval/tiny_choice/acc_norm": expected["tiny_choice"]["acc_norm,none"],
                "eval/tiny_text/bits_per_byte": expected["tiny_text"]["bits_per_byte,none"],
                "eval/tiny_text/byte_perplexity": expected["tiny_text"]["byte_perplexity,none"],
                "eval/tiny_generation/exact_match/first": expected["tiny_generation"]["exact_match,first"],
                "eval/tiny_generation/exact_match/word": expected["tiny_generation"]["exact_match,word"],
            },
            rel=1e-6,
        )
    first, last = (scores["eval/tiny_text/bits_per_byte"] for _, scores in logger.rows)
    assert first != last
    assert callback.scores == logger.rows[-1][1]


def test_shots_are_drawn_as_lm_eval_does_each_time(tasks, monkeypatch):
    from lightning_dsv3.evaluation.lm import DSV3LM

    asked: list[list[str]] = []
    answer = DSV3LM.loglikelihood

    def note(self: Any, requests: Any, disable_tqdm: bool = False) -> Any:
        asked.append([request.args[0] for request in requests])
        return answer(self, requests, disable_tqdm)

    monkeypatch.setattr(DSV3LM, "loglikelihood", note)
    _, module = fit(evaluator(tasks, limit=5, every_n_steps=1), max_steps=2)
    scores_by_lm_eval(tasks, ["tiny_choice"], module.state_dict(), limit=5)
    first, second, lm_evals = asked
    assert first == second == lm_evals
    assert len({prompt.rpartition("The ")[0] for prompt in first}) > 1


@pytest.mark.parametrize("first", [True, False], ids=["before the balance", "behind the balance"])
def test_training_goes_on_as_if_nothing_had_been(tasks, first):
    # Generation draws from torch, shots from Python; the module's modes are mixed on purpose.
    def run(*evaluators: Any) -> tuple[Any, ...]:
        aux, states, module = balance(), RandomStates(), tiny_module()
        module.model.embedding.eval()
        monitor = ExpertLoadMonitor()
        others = [aux, states, monitor]
        callbacks = [*evaluators, *others] if first else [*others, *evaluators]
        modes = {}

        class Modes(L.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
                modes[trainer.global_step] = [m.training for m in pl_module.modules()]

        fit(*callbacks, Modes(), module=module, max_steps=4, limit_val_batches=2, val_check_interval=2)
        return module, aux, states, monitor, modes

    callback = evaluator(tasks, ["tiny_choice", "tiny_generation"], every_n_steps=1, at_validation_end=True)
    plain, evaluated = run(), run(callback)
    assert callback.scores
    assert_same(weights(plain[0]), weights(evaluated[0]))
    assert_same(biases(plain[0]), biases(evaluated[0]))
    assert any(bias.any() for bias in biases(plain[0]).values())
    assert plain[1].tokens_seen == evaluated[1].tokens_seen > 0
    assert plain[2].next == evaluated[2].next
    assert plain[3].loads == evaluated[3].loads is not None
    assert plain[4] == evaluated[4]
    assert {True, False} <= set(evaluated[4][2])


def test_gradients_of_an_open_accumulation_window_stay(tasks):
    def run(*evaluators: Any) -> Any:
        arguments = {"accumulate_grad_batches": 2, "max_steps": 2, "limit_val_batches": 1, "val_check_interval": 1}
        return fit(balance(), *evaluators, **arguments)[1]

    plain, evaluated = run(), run(evaluator(tasks, limit=2, at_validation_end=True))
    assert_same(weights(plain), weights(evaluated))
    assert_same(biases(plain), biases(evaluated))


class TestWhen:
    def test_every_n_steps_and_not_again_within_a_window_or_at_the_end(self, tasks):
        logger = Recorder()
        callback = evaluator(tasks, limit=1, every_n_steps=2)
        fit(callback, logger=logger, max_steps=4, accumulate_grad_batches=2)
        assert logger.steps == [1, 3]

    def test_at_the_end_of_validation_but_not_of_the_sanity_check(self, tasks):
        logger = Recorder()
        callback = evaluator(tasks, limit=1, at_validation_end=True, at_fit_end=False)
        arguments = {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 1}
        trainer, module = fit(callback, logger=logger, max_steps=4, **arguments)
        assert logger.steps == [1, 3]
        trainer.validate(module, tiny_data(), verbose=False)
        assert logger.steps == [1, 3]

    def test_a_resumed_run_goes_on(self, tasks, tmp_path):
        trainer, _ = fit(max_steps=2)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        logger = Recorder()
        resumed = quiet_trainer(
            evaluator(tasks, limit=1, every_n_steps=2, at_fit_end=False),
            logger=logger,
            max_steps=5,
            limit_val_batches=0,
        )
        resumed.fit(tiny_module(), tiny_data(), ckpt_path=tmp_path / "a.ckpt")
        assert logger.steps == [3]


def test_scores_reach_files_and_callbacks_that_monitor_them(tasks, tmp_path):
    keep = ModelCheckpoint(
        tmp_path / "kept", monitor="eval/tiny_text/bits_per_byte", every_n_train_steps=2, save_top_k=1
    )
    callback = evaluator(tasks, "tiny_text", every_n_steps=2)
    arguments = {"max_steps": 4, "enable_checkpointing": True, "log_every_n_steps": 50}
    trainer, _ = fit(callback, keep, logger=CSVLogger(tmp_path, name="logs", version=""), **arguments)
    assert float(keep.best_model_score) == pytest.approx(callback.scores["eval/tiny_text/bits_per_byte"])
    assert float(trainer.callback_metrics["eval/tiny_text/bits_per_byte"]) == pytest.approx(
        callback.scores["eval/tiny_text/bits_per_byte"]
    )
    header, *rows = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    assert {"eval/tiny_text/bits_per_byte", "step"} <= set(header.split(","))
    assert len(rows) == 2


def test_a_group_has_its_own_figures_or_those_of_its_members(tasks):
    callback = evaluator(tasks, "tiny_all", limit=3)
    fit(callback, max_steps=1)
    assert set(callback.scores) == {
        "eval/tiny_mean/acc", "eval/tiny_text/bits_per_byte", "eval/tiny_text/byte_perplexity",
    }  # fmt: skip


def test_only_one_line_is_printed(tasks, capfd, caplog):
    tiny_data().setup("fit")  # whose text may not have been tokenised yet
    capfd.readouterr()
    with caplog.at_level("INFO"):
        fit(evaluator(tasks, ["tiny_choice", "tiny_generation"], limit=2, every_n_steps=1), max_steps=1)
    out, err = capfd.readouterr()
    assert [line for line in (out + err).splitlines() if "it/s" in line or "%|" in line] == []
    assert [record for record in caplog.records if record.name.startswith("lm_eval")] == []
    (said,) = [record.getMessage() for record in caplog.records if "tiny_" in record.getMessage()]
    assert said.startswith("lm-eval at step 1 (")
    assert said.count("tiny_choice/acc ") == said.count("tiny_generation/exact_match/word ") == 1


def test_other_trainers_and_compiled_models(tasks):
    package = lightning_dsv3.pytorch_lightning
    callback = evaluator(tasks)
    fitted = tiny_module(package)
    trainer = quiet_trainer(callback, trainer_class=pytorch_lightning.Trainer, max_steps=1, limit_val_batches=0)
    trainer.fit(fitted, tiny_data(package))
    compiled = tiny_module()
    compiled.model = torch.compile(compiled.model, backend="eager")
    other = evaluator(tasks)
    fit(other, module=compiled, max_steps=1)
    assert set(callback.scores) == PLAIN_KEYS
    assert other.scores == callback.scores


def scores_on_ranks(tasks: Path, devices: int) -> tuple[dict[str, float], int]:
    """Scores of weights that do not move."""
    logger = Recorder()
    names = ["tiny_choice", "tiny_text", "tiny_generation"]
    callback = evaluator(tasks, names, every_n_steps=1)
    one = evaluator(tasks, "tiny_text", limit=1, every_n_steps=1)
    strategy = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    module = tiny_module(learning_rate=0.0)
    trainer = quiet_trainer(callback, one, logger=logger, max_steps=1, limit_val_batches=0, **strategy)
    trainer.fit(module, tiny_data())
    return callback.scores | {f"one/{key}": value for key, value in one.scores.items()}, len(logger.rows)


@pytest.mark.distributed
def test_two_ranks_give_the_scores_of_one(tasks):
    expected, rows = scores_on_ranks(tasks, 1)
    assert rows == 2
    (first, rows_of_first), (second, _) = run_on_ranks(2, scores_on_ranks, tasks, 2)
    assert first == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert second == first
    assert rows_of_first == rows


class TestDivision:
    """Each request is run once, on the rank where those that begin alike are."""

    def test_requests_are_dealt_out_by_their_beginnings_and_come_back_in_order(self, monkeypatch):
        from lm_eval.api.instance import Instance

        done: list[list[str]] = []

        class Echo:
            def loglikelihood(self, requests: Any, disable_tqdm: bool) -> list[str]:
                done.append([request.args[0] for request in requests])
                return [request.args[0] + request.args[1] for request in requests]

        asked = [Instance("loglikelihood", {}, (f"{i % 3}.", str(i)), i) for i in range(7)]
        parts: list[Any] = []
        for rank in range(3):
            lm = lm_eval_callback._DividedLM(Echo(), rank, 3)
            monkeypatch.setattr(lm_eval_callback.dist, "all_gather_object", lambda out, own: parts.append(own))
            with pytest.raises(TypeError):  # nothing has been gathered
                lm.loglikelihood(asked)
        assert sorted(beginning for part in done for beginning in part) == sorted(request.args[0] for request in asked)
        assert all(max(a) <= min(b) for a, b in pairwise(done))
        gathered = list(parts)
        monkeypatch.setattr(
            lm_eval_callback.dist, "all_gather_object", lambda out, own: out.__setitem__(slice(None), gathered)
        )
        assert lm_eval_callback._DividedLM(Echo(), 1, 3).loglikelihood(asked) == ["".join(r.args) for r in asked]


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tasks": []}, "tasks="),
            ({"limit": 0}, "limit=0"),
            ({"every_n_steps": 0}, "every_n_steps=0"),
            ({"at_fit_end": False}, "every_n_steps=None"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            LMEvalCallback(**({"tasks": "a"} | arguments))

    @pytest.mark.parametrize(
        ("names", "arguments", "message"),
        [
            ("tiny_code", {}, "tiny_code runs code"),
            ("tiny_long", {}, "tiny_long asks for 9999 new tokens"),
            ("tiny_choice", {"tokenizer": load_tokenizer(512)}, "512 ids and the model vocab_size=300"),
            ("tiny_choice", {"tokenizer": "not/there"}, "tokenizer='not/there'"),
            ("tiny_choice", {"include_path": "not/there"}, "include_path='not/there'"),
        ],
    )
    def test_before_the_first_step(self, tasks, names, arguments, message):
        callback, copies = LMEvalCallback(names, **({"include_path": tasks} | arguments)), Copies()
        with pytest.raises(MisconfigurationException, match=message):
            fit(callback, copies)
        assert not copies.of_step

    def test_no_such_task(self, tasks, monkeypatch):
        from lm_eval.tasks import TaskManager

        # Without lm-eval's own hundreds, which take seconds to index; that they are asked is in the record.
        asked = []
        original = TaskManager.__init__
        monkeypatch.setattr(
            TaskManager,
            "__init__",
            lambda self, *a, include_defaults=True, **k: (
                asked.append(include_defaults),
                original(self, *a, include_defaults=False, **k),
            )[1],
        )
        with pytest.raises(MisconfigurationException, match="no 'tiny_choise'; did you mean 'tiny_choice'"):
            fit(evaluator(tasks, "tiny_choise"))
        assert asked == [False, True]
        asked.clear()
        fit(evaluator(tasks, "tiny_all", limit=1), max_steps=1)
        assert asked == [False]

    def test_no_lm_eval(self, tasks, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(MisconfigurationException, match=r"lightning-dsv3\[eval\]"):
            fit(evaluator(tasks))

    def test_no_tokenizer_and_no_model(self, tasks):
        data = tiny_data()
        data.setup("fit")
        loader = data.train_dataloader()
        with pytest.raises(MisconfigurationException, match="no tokenizer"):
            quiet_trainer(evaluator(tasks)).fit(tiny_module(), loader)

        class Other(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(1, 1)

            def training_step(self, *_: Any) -> None:
                return None

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=1.0)

        with pytest.raises(MisconfigurationException, match="no DeepSeekV3 in Other"):
            quiet_trainer(evaluator(tasks, tokenizer=load_tokenizer(300))).fit(Other(), loader)

    def test_sharded_weights(self, tasks):
        class Trainer:
            strategy = FSDPStrategy()

        with pytest.raises(
            MisconfigurationException, match=r"FSDPStrategy shards it.*: dsv3 eval .* --tasks tiny_choice$"
        ):
            evaluator(tasks).setup(Trainer(), tiny_module(), "fit")


def test_lm_eval_is_imported_only_where_it_is_used():
    tree = ast.parse(Path(lm_eval_callback.__file__).read_text(encoding="utf-8"))
    imported = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert "lightning_dsv3.model" in imported
    assert not [name for name in imported if name.startswith(("lm_eval", "lightning_dsv3.evaluation"))]


def test_a_path_will_do_for_a_tokenizer(tasks, tmp_path):
    load_tokenizer(300).save(str(tmp_path / "tokenizer.json"))
    by_data, by_path = evaluator(tasks), evaluator(tasks, tokenizer=tmp_path)
    fit(AuxFreeBalanceCallback(), by_data, by_path, max_steps=1)
    assert by_path.scores == by_data.scores != {}
