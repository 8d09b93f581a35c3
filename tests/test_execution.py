"""The sandbox of model-written code: consent, what a program may say of itself, and what it finds.

What it may use, and what holds against hostile ones: ``test_execution_limits.py``.
"""

import dataclasses
import json
import sys

import pytest
from conftest import ROOT

from lightning_dsv3.evaluation import execution
from lightning_dsv3.evaluation.execution import Call, Executor, Limits, Outcome, Program, UnsafeCodeError

MIB = 1 << 20
LIMITS = Limits(seconds=5, memory=256 * MIB, output=MIB, file_size=MIB)
EXECUTOR = Executor(confirmed=True, limits=LIMITS)


def run(source: str, executor: Executor = EXECUTOR, **options) -> Outcome:
    return executor.run(Program([("solution", source)], **options))


class TestConsent:
    @pytest.mark.parametrize("word", [False, None, 1, "yes"])
    def test_only_true_is_consent(self, word):
        with pytest.raises(UnsafeCodeError, match="--confirm_run_unsafe_code"):
            Executor(confirmed=word)

    def test_it_cannot_be_forgotten(self):
        with pytest.raises(TypeError, match="confirmed"):
            Executor()

    def test_it_cannot_be_changed_afterwards(self):
        with pytest.raises(UnsafeCodeError):
            dataclasses.replace(EXECUTOR, confirmed=False)

    def test_windows_is_refused_with_a_remedy(self, monkeypatch):
        monkeypatch.setattr(execution.os, "name", "nt")
        with pytest.raises(NotImplementedError, match="WSL"):
            Executor(confirmed=True)

    @pytest.mark.parametrize(("field", "value"), [("seconds", 0), ("memory", -1), ("processes", 0), ("memory", MIB)])
    def test_a_senseless_limit_is_named(self, field, value):
        with pytest.raises(ValueError, match=f"Limits.{field}"):
            Limits(**{field: value})


class TestVerdict:
    """Only the last line of the last part is an end."""

    def test_a_program_that_reaches_its_end(self):
        outcome = run("import sys\nprint('ä')\nprint('b', file=sys.stderr)")
        assert (outcome.kind, outcome.stdout, outcome.stderr) == ("end", "ä\n", "b\n")

    @pytest.mark.parametrize(
        ("source", "kind"),
        {
            "print('end'); 1 / 0": "error",
            "import sys; sys.exit(0)": "exit",
            "raise SystemExit": "exit",
            "exit()": "exit",
            "quit(0)": "exit",
            "raise KeyboardInterrupt": "error",
            "raise GeneratorExit": "error",
            "import os; os._exit(0)": "vanished",
            "import os; os.abort()": "killed",
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": "killed",
            "def f(:": "error",
            "x = '''": "error",
            "x = '\0'": "error",
            "return 1": "error",
            "import os; os.execv('/bin/true', ['true'])": "vanished",
        }.items(),
    )
    def test_every_other_end_is_a_failure(self, source, kind):
        assert run(source).kind == kind

    def test_the_reason_says_where(self):
        program = Program([("solution", "def f():\n    return 1"), ("test", "x = 1\nassert f() == 2")])
        assert EXECUTOR.run(program).reason == "error: test, line 2 (assert f() == 2): AssertionError"

    def test_an_open_string_does_not_swallow_the_test(self):
        program = Program([("solution", "x = '''"), ("test", "y = '''\n1 / 0\n'''\n")])
        assert EXECUTOR.run(program).kind == "error"

    def test_an_open_bracket_does_not_swallow_the_test(self):
        assert EXECUTOR.run(Program([("solution", "x = ("), ("test", "1)")])).kind == "error"

    @pytest.mark.parametrize(
        "source",
        [
            # Whatever descriptor the program finds gets a word of success.
            "import os\nfor fd in range(64):\n    try: os.write(fd, b'end\\n' * 9)\n    except OSError: pass\n"
            "os._exit(0)",
            # The same with a token of zeros before it, at the start of every file.
            "import os\nfor fd in range(64):\n    try: os.pwrite(fd, bytes(16) + b'end\\n', 0)\n"
            "    except OSError: pass\nos._exit(0)",
            # What the runner might use when it reports.
            "import json, os, builtins\njson.dumps = lambda *_: 'end'\nos.write = os._exit = print\n"
            "builtins.BaseException = builtins.SystemExit = ValueError\nbuiltins.isinstance = lambda *_: True\n"
            "builtins.str = builtins.repr = builtins.type = builtins.len = lambda *_: 'end'\n1 / 0",
            # An exception with a will of its own.
            "class E(Exception):\n    def __str__(self):\n        raise SystemExit(0)\nraise E",
            "import os\nclass E(Exception):\n    def __str__(self):\n        os._exit(0)\nraise E",
            "import sys\nclass E(BaseException):\n    pass\nsys.excepthook = lambda *_: None\nraise E",
            # Handlers that would run at exit, and hooks on tracing.
            "import atexit, os\natexit.register(os._exit, 0)\n1 / 0",
            "import sys\nsys.stdout = sys.stderr = None\n1 / 0",
            # The frames above, searched for something that looks like the token.
            "import sys, os\nframe = sys._getframe()\nwhile frame:\n    for value in frame.f_locals.values():\n"
            "        if isinstance(value, bytes) and len(value) == 16:\n"
            "            for fd in range(64):\n                try: os.pwrite(fd, value + b'end\\n', 0)\n"
            "                except OSError: pass\n    frame = frame.f_back\nos._exit(0)",
        ],
    )
    def test_success_cannot_be_claimed(self, source):
        assert run(source).kind not in ("end", "exit")

    def test_a_fork_that_reaches_the_end_first_reports_nothing(self):
        source = "import os, time\nif os.fork():\n    time.sleep(0.3)\n    raise ValueError('the parent')"
        assert run(source).reason.endswith("ValueError: the parent")

    def test_a_replaced_check_is_defined_anew_by_the_test(self):
        parts = [
            ("solution", "check = lambda f: None\ndef f(): return 1"),
            ("test", "def check(f): assert f() == 2\ncheck(f)"),
        ]
        assert EXECUTOR.run(Program(parts)).kind == "error"

    def test_verdicts_do_not_depend_on_the_hash_seed(self):
        outputs = {run("print(list({'a', 'b', 'c', 'd', 'e'}))").stdout for _ in range(4)}
        assert len(outputs) == 1


