"""The evaluation callback without arguments, what it says, and the throughput beside it."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny_run import LENGTH

from lightning_dsv3.callbacks import LMEvalCallback, RunFolder, run_folder
from lightning_dsv3.callbacks import lm_eval as lm_eval_callback
from lightning_dsv3.config import RunConfig

pytest.importorskip("lm_eval")
import choice_records
from choice_runs import write_rows
from test_lm_eval_callback import Copies, Recorder, evaluator, fit
from tiny_tasks import write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


class TestDefaults:
    """Without arguments: what tells the progress of a small model, where its data are at hand."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("LIGHTNING_DSV3_DATA", str(tmp_path))
        return tmp_path

    def test_tasks_whose_data_are_there_run_and_the_others_are_named(self, folder, monkeypatch, recwarn):
        from lightning_dsv3.evaluation.lm import DSV3LM

        write_rows(folder / "c3" / "c3-m-dev.json", choice_records.C3)
        write_rows(folder / "arc" / "arc_easy.test.jsonl", choice_records.ARC["test"])
        for split, rows in (("test", choice_records.MMLU_TEST), ("dev", choice_records.MMLU_DEV)):
            own = [row for row in rows if row["subject"] == "virology"]
            write_rows(folder / "mmlu" / split / f"virology_{split}.jsonl", own)
        asked: list[str] = []
        answer = DSV3LM.loglikelihood
        monkeypatch.setattr(
            DSV3LM, "loglikelihood", lambda self, r, **k: (asked.extend(x.args[0] for x in r), answer(self, r, **k))[1]
        )
        logger, callback = Recorder(), LMEvalCallback()
        fit(callback, logger=logger, max_steps=2)
        assert logger.rows == [(1, callback.scores)]
        names = {"mmlu", "arc_easy", "c3"}
        assert {key.split("/")[1] for key in callback.scores} == {f"dsv3_{name}_cloze" for name in names}
        assert {f"eval/dsv3_{name}_cloze/bpb" for name in names} < set(callback.scores)
        assert max(prompt.count("Answer:") for prompt in asked) == 1  # no shots
        warned = [str(warning.message) for warning in recwarn.list]
        (absent,) = [text for text in warned if text.startswith("dsv3_small: 3 of 6 tasks are absent")]
        for name, file in (("arc_challenge", "arc_challenge.test"), ("cmmlu", "test/"), ("ceval", "val/")):
            assert f"dsv3_{name}_cloze: no file {folder}/{name.partition('_')[0]}/{file}" in absent
        assert [text for text in warned if text.startswith("dsv3_mmlu: 56 of 57 subsets are absent")]

    def test_no_data_is_an_error_that_says_where_they_would_be(self, folder, monkeypatch, tmp_path):
        copies = Copies()
        with pytest.raises(MisconfigurationException, match=r"^tasks: dsv3_small: none (.|\n)*LIGHTNING_DSV3_DATA"):
            fit(LMEvalCallback(), copies)
        monkeypatch.delenv("LIGHTNING_DSV3_DATA")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        with pytest.raises(MisconfigurationException, match=r"hub: cais/mmlu (.|\n)*LIGHTNING_DSV3_DATA"):
            fit(LMEvalCallback(), copies)
        monkeypatch.setenv("LIGHTNING_DSV3_DATA", "not/there")
        with pytest.raises(MisconfigurationException, match="LIGHTNING_DSV3_DATA=not/there"):
            fit(LMEvalCallback(), copies)
        assert not copies.of_step

    def test_lm_evals_own_hundreds_are_not_read(self, folder, monkeypatch):
        from lm_eval.tasks import TaskManager

        write_rows(folder / "c3" / "c3-m-dev.json", choice_records.C3)
        asked = []
        original = TaskManager.__init__
        monkeypatch.setattr(
            TaskManager, "__init__", lambda self, *a, **k: (asked.append(k), original(self, *a, **k))[1]
        )
        fit(LMEvalCallback(limit=1), max_steps=1)
        assert [given["include_defaults"] for given in asked] == [False]


def test_what_this_package_warns_of_while_it_evaluates_is_said_once(tasks, caplog):
    with pytest.warns(UserWarning, match="beginning") as caught:
        fit(evaluator(tasks, max_length=8, every_n_steps=1), max_steps=2)
    (said,) = [str(one.message) for one in caught if "beginning: max_length=8" in str(one.message)]
    assert said.count("lost") == 1
    assert not [record for record in caplog.records if "beginning" in record.getMessage()]
    assert logging.getLogger("lightning_dsv3").propagate


@pytest.mark.parametrize("first", [True, False], ids=["before the run folder", "behind the run folder"])
def test_throughput_leaves_evaluations_out(tasks, tmp_path, monkeypatch, first):
    from lightning_dsv3.evaluation.lm import DSV3LM

    now = [0.0]
    clock = SimpleNamespace(strftime=run_folder.time.strftime, monotonic=lambda: now[0])
    for module in (run_folder, lm_eval_callback):
        monkeypatch.setattr(module, "time", clock)
    answer = DSV3LM.loglikelihood

    def slow(self: Any, *a: Any, **k: Any) -> Any:
        now[0] += 1000
        return answer(self, *a, **k)

    monkeypatch.setattr(DSV3LM, "loglikelihood", slow)

    class Second(L.Callback):
        """A step takes one, a validation ten."""

        def on_train_batch_start(self, *_: Any) -> None:
            now[0] += 1

        def on_validation_batch_end(self, *_: Any) -> None:
            now[0] += 10

    run = RunFolder(RunConfig(runs_dir=str(tmp_path)))
    callback = evaluator(tasks, limit=1, every_n_steps=1, at_validation_end=True)
    ordered = [callback, run] if first else [run, callback]
    logger = Recorder("train/tokens_per_second")
    fit(*ordered, Second(), logger=logger, max_steps=4, limit_val_batches=1, val_check_interval=2)
    assert callback.seconds == 4000
    assert [rates for _, rates in logger.rows] == [{"train/tokens_per_second": 4 * LENGTH}] * 4
