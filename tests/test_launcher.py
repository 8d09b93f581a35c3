"""`lightning run model`: its command line, its processes and how it ends."""

import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_wheel

from lightning_dsv3.cli import launcher
from lightning_dsv3.cli.launch_environment import launcher_trainer_arguments
from lightning_dsv3.cli.launch_options import LaunchError, parse_launch_options
from lightning_dsv3.cli.launch_processes import _choose_port, _resolve_devices

# A script that says what it was given, then does what `mode=` asks for.
SCRIPT = """
import os, signal, sys, time
def say(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())  # one write, so that lines do not mix
mode = next((word[5:] for word in sys.argv if word.startswith("mode=")), "")
rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
lt = {name: value for name, value in sorted(os.environ.items()) if name.startswith("LT_")}
say("rank", rank, "of", size, sys.argv[1:], lt)
if mode == "fail" and rank == "1":
    raise RuntimeError("a mistake in the script")
if mode == "seven":
    sys.exit(7)
if mode in ("wait", "hang", "fail"):
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        say("waiting", rank)
        time.sleep(60)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        say("saving", rank, os.getpid())
        time.sleep(60 if mode == "hang" else 0.5)
        say("saved", rank)
        sys.exit(1)
if mode == "gloo":
    import torch
    torch.distributed.init_process_group("gloo")
    total = torch.tensor([float(rank) + 1])
    torch.distributed.all_reduce(total)
    say("sum", total.item())
    torch.distributed.destroy_process_group()
"""

