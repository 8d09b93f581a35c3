"""lm-eval's requests divided among ranks: results are those of one, and what a launcher leaves out is said."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from ranks import run_on_ranks
from saved_models import save_sharded, trained_run
from tiny_tasks import write_tasks

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

from lightning_dsv3.config import ConfigError  # noqa: E402
from lightning_dsv3.evaluation.lm import DSV3LM  # noqa: E402

TASKS = ["tiny_choice", "tiny_text", "tiny_generation"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path, _ = trained_run(folder, max_position_embeddings=256)
    write_tasks(folder)
    return path


def evaluate(checkpoint, limit):
    """Each rank's own number of passes, and on rank 0 the results."""
    lm = DSV3LM(checkpoint=checkpoint, device="cuda:0", batch_size=4)
    result = lm_eval.simple_evaluate(
        lm,
        tasks=TASKS,
        limit=limit,
        num_fewshot=0,  # lm-eval draws shots from one stream a rank
        task_manager=TaskManager(include_path=str(checkpoint.parent), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = result and {
        task: sorted((s["doc_id"], s["doc"]["question"], s["filtered_resps"]) for s in made if s["filter"] != "word")
        for task, made in result["samples"].items()
    }
    return lm.rank, lm.world_size, result and result["results"], samples


def test_two_ranks_with_unequal_numbers_of_requests_say_what_one_says(run):
    rank, world_size, alone, samples = evaluate(run, 5)
    assert (rank, world_size) == (0, 1)
    first, second = run_on_ranks(2, evaluate, run, 5)
    assert (first[:2], second[:2]) == ((0, 2), (1, 2))
    assert second[2] is None
    for task in TASKS:
        for name, value in alone[task].items():
            if isinstance(value, float):
                assert first[2][task][name] == pytest.approx(value, abs=1e-4), (task, name)
        assert len(first[3][task]) == len(samples[task]) == 5
        for (*mine, made), (*one, expected) in zip(first[3][task], samples[task], strict=True):
            assert mine == one
            for a, b in zip(made, expected, strict=True):
                assert (a == b) if isinstance(b, str) else a == pytest.approx(b, abs=1e-4)


@pytest.mark.slow
def test_torchrun_starts_the_plain_command(run, tmp_path):
    words = ["--model", "dsv3", "--model_args", f"checkpoint={run}", "--tasks", "tiny_choice", "--limit", "3"]
    more = ["--include_path", str(run.parent), "--output_path", str(tmp_path), "--batch_size", "auto", "--log_samples"]
    program = (
        "import sys, lm_eval.tasks.manager as m, lm_eval._cli.harness as h\n"
        # The index of lm-eval's own tasks takes many seconds.
        "init = m.TaskManager.__init__\n"
        "m.TaskManager.__init__ = lambda self, *a, **k: init(self, *a, **{**k, 'include_defaults': False})\n"
        "h.HarnessCLI().execute(h.HarnessCLI().parse_args())\n"
    )
    (tmp_path / "run.py").write_text(program)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(
        [*launch, str(tmp_path / "run.py"), "run", *words, *more], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["n-samples"]["tiny_choice"]["effective"] == 3
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3


def test_a_sharded_checkpoint_says_what_the_whole_one_says(run, tmp_path):
    last = next((run / "checkpoints").glob("*.ckpt"))
    sharded = save_sharded(last, tmp_path / "checkpoints" / "last.ckpt", "state_dict")
    assert sharded.is_dir()
    (tmp_path / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    whole, parts = (DSV3LM(checkpoint=path, device="cpu") for path in (run, sharded))
    assert parts.get_model_info()["dsv3_model_info"]["name"].endswith("last.ckpt")
    pairs = [(("", ""), [3, 4, 5], [6, 7]), (("", ""), [3, 4, 5], [8])]
    assert parts._loglikelihood_tokens(pairs, disable_tqdm=True) == whole._loglikelihood_tokens(
        pairs, disable_tqdm=True
    )


class TestLaunchers:
    def test_ranks_that_cannot_find_each_other_are_one_clear_error(self, run, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", "1")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(
            ConfigError, match=r"WORLD_SIZE=4 .*not MASTER_ADDR, MASTER_PORT: .*torchrun.*unset WORLD_SIZE"
        ):
            DSV3LM(checkpoint=run)
        monkeypatch.setenv("WORLD_SIZE", "many")
        with pytest.raises(ConfigError, match="WORLD_SIZE=many: must be a whole number"):
            DSV3LM(checkpoint=run)

    @pytest.mark.parametrize("world_size", ["", "1"])
    def test_a_launcher_of_one_process_is_none(self, run, monkeypatch, world_size):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        assert DSV3LM(checkpoint=run, device="cpu").world_size == 1

    def test_each_rank_takes_the_gpu_of_its_number(self, monkeypatch):
        from lightning_dsv3.evaluation.lm_options import chosen_device

        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert chosen_device("cuda:0", 4) == torch.device("cuda:1")
        assert chosen_device("cuda:0", 1) == torch.device("cuda:0")
        assert chosen_device("cpu", 4) == torch.device("cpu")
        monkeypatch.setenv("LOCAL_RANK", "2")
        with pytest.raises(ConfigError, match="LOCAL_RANK=2: this machine has 2 GPUs"):
            chosen_device("cuda", 4)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        assert chosen_device("cuda:0", 4) == torch.device("cpu")
