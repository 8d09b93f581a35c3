"""The limits of the sandbox of model-written code, and a set of hostile programs.

The hostile programs are bounded, so that none does harm should a limit fail: at most 40 forks that end by themselves,
1.5 times a lowered memory limit, 3 MB of output, and writing outside only to a folder of the test. Where a limit does
not hold on a system, `Executor.limits_in_force` has to say so.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from conftest import ROOT

from lightning_dsv3.evaluation import execution
from lightning_dsv3.evaluation.execution import Executor, Limits, Outcome, Program, SandboxError

MIB = 1 << 20
LIMITS = Limits(seconds=5, memory=256 * MIB, output=MIB, file_size=MIB)
EXECUTOR = Executor(confirmed=True, limits=LIMITS)
# The sandbox as it is where the system refuses namespaces, and where there is nothing but what every Unix has.
REFUSED = "import _sandbox_linux; _sandbox_linux.enter_namespaces = lambda *_: (_ for _ in ()).throw(OSError(1, 'no'))"
DEGRADED = {
    "all there is": "",
    "no namespaces": f"import _sandbox_runner; {REFUSED}; ",
    "plain Unix": "import _sandbox_runner; _sandbox_runner.linux = None; ",
}


@pytest.fixture(autouse=True)
def mark(monkeypatch):
    """A word in the command line of every sandbox of this test, by which `sandbox_processes` knows them."""
    word = f"mark_{uuid.uuid4().hex}"
    monkeypatch.setattr(execution, "_BOOT", f"{execution._BOOT}  # {word}")
    return word


@pytest.fixture(params=DEGRADED, ids=lambda name: name.replace(" ", "-"))
def executor(request, monkeypatch, mark):
    """An executor on this system and on poorer ones."""
    boot = execution._BOOT.replace("import _sandbox_runner; ", DEGRADED[request.param] or "import _sandbox_runner; ")
    monkeypatch.setattr(execution, "_BOOT", boot)
    return Executor(confirmed=True, limits=LIMITS)


def run(source: str, executor: Executor = EXECUTOR, **options) -> Outcome:
    return executor.run(Program([("solution", source)], **options))


def sandbox_processes() -> list[str]:
    """Whatever still runs of the sandboxes of this test."""
    word = execution._BOOT.rpartition(" ")[2]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text()
            state = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if word in command and state[0] != "Z":
            found.append(f"{folder.name} parent {state[1]}")
    return found


def open_to_all(path: Path) -> bool:
    return path.exists() and all(folder.stat().st_mode & 0o001 for folder in [path, *path.parents])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs Unix")
class TestHostile:
    """Each on this system and on poorer ones."""

    def test_time(self, executor):
        quick = dataclasses.replace(executor, limits=dataclasses.replace(LIMITS, seconds=0.5))
        begun = time.monotonic()
        outcome = run("print('x', flush=True)\nwhile True: pass", quick)
        assert (outcome.kind, outcome.stdout) == ("timeout", "x\n")
        assert time.monotonic() - begun < 5
        assert sandbox_processes() == []

    def test_signal_handlers_do_not_help(self, executor):
        quick = dataclasses.replace(executor, limits=dataclasses.replace(LIMITS, seconds=0.5))
        source = (
            "import signal, time\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\nend = time.time() + 20\nwhile time.time() < end:\n"
            "    try: time.sleep(1)\n    except BaseException: pass"
        )
        assert run(source, quick).kind == "timeout"
        assert sandbox_processes() == []

    def test_processor_time_is_limited_inside(self):
        source = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU))"
        assert run(source).stdout == "(6, 6)\n"

    def test_forks(self, executor):
        source = (
            "import os, time\nmade = 0\nfor _ in range(40):\n    try:\n        if os.fork() == 0:\n"
            "            time.sleep(2)\n            os._exit(0)\n        made += 1\n"
            "    except OSError: pass\nprint(made)"
        )
        outcome = run(source, executor)
        assert outcome.kind == "end"
        assert sandbox_processes() == []  # although they sleep for 2 s
        if executor.limits_in_force["processes"].holds:
            assert int(outcome.stdout) <= LIMITS.processes
        else:
            assert outcome.stdout == "40\n"
            assert os.getuid() == 0 or sys.platform == "darwin"

    def test_a_child_in_a_session_of_its_own(self, executor):
        source = (
            "import os, time\nif os.fork() == 0:\n    try: os.setsid()\n    except OSError: pass\n"
            "    if os.fork() == 0:\n        time.sleep(3)\n    os._exit(0)"
        )
        assert run(source, executor).kind == "end"
        if executor.limits_in_force["leftovers"].holds:
            assert sandbox_processes() == []

    def test_output(self, executor):
        for stream in (1, 2):
            outcome = run(f"import os\nfor _ in range(48): os.write({stream}, b'x' * 65536)", executor)
            assert outcome.kind == "output"
            assert len(outcome.stdout) + len(outcome.stderr) == MIB
        assert run("print('x' * 1_000_000)", executor).kind == "end"

    def test_memory(self, executor):
        source = "x = bytearray(384 * 1024 ** 2)"
        assert run(source, executor).reason.endswith("MemoryError")
        assert run("x = bytearray(64 * 1024 ** 2)", executor).kind == "end"

    def test_memory_limit_cannot_be_raised(self, executor):
        source = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"
        outcome = run(source, executor)
        if executor.limits_in_force["system calls"].holds or os.getuid() != 0:  # capabilities are gone
            assert outcome.kind == "error"

    def test_file_size(self, executor):
        assert run("open('x', 'wb').write(bytes(3 << 20))", executor).kind == "error"
        assert run("open('x', 'wb').write(bytes(1 << 19))", executor).kind == "end"

    def test_deleting_its_own_folder(self, executor):
        source = "import os, shutil\nopen('x', 'w')\nos.remove('x')\nshutil.rmtree(os.getcwd(), ignore_errors=True)"
        assert run(source, executor).kind == "end"

    def test_locking_its_own_folder(self, executor):
        source = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.symlink('/', 'a/root')\n"
        source += "os.chmod('a/b', 0)\nos.chmod('a', 0)"
        assert run(source, executor).kind == "end"

    @pytest.mark.parametrize("mode", [0o700, 0o777])
    def test_writing_outside(self, executor, mode):
        source = (
            "import os\nfolder = {!r}\nfor action in (\n"
            "    lambda: open(folder + '/new', 'w'), lambda: open(folder + '/kept', 'w'),\n"
            "    lambda: os.remove(folder + '/kept'), lambda: os.rename(folder + '/kept', folder + '/moved'),\n"
            "):\n    try: action()\n    except OSError: pass\n"
        )
        in_force = executor.limits_in_force
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder) / "kept"
            kept.write_text("as it was")
            kept.chmod(0o666)
            os.chmod(folder, mode)
            assert run(source.format(folder), executor).kind == "end"
            another_user = os.getuid() == 0 and in_force["user"].holds
            if in_force["files outside"].holds or (another_user and mode == 0o700):
                assert [path.name for path in Path(folder).iterdir()] == ["kept"]
                assert kept.read_text() == "as it was"

    def test_network(self, executor):
        source = (
            "import socket\nserver = socket.socket()\nserver.bind(('127.0.0.1', 0))\nserver.listen()\n"
            "socket.create_connection(server.getsockname(), 1)"
        )
        if executor.limits_in_force["network"].holds:
            assert run(source, executor).kind == "error"

    def test_killing_the_sandbox(self, executor):
        source = "import os, signal\nos.kill(os.getppid(), signal.{})"
        for name in ("SIGTERM", "SIGKILL", "SIGSTOP"):
            quick = dataclasses.replace(executor, limits=dataclasses.replace(LIMITS, seconds=1))
            begun = time.monotonic()
            outcome = run(source.format(name), quick)  # an outcome, no error of ours
            assert time.monotonic() - begun < 5
            assert outcome.kind in ("end", "error", "killed", "timeout")
            assert sandbox_processes() == []

    def test_signals_to_others(self, executor):
        bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"])
        try:
            outcome = run(f"import os\nos.kill({bystander.pid}, 9)", executor)
            if executor.limits_in_force["system calls"].holds:
                assert outcome.kind == "error"
                assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()

    def test_the_group_of_the_program_only(self, executor):
        assert run("import os\nos.killpg(0, 9)", executor).kind == "killed"

    def test_deep_recursion(self, executor):
        source = "import sys\nsys.setrecursionlimit(10**6)\ndef f(n): return 0 if n == 0 else 1 + f(n - 1)\nf(200_000)"
        assert run(source, executor).kind in ("end", "error", "killed")


class TestLimitsInForce:
    def test_each_is_named_with_its_means(self, executor):
        names = ["time", "memory", "file size", "output", "leftovers", "network", "files outside", "system calls"]
        assert list(executor.limits_in_force) == [*names, "user", "processes"]
        assert all(limit.how for limit in executor.limits_in_force.values())

    def test_what_does_not_hold_is_said_once(self, monkeypatch, caplog):
        boot = execution._BOOT.replace("import _sandbox_runner; ", DEGRADED["plain Unix"])
        monkeypatch.setattr(execution, "_BOOT", boot)
        monkeypatch.setattr(execution, "_said", set())
        for _ in range(2):
            run("pass")
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "NOT limit" in record.message
        assert "network" in record.message

    @pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="needs root on Linux")
    def test_root_becomes_a_user_of_its_own(self):
        if EXECUTOR.limits_in_force["files outside"].holds:  # then the interpreter's library can be opened to all
            users = {int(run("import os; print(os.getuid())").stdout) for _ in range(3)}
            assert len(users) == 3
            assert 0 not in users

    @pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
    def test_no_capability_is_left(self):
        lines = run("print(open('/proc/self/status').read())").stdout.splitlines()
        sets = {name: int(value, 16) for name, value in (line.split(":\t") for line in lines if line.startswith("Cap"))}
        assert sets["CapEff"] == sets["CapPrm"] == sets["CapInh"] == 0
        assert "NoNewPrivs:\t1" in lines

    @pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="needs root, to become somebody else")
    def test_an_ordinary_user_is_shut_in_too(self):
        """The whole way again as a user with no rights, with the system's interpreter if ours is root's alone."""
        python = next(filter(open_to_all, [Path(sys.executable).resolve(), Path("/usr/bin/python3")]), None)
        if python is None or not open_to_all(ROOT):
            pytest.skip("no interpreter, or no source, that every user can read")
        version = subprocess.run([python, "-c", "import sys; print(sys.version_info >= (3, 10))"], capture_output=True)
        if version.stdout != b"True\n":
            pytest.skip("the interpreter that every user can read is older than 3.10")
        source = """