class TestProgram:
    def test_standard_input(self):
        source = "import sys\nfirst = input()\nprint(first, sys.stdin.read())"
        assert run(source, stdin="a\nbc\ud800").kind == "end"
        assert run(source, stdin="a\nbü").stdout == "a bü\n"
        assert run("import os; print(os.read(0, 9))", stdin="x").stdout == "b'x'\n"
        assert run("input()").reason.endswith("EOFError: EOF when reading a line")

    def test_a_large_standard_input_arrives_whole(self):
        assert run("import sys; print(len(sys.stdin.read()))", stdin="x" * 900_000).stdout == "900000\n"

    def test_a_call_returns_a_value_through_json(self):
        source = "class Solution:\n    def add(self, a, b): return [a, b, None, (a,)]"
        assert run(source, call=Call("add", [1, "é"])).value == [1, "é", None, [1]]
        assert run("def add(a): return a * 100000", call=Call("add", ["x"])).value == "x" * 100_000
        assert run("def add(a): return {1}", call=Call("add", [1])).kind == "error"
        assert run("x = 1", call=Call("add", [1])).kind == "error"
        assert run("def add(): return '[' * 1000", call=Call("add", [])).value == "[" * 1000

    def test_threads_of_a_script_are_waited_for(self):
        source = "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()"
        assert run(source, module="__main__").stdout == "late\n"

    def test_classes_find_their_module(self):
        source = "import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
        source += "print(pickle.loads(pickle.dumps(A(1))))"
        assert run(source).stdout == "A(x=1)\n"
        assert run("import __main__; y = 2; print(__main__.y, __name__)", module="__main__").stdout == "2 __main__\n"

    def test_the_environment_is_empty_and_nothing_is_inherited(self, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setenv("PYTHONSTARTUP", "secret")
        source = (
            "import json, os, sys\nopen_ = [fd for fd in range(3, 64) if os.path.exists(f'/dev/fd/{fd}')]\n"
            "print(json.dumps([dict(os.environ), os.listdir('.'), os.getcwd(), sys.argv, sys.path, len(open_)]))"
        )
        environment, files, folder, arguments, path, descriptors = json.loads(run(source).stdout)
        assert set(environment) == {"HOME", "TMPDIR", "PATH", "LANG"}
        assert environment["HOME"] == environment["TMPDIR"] == folder
        assert files == []
        assert str(ROOT) not in "".join(path) or sys.base_prefix.startswith(str(ROOT))
        assert not any("site-packages" in entry for entry in path)
        assert "secret" not in str(arguments)
        assert descriptors <= 2  # its message, and the pipe it waited at

    def test_programs_in_turn_do_not_see_each_other(self):
        source = "import os, builtins\nprint(os.listdir('.'), hasattr(builtins, 'left'))\n"
        source += "builtins.left = 1\nopen('file', 'w')"
        outcomes = list(EXECUTOR.run_in_turn([Program([("solution", source)])] * 3))
        assert [outcome.stdout for outcome in outcomes] == ["[] False\n"] * 3

    def test_programs_in_turn_go_on_after_one_that_is_stopped(self):
        quick = Executor(confirmed=True, limits=dataclasses.replace(LIMITS, seconds=0.5))
        sources = ["print(1)", "while True: pass", "print('x' * 3_000_000)", "print(4)"]
        outcomes = list(quick.run_in_turn([Program([("solution", source)]) for source in sources]))
        assert [outcome.kind for outcome in outcomes] == ["end", "timeout", "output", "end"]
        assert outcomes[0].stdout == "1\n"
        assert outcomes[3].stdout == "4\n"

    def test_many_at_a_time_keep_their_order(self):
        pool = Executor(confirmed=True, limits=LIMITS, workers=4)
        outcomes = pool.map(lambda number: run(f"print({number})", pool).stdout, range(12))
        assert outcomes == [f"{number}\n" for number in range(12)]