TRAINER_SCRIPT = """
import os
import lightning, torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_dsv3.cli.launch_environment import launcher_trainer_arguments
trainer = lightning.Trainer(**launcher_trainer_arguments(), max_steps=2, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(BoringModel())
os.write(1, f"trained on rank {trainer.global_rank} of {trainer.world_size} {trainer.precision}\\n".encode())
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "work.py"
    path.write_text(SCRIPT)
    return path


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "lightning_dsv3", "run", "model", *map(str, words)]


def run(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=120, cwd=cwd)


class TestCommandLine:
    @pytest.mark.parametrize("words", ["--devices 2 SCRIPT", "SCRIPT --devices=2", "--devices=2 SCRIPT"])
    def test_options_may_stand_before_or_after_the_script(self, script, words):
        words = [str(script) if word == "SCRIPT" else word for word in words.split()]
        options = parse_launch_options([*words, "model=tiny"])
        assert (options.script, options.devices, options.script_arguments) == (script, "2", ("model=tiny",))

    def test_key_value_may_stand_anywhere_and_keeps_its_order(self, script):
        options = parse_launch_options(["a=1", str(script), "b.c=[1, 2]", "--num_nodes=1", "d="])
        assert options.script_arguments == ("a=1", "b.c=[1, 2]", "d=")

    def test_trainer_keys_become_launcher_options(self, script):
        words = [
            "trainer.devices=[0, 1]",
            "trainer.accelerator=cpu",
            "trainer.strategy=fsdp",
            "trainer.max_steps=3",
        ]
        options = parse_launch_options([str(script), *words, "trainer.precision=bf16-true", "trainer.num_nodes=1"])
        assert (options.devices, options.accelerator, options.strategy) == ("0,1", "cpu", "fsdp")
        assert options.precision == "bf16-true"
        assert options.script_arguments == ("trainer.max_steps=3",)

    def test_the_same_value_twice_is_no_conflict(self, script):
        options = parse_launch_options([str(script), "--devices", "0,1", "trainer.devices=[0,1]"])
        assert options.devices == "0,1"

    def test_null_leaves_the_choice_open(self, script):
        assert parse_launch_options([str(script), "trainer.strategy=null"]).strategy is None

    @pytest.mark.parametrize(
        "strategy",
        ["fsdp", "ddp_find_unused_parameters_true", "deepspeed_stage_3_offload", "my_own_strategy"],
    )
    def test_strategies_that_the_trainer_may_know_are_passed_on(self, script, strategy):
        assert parse_launch_options([str(script), "--strategy", strategy]).strategy == strategy

    def test_unknown_options_after_the_script_belong_to_it(self, script):
        options = parse_launch_options([str(script), "--epochs", "3", "--", "--devices", "9", "trainer.devices=9"])
        assert options.script_arguments == ("--epochs", "3", "--devices", "9", "trainer.devices=9")
        assert options.devices == "1"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--devices", "3", "trainer.devices=2"], r"'--devices 3' and 'trainer.devices=2' contradict"),
            (["--precision=32", "--precision=16"], "contradict"),
            (["--device", "2"], r"unknown launcher option '--device'. Did you mean --devices\?"),
            (["--devices"], "--devices needs a value"),
            (["--devices", "--precision=32"], "--devices needs a value"),
            (["trainer.devices="], "has no value"),
            (["--devices", "two"], "'two' is not understood"),
            (["--devices", "0"], "'0' is not understood"),
            (["--accelerator", "cpus"], "unknown; choose one of: auto, cpu, cuda"),
            (["--accelerator", "tpu"], "tpu cannot be started"),
            (["--strategy", "ddp_spawn"], "Use --strategy ddp"),
            (
                ["--strategy", "ddp_fork_find_unused_parameters_true"],
                "Use --strategy ddp_find_unused_parameters_true",
            ),
            (["--num-nodes", "x"], "not a whole number"),
            (["--num-nodes", "0"], "must be 1 or more"),
            (["--num-nodes", "2"], "needs --main-address"),
            (["--num-nodes", "2", "--node-rank", "2", "--main-address", "a"], "the ranks are 0 to 1"),
            (["--main-port", "70000"], "must be 1 to 65535"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_cannot_be_run_is_one_clear_error(self, script, words, message):
        with pytest.raises(LaunchError, match=message):
            parse_launch_options([str(script), *words])

    def test_an_unknown_option_before_the_script_is_an_error(self, script):
        with pytest.raises(LaunchError, match="'--epochs'"):
            parse_launch_options(["--epochs", "3", str(script)])


class TestMissingScript:
    def test_a_misspelled_script_names_the_one_meant(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "examples").mkdir()
        (tmp_path / "examples" / "train.py").touch()
        monkeypatch.chdir(tmp_path)
        for misspelled in ("examples/trian.py", "train", "exmples/train.py"):
            assert launcher.main(["run", "model", misspelled]) == 2
            message = capsys.readouterr().err
            assert "Did you mean examples/train.py?" in message
            assert "usage: lightning run model" in message

    def test_a_folder_names_the_scripts_in_it(self, tmp_path, capsys):
        (tmp_path / "one.py").touch()
        assert launcher.main(["run", "model", str(tmp_path)]) == 2
        assert f"is a folder, not a script. Did you mean {tmp_path / 'one.py'}?" in capsys.readouterr().err

    def test_no_script_at_all(self, capsys):
        assert launcher.main(["run", "model", "model=tiny"]) == 2
        assert "no script was given" in capsys.readouterr().err

    def test_the_module_says_the_same(self, tmp_path):
        result = run("nothing.py", cwd=tmp_path)
        assert result.returncode == 2
        assert "there is no file 'nothing.py'" in result.stderr
        assert "Traceback" not in result.stderr


class TestHelp:
    def test_help_teaches_without_loading_torch(self):
        program = "import sys; from lightning_dsv3.cli.launcher import main; main(['run', 'model', '--help']);"
        program += "print('torch' in sys.modules)"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        *text, loaded = result.stdout.splitlines()
        assert loaded == "False"
        for word in ("usage:", "examples:", "key=value", "--main-port", "Ctrl-C"):
            assert word in "\n".join(text)

    def test_every_option_is_in_the_help(self):
        from lightning_dsv3.cli.launch_options import _OPTIONS

        assert [option for option in _OPTIONS if option not in launcher._HELP] == []

    def test_examples_in_the_help_parse(self, monkeypatch):
        (ROOT / "examples" / "train.py").stat()
        monkeypatch.chdir(ROOT)
        examples = re.findall(r"^  lightning run model (.*)$", launcher._HELP, re.M)
        assert len(examples) >= 4
        for example in examples:
            parse_launch_options(example.split())


class TestOtherCommands:
    """Whatever is not `run model` reaches lightning_sdk or fabric."""

    @pytest.fixture
    def seen(self, monkeypatch):
        import lightning.fabric.cli

        seen = []
        monkeypatch.setattr(lightning.fabric.cli, "_main", lambda: seen.append(("fabric", sys.argv)))
        monkeypatch.setattr(sys, "argv", ["lightning"])
        return seen

    def test_fabric_without_lightning_sdk(self, monkeypatch, seen):
        def missing(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "distribution", missing)
        assert launcher.main(["consolidate", "folder"]) == 0
        assert seen == [("fabric", ["lightning", "consolidate", "folder"])]

    @pytest.mark.parametrize(
        ("words", "expected"), [(["login"], "sdk"), (["run", "job"], "sdk"), (["run", "train.py"], "fabric")]
    )
    def test_lightning_sdk_is_preferred_except_for_fabric_scripts(self, monkeypatch, seen, words, expected):
        class Script:
            group, name = "console_scripts", "lightning"

            def load(self):
                return lambda: seen.append(("sdk", sys.argv))

        class Distribution:
            entry_points = (Script(),)

        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
        launcher.main(words)
        assert seen == [(expected, ["lightning", *words])]

    def test_a_broken_lightning_sdk_is_said(self, monkeypatch, seen):
        class Script:
            group, name = "console_scripts", "lightning"

            def load(self):
                raise ImportError("No module named 'docker'")

        class Distribution:
            entry_points = (Script(),)

        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
        with pytest.raises(SystemExit, match="cannot be imported: No module named 'docker'"):
            launcher.main(["login"])

    @pytest.mark.parametrize("order", ["ours last", "theirs last"])
    def test_beside_lightning_sdk_in_either_order(self, order, tree_wheel, new_environment, tmp_path):
        source = "import sys\ndef main_cli():\n    print('lightning_sdk got', sys.argv[1:])\n"
        files = {"lightning_sdk/__init__.py": "", "lightning_sdk/entry.py": source}
        sdk_wheel = write_wheel(tmp_path, "lightning_sdk", files, {"lightning": "lightning_sdk.entry:main_cli"})
        environment = new_environment()
        for wheel in [sdk_wheel, tree_wheel] if order == "ours last" else [tree_wheel, sdk_wheel]:
            environment.install(wheel)

        script = environment.bin / "lightning"
        module = environment.run(environment.python, "-m", "lightning_dsv3", "run", "model", "--help")
        assert "usage: lightning run model" in module.stdout
        other = environment.run(script, "login", "now")
        assert other.stdout.strip() == "lightning_sdk got ['login', 'now']"
        assert other.returncode == 0
        own = environment.run(script, "run", "model", "--help")
        assert ("usage: lightning run model" in own.stdout) == (order == "ours last")


class TestEnvironmentOfTheScript:
    def test_values_of_the_launcher_are_trainer_arguments(self):
        environ = {
            "LT_CLI_USED": "1",
            "LT_ACCELERATOR": "cuda",
            "LT_STRATEGY": "fsdp",
            "LT_DEVICES": "0,1",
            "LT_NUM_NODES": "2",
            "LT_PRECISION": "bf16-mixed",
        }
        assert launcher_trainer_arguments(environ) == {
            "accelerator": "cuda",
            "strategy": "fsdp",
            "devices": "0,1",
            "num_nodes": 2,
            "precision": "bf16-mixed",
        }

    def test_nothing_without_the_launcher(self):
        assert launcher_trainer_arguments({"LT_DEVICES": "4"}) == {}
        assert launcher_trainer_arguments() == {}


class TestDevicesAndPorts:
    def test_auto_is_one_process_on_a_cpu(self, script):
        options = parse_launch_options([str(script), "--devices", "auto", "--accelerator", "cpu"])
        assert _resolve_devices(options) == ("1", 1)

    def test_more_devices_than_there_are_is_one_line(self, script):
        options = parse_launch_options([str(script), "--devices", "99,100", "--accelerator", "cuda"])
        with pytest.raises(LaunchError, match="--devices 99,100 --accelerator cuda cannot be had here"):
            _resolve_devices(options)

    def test_a_busy_port_is_refused_and_a_free_one_found(self, script):
        with socket.socket() as other:
            other.bind(("", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(LaunchError, match=f"--main-port {port} is in use"):
                _choose_port(parse_launch_options([str(script), f"--main-port={port}"]))
            assert _choose_port(parse_launch_options([str(script)])) != port

    def test_several_nodes_meet_at_the_usual_port(self, script):
        words = [str(script), "--num-nodes=2", "--main-address=10.0.0.1", "--node-rank=1"]
        assert _choose_port(parse_launch_options(words)) == 29400


@pytest.mark.distributed
class TestProcesses:
    def test_two_processes_on_a_cpu_meet(self, script):
        result = run("--devices", "2", "--accelerator", "cpu", script, "mode=gloo", "trainer.precision=fp8-block")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("sum 3.0") == 2
        assert "rank 1 of 2 ['mode=gloo']" in result.stdout
        lt = re.search(r"rank 0 of 2 .*?(\{.*\})", result.stdout)
        assert lt
        assert lt[1] == str(
            {
                "LT_ACCELERATOR": "cpu",
                "LT_CLI_USED": "1",
                "LT_DEVICES": "2",
                "LT_NUM_NODES": "1",
                "LT_PRECISION": "fp8-block",
            }
        )

    def test_a_trainer_takes_the_launcher_s_values(self, tmp_path):
        script = tmp_path / "fit.py"
        script.write_text(TRAINER_SCRIPT)
        result = run(script, "trainer.devices=2", "trainer.accelerator=cpu", "trainer.precision=64-true")
        assert result.returncode == 0, result.stderr
        assert "trained on rank 0 of 2 64-true" in result.stdout
        assert "trained on rank 1 of 2 64-true" in result.stdout

    def test_a_failing_script_shows_its_own_traceback_and_one_line(self, script):
        result = run("--devices=2", "--accelerator=cpu", script, "mode=fail")
        assert result.returncode == 1
        assert result.stderr.count("Traceback") == 1
        assert "RuntimeError: a mistake in the script" in result.stderr
        assert result.stderr.splitlines()[-1] == f"lightning run model: {script} (rank 1) failed with exit code 1."

    def test_the_exit_code_is_the_script_s(self, script):
        result = run(script, "--accelerator=cpu", "mode=seven")
        assert result.returncode == 7
        assert result.stderr == f"lightning run model: {script} failed with exit code 7.\n"


class Interrupted:
    """A launcher that runs with two processes, and the signals sent to it as a terminal would."""

    def __init__(self, script: Path, mode: str) -> None:
        words = command("--devices=2", "--accelerator=cpu", script, f"mode={mode}")
        self.process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A test runner in the background may ignore Ctrl-C, and would hand that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.output = ""

    def read_until(self, word: str, times: int) -> None:
        for line in self.process.stdout:
            self.output += line
            if self.output.count(word) >= times:
                return
        raise AssertionError(f"ended before {word!r}: {self.output}")

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        try:
            self.output += self.process.communicate(timeout=60)[0]
        finally:
            self.process.kill()
        return self.process.returncode


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.distributed
class TestSignals:
    def test_ctrl_c_lets_the_script_save_and_exits_130(self, script):
        run = Interrupted(script, "wait")
        run.read_until("waiting", times=2)
        run.send(signal.SIGINT)
        assert run.end() == 130
        assert run.output.count("saved") == 2
        assert run.output.count("waiting for the script to save") == 1
        assert "Traceback" not in run.output

    def test_a_second_ctrl_c_ends_it_at_once(self, script):
        run = Interrupted(script, "hang")
        run.read_until("waiting", times=2)
        run.send(signal.SIGINT)
        run.read_until("saving", times=2)
        run.send(signal.SIGINT)
        start = time.monotonic()
        assert run.end() == 130
        assert time.monotonic() - start < 20
        assert "saved 0" not in run.output
        assert "Traceback" not in run.output
        pids = [int(pid) for pid in re.findall(r"^saving \d (\d+)$", run.output, re.M)]
        assert len(pids) == 2
        assert not any(is_running(pid) for pid in pids)

    def test_sigterm_reaches_the_script_and_exits_143(self, script):
        run = Interrupted(script, "wait")
        run.read_until("waiting", times=2)
        run.send(signal.SIGTERM)
        assert run.end() == 143
        assert "Traceback" not in run.output

    def test_ctrl_c_while_starting_is_quiet(self, script):
        run = Interrupted(script, "wait")
        time.sleep(2.0)  # in the middle of importing torch
        run.send(signal.SIGINT)
        assert run.end() == 130
        assert "Traceback" not in run.output