import json, sys
from execution import Executor, Limits, Program
executor = Executor(confirmed=True, limits=Limits(seconds=5))
run = lambda text: executor.run(Program([("solution", text)])).reason
held = {name: limit.holds for name, limit in executor.limits_in_force.items()}
fork = "import os, time\\nfor _ in range(40):\\n  if os.fork() == 0:\\n    time.sleep(2); os._exit(0)"
write = f"open({sys.argv[1]!r}, 'w')"
print(json.dumps([held, run(fork), run("import socket; socket.socket()"), run(write)]))
"""
        home = Path(execution.__file__).parent  # not the package, whose requirements that interpreter may lack
        environment = {"PYTHONPATH": str(home), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/tmp"}
        user = {"user": 12345, "group": 12345, "extra_groups": []}
        with tempfile.TemporaryDirectory() as outside:
            os.chmod(outside, 0o777)
            command = [python, "-c", source, f"{outside}/x"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, **user)
        assert done.returncode == 0, done.stderr
        held, forks, socket, writing = json.loads(done.stdout)
        assert held["processes"]
        assert held["memory"]
        assert "BlockingIOError" in forks
        assert socket.startswith("error") or not held["network"]
        assert "Read-only" in writing or not held["files outside"]

    def test_a_sandbox_that_fails_is_no_verdict(self, monkeypatch):
        boot = execution._BOOT.replace(
            "import _sandbox_runner; ", "import _sandbox_runner as r; r.become = r._limit = 1; "
        )
        monkeypatch.setattr(execution, "_BOOT", boot.replace("_sandbox_runner.main", "r.main"))
        with pytest.raises(SandboxError, match="not callable"):
            run("pass")

    def test_a_sandbox_that_never_starts_says_what_it_said(self, monkeypatch):
        monkeypatch.setattr(execution, "_BOOT", "raise ImportError('half an installation')")
        with pytest.raises(SandboxError, match="half an installation"):
            run("pass")

    def test_nothing_is_left_behind(self, tmp_path, monkeypatch):
        monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path))
        descriptors = len(os.listdir("/dev/fd"))
        for source in ("pass", "1 / 0", "import os; os._exit(3)", "open('x', 'w')"):
            run(source)
        assert list(tmp_path.iterdir()) == []
        assert len(os.listdir("/dev/fd")) == descriptors

    @pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
    def test_the_sandbox_ends_with_its_parent(self, tmp_path):
        source = (
            "import os, lightning_dsv3.evaluation.execution as execution\nexecution._BOOT = os.environ['BOOT']\n"
            "program = execution.Program([('solution', 'import time; time.sleep(8)')])\n"
            "execution.Executor(confirmed=True).run(program)"
        )
        environment = os.environ | {"BOOT": execution._BOOT, "TMPDIR": str(tmp_path)}  # the folder stays
        parent = subprocess.Popen([sys.executable, "-c", source], env=environment)
        deadline = time.monotonic() + 20
        while not sandbox_processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        assert sandbox_processes()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 5
        while sandbox_processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sandbox_processes() == []

    def test_programs_in_turn_start_only_when_asked_for(self):
        outcomes = EXECUTOR.run_in_turn(Program([("solution", source)]) for source in ["print(1)", "print(2)"])
        assert next(outcomes).stdout == "1\n"
        outcomes.close()
        assert sandbox_processes() == []
