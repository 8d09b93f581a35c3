"""The main job end to end, through the launcher: run folder, resume, two processes, Ctrl-C. No network."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SMALL = [
    "data.offline=true", "data.val_windows=2", "model.vocab_size=512", "model.hidden_size=32",
    "model.intermediate_size=48", "model.moe_intermediate_size=16", "model.num_hidden_layers=2",
    "model.num_attention_heads=2", "model.n_routed_experts=8", "model.q_lora_rank=16", "model.kv_lora_rank=16",
    "train.sequence_length=32", "train.batch_size=4", "train.validate_every_steps=3", "trainer.log_every_n_steps=1",
]  # fmt: skip
FILES = [
    "config.yaml", "tokenizer.json", "metrics.csv", "loads.json", "summary.json", "checkpoints/last.ckpt",
    "figures/loss.png", "figures/bits_per_byte.png", "figures/max_violation.png", "figures/expert_load.png",
]  # fmt: skip


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of every run; they share the tests' cache of tokenised text."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "lightning_dsv3", "run", "model", str(ROOT / "examples" / "train.py"), *SMALL, *words]


def train(folder: Path, environment: dict[str, str], *words: str) -> tuple[Path, str]:
    """Run the example in ``folder``; return its newest run folder and what it printed."""
    done = subprocess.run(
        command(*words), cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime), done.stdout + done.stderr


def checkpoint(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def losses(run: Path) -> list[str]:
    return [row["train/loss"] for row in rows(run) if row["train/loss"]]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> tuple[Path, str]:
    return train(tmp_path_factory.mktemp("whole"), environment, "trainer.max_steps=6")


def test_run_leaves_a_whole_folder_and_a_closing_table(whole_run: tuple[Path, str]) -> None:
    run, printed = whole_run
    assert [name for name in FILES if not (run / name).is_file()] == []
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]
    for words in ("held-out bits per byte", "gzip", "MaxVio", "activated", "tokens/s", "next:", "resume="):
        assert words in printed, printed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["tokens"] == 6 * 4 * 32
    for domain in ("code", "math"):
        values = summary["bits_per_byte"][domain]
        assert 1 < values["model"] < 12
        assert values["xz"] > 1  # a few hundred bytes do not compress well
        assert values["gzip"] > 1
    assert summary["max_violation"]["training_batch_end"] > 0
    loads = json.loads((run / "loads.json").read_text())
    assert loads["format"] == 1
    assert loads["layers"] == ["layer_1", "mtp_1"]
    for domain in loads["domains"]:
        assert all(sum(layer) == loads["tokens"][domain] * 4 for layer in loads["counts"][domain][:1])


def test_run_names_the_domain_that_cannot_be_had_offline(whole_run: tuple[Path, str]) -> None:
    assert "chinese" in whole_run[1]


def test_checkpoint_is_plain(whole_run: tuple[Path, str]) -> None:
    state = checkpoint(whole_run[0])
    assert state["tokens_seen"] == 6 * 4 * 32
    assert state["hyper_parameters"]["config"]["hidden_size"] == 32


def test_resume_continues_the_curve_bit_for_bit(
    whole_run: tuple[Path, str], tmp_path: Path, environment: dict[str, str]
) -> None:
    run, _ = train(tmp_path, environment, "trainer.max_steps=4")
    assert checkpoint(run)["global_step"] == 4
    resumed, _ = train(tmp_path, environment, f"resume={run}", "trainer.max_steps=6")
    assert resumed == run
    assert "resume: null" in (run / "config.yaml").read_text()
    assert losses(resumed) == losses(whole_run[0])
    one, other = checkpoint(whole_run[0])["state_dict"], checkpoint(resumed)["state_dict"]
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_batch_rises_and_the_run_ends_where_its_tokens_are_reached(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    # 500 tokens of ramp, 16 sequences: four steps of 2, three of 3, then steps of 4 up to 1,000 tokens.
    ramp = "train.schedule.batch_ramp={start: 2, until: 7.4e+12, increment: 1}"
    run, _ = train(tmp_path, environment, "train.total_tokens=1000", ramp)
    sequences = [2] * 4 + [3] * 3 + [4] * 4
    seen = [float(row["train/tokens"]) for row in rows(run) if row["train/tokens"]]
    assert seen == [32 * sum(sequences[: step + 1]) for step in range(11)]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (11, 1056)


def test_two_processes_have_the_biases_and_curve_of_one(
    whole_run: tuple[Path, str], tmp_path: Path, environment: dict[str, str]
) -> None:
    run, printed = train(tmp_path, environment, "--devices", "2", "--accelerator", "cpu", "trainer.max_steps=6")
    assert printed.count("held-out bits per byte") == 1
    one, two = checkpoint(whole_run[0]), checkpoint(run)
    assert two["tokens_seen"] == one["tokens_seen"]
    biases = [name for name in one["state_dict"] if name.endswith("router.bias")]
    assert len(biases) == 2
    for name in biases:
        assert torch.equal(one["state_dict"][name], two["state_dict"][name]), name
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], tensor, rtol=1e-3, atol=2e-3, msg=name)


def test_ctrl_c_saves_and_exits_130_without_traceback(tmp_path: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        command("trainer.max_steps=100000", "train.validate_every_steps=50000"),
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/metrics.csv")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed, printed
    assert "held-out bits per byte" in printed
    (run,) = (tmp_path / "runs").iterdir()
    assert [name for name in FILES if not (run / name).is_file()] == []
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped_by"] == "SIGINT"
    assert checkpoint(run)["global_step"] == summary["steps"] > 0


def test_bad_word_is_one_line_without_traceback(tmp_path: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command("model.n_group=3"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "model.n_group=3" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
