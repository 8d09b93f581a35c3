"""What runs in the sandbox's own processes, under a fresh interpreter: standard library only, nothing of the package.

Three processes, each the parent of the next (without pid namespaces the first two are one):

- the *supervisor* leads a session of its own and moves into new namespaces;
- the *keeper* is process 1 of the new pid namespace. It reads one order a line, runs a program for each and reports how
  it ended. When it ends, the kernel ends everything it started. Without a pid namespace it adopts all orphans and kills
  them one by one;
- the *program*, forked from the keeper for each order, limits itself, gives up its rights and only then runs what the
  model wrote, in an empty folder.

The program cannot reach the keeper's report. It leaves its own message in a file without a name, which counts only if
it starts with a token that the program's process drew and told the keeper before the model's code began. So nothing
that is printed, and neither ``sys.exit(0)`` nor ``os._exit(0)``, passes for an end that was reached. The token lies in
no variable while the code runs. Still, the code shares an interpreter with whoever knows the token: code written to
search the interpreter's memory for this very sandbox could forge "end". Where values are compared (LiveCodeBench) there
is nothing to forge, as expected values never enter the sandbox.
"""

import builtins
import contextlib
import errno
import importlib
import json
import os
import resource
import signal
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

linux: Any = None
if sys.platform.startswith("linux"):
    with contextlib.suppress(ImportError):  # an interpreter without ctypes
        linux = importlib.import_module("_sandbox_linux")

TOKEN_BYTES = 16
SETUP_FAILED = 71  # EX_OSERR
# Where a user id of its own for each sandbox is taken from: no system allots this range (systemd's UIDS-GIDS page).
FIRST_USER, LAST_USER, NOBODY = 0x70000000, 0x7FFFFFFE, 65534
_WAITED_FOR = {signal.SIGCHLD, signal.SIGTERM}


def main() -> None:
    """Serve orders until there are no more; the descriptors of orders and reports are the arguments."""
    orders = open(int(sys.argv[1]), "rb")  # noqa: SIM115 - for life
    report = Report(int(sys.argv[2]))
    settings = json.loads(orders.readline())
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in settings["preload"]:
        __import__(name)
    in_force = isolate(settings)
    if settings["pid_namespace"]:
        keeper = os.fork()
        if keeper:
            os._exit(_await_keeper(keeper))
        linux.die_with_parent()
        with contextlib.suppress(OSError):  # where parts of /proc are hidden, as in containers; the old one stays
            linux.renew_proc()
    report.send({"in_force": in_force})
    number = 0
    while line := orders.readline():
        number += 1
        run_order(number, json.loads(line), settings, report)
    os._exit(0)


class Report:
    """Messages to the parent, one JSON object a line."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def send(self, message: dict) -> None:
        """Write all of one message."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.descriptor, data) :]


def isolate(settings: dict) -> dict:
    """Set up what holds for all programs of this sandbox, noting each limit as ``[holds, how or why not]``."""
    user = os.getuid()
    settings["user"] = settings["pid_namespace"] = False
    settings["tasks"] = None if user == 0 or not os.path.isdir("/proc/self") else count_tasks(user)
    missing = "only Linux, with ctypes, has this"
    in_force = {
        "time": [True, "wall clock outside, RLIMIT_CPU inside"],
        "memory": [sys.platform != "darwin", "RLIMIT_AS, per process"],
        "file size": [True, "RLIMIT_FSIZE"],
        "output": [True, "counted outside"],
        "leftovers": [linux is not None, "the process group is killed, and on Linux adopted orphans"],
        "network": [False, missing],
        "files outside": [False, missing],
        "system calls": [False, missing],
    }
    if linux is not None:
        linux.adopt_orphans()
        in_force |= _namespaces(settings, user)
        in_force["system calls"] = _rehearse(lambda: linux.filter_system_calls(only_itself=True), "seccomp filter")
        if not in_force["network"][0] and in_force["system calls"][0]:
            in_force["network"] = [True, "seccomp filter"]
    in_force["user"] = _choose_user(settings)
    if linux is not None:
        if settings["namespaces"]:
            linux.unshare(linux.NEW_PIDS)  # last: the first child from here on is process 1
            settings["pid_namespace"] = True
        linux.forbid_inspection()
        linux.die_with_parent()
        if os.getppid() != settings["parent"]:
            os._exit(SETUP_FAILED)  # the parent is gone, and nobody would keep the time
    in_force["processes"] = _process_limit(settings)
    return in_force


def _namespaces(settings: dict, user: int) -> dict:
    settings["namespaces"] = False
    try:
        linux.enter_namespaces(user, os.getgid())
    except OSError as error:
        return {"files outside": [False, f"namespaces refused ({error}): as the user's rights allow"]}
    settings["namespaces"] = True
    found = {"network": [True, "network namespace"], "leftovers": [True, "pid namespace"]}
    try:
        if user == 0:
            linux.open_way_to(sys.base_prefix, settings["folder"])
        linux.make_files_read_only(settings["folder"], settings["folder_size"])
        found["files outside"] = [True, "read-only mounts; the folder is in memory and bounded"]
    except OSError as error:
        found["files outside"] = [False, f"{error}: as the user's rights allow"]
    return found


def _rehearse(action: Callable[[], None], how: str) -> list:
    """Try in a child what cannot be undone."""
    child = os.fork()
    if child == 0:
        try:
            linux.drop_capabilities()
            action()
        except BaseException as error:
            os._exit(getattr(error, "errno", None) or 1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [code == 0, how if code == 0 else f"{how}: {os.strerror(code) if code > 0 else f'signal {-code}'}"]


def _choose_user(settings: dict) -> list:
    """Find the user whom the program becomes: one of its own, nobody, or (not for root) the same."""
    if os.getuid() != 0:
        return [True, "an ordinary user's rights, without capabilities"]
    own = FIRST_USER + int.from_bytes(os.urandom(4), "little") % (LAST_USER - FIRST_USER)
    reason = "setresuid refused"
    for user in (own, NOBODY):
        child = os.fork()
        if child == 0:
            try:
                become(user)
                for path in (os.__file__, os.path.dirname(os.__file__)):
                    os.close(os.open(path, os.O_RDONLY))
            except PermissionError as error:
                os._exit(2 if error.filename else 1)
            except BaseException:
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            settings["user"] = user
            return [True, "a user of its own" if user == own else "the user nobody"]
        if code == 2:
            reason = f"the interpreter's library is readable by root only ({os.path.dirname(os.__file__)})"
    return [False, f"stays root: {reason}"]


def _process_limit(settings: dict) -> list:
    """RLIMIT_NPROC counts all tasks of a user, so what counts already is added to what the program may start."""
    release = os.uname().release.split(".")
    newer = linux is not None and (int(release[0]), int(release[1])) >= (5, 14)
    if settings["user"]:
        settings["tasks"] = 0
    elif os.getuid() == 0:
        return [False, "RLIMIT_NPROC does not bind root"]
    elif settings["pid_namespace"] and newer:
        settings["tasks"] = 3  # counted per user namespace: supervisor, keeper and a spare one
    elif settings["tasks"] is None:
        return [False, "the user's present processes cannot be counted"]
    return [True, "RLIMIT_NPROC"]


def count_tasks(user: int) -> int:
    """Count the threads of all processes of a user."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if os.stat(f"/proc/{name}").st_uid == user:
                    total += len(os.listdir(f"/proc/{name}/task"))
    return total


def _await_keeper(keeper: int) -> int:
    while True:
        if signal.sigwait(_WAITED_FOR) == signal.SIGTERM:
            os.kill(keeper, signal.SIGKILL)
        pid, status = os.waitpid(keeper, os.WNOHANG)
        if pid:
            return abs(os.waitstatus_to_exitcode(status))


def run_order(number: int, order: dict, settings: dict, report: Report) -> None:
    """Run one program to its end, kill what it left behind and report."""
    folder = os.path.join(settings["folder"], str(number))
    os.mkdir(folder, 0o700)
    message = _nameless_file(folder)
    given = _nameless_file(folder, order["stdin"].encode("utf-8", "surrogatepass"))
    if settings["user"]:
        os.chown(folder, settings["user"], settings["user"])
    reading, writing = os.pipe()
    waiting, release = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            begin(order, settings, folder, given, message, writing, waiting)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(SETUP_FAILED)
    os.close(writing)
    with contextlib.suppress(OSError):
        os.setpgid(program, program)  # also done by the program: whoever is first
    report.send({"started": None if settings["pid_namespace"] else program})
    os.write(release, b"!")
    token = os.read(reading, TOKEN_BYTES)  # it ends with the program at the latest
    status, told_to_stop = _await_program(program)
    _kill_the_rest(program, settings)
    if told_to_stop:
        os._exit(0)
    said = os.pread(message, os.fstat(message).st_size, 0)  # RLIMIT_FSIZE bounds it
    for descriptor in (message, given, reading, waiting, release):
        os.close(descriptor)
    valid = len(token) == TOKEN_BYTES and said.startswith(token)
    text = said[TOKEN_BYTES:].decode("utf-8", "replace") if valid else None
    report.send({"ended": status, "set_up": len(token) == TOKEN_BYTES, "message": text})


def _nameless_file(folder: str, content: bytes = b"") -> int:
    path = os.path.join(folder, "nameless")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    while content:
        content = content[os.write(descriptor, content) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _await_program(program: int) -> tuple:
    """Wait for the program, reaping orphans on the way, and say whether the parent sent SIGTERM, its word to stop."""
    told_to_stop = False
    while True:
        if signal.sigwait(_WAITED_FOR) == signal.SIGTERM:
            told_to_stop = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program, signal.SIGKILL)
        pid = 1
        while pid:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == program:
                return os.waitstatus_to_exitcode(status), told_to_stop


def _kill_the_rest(program: int, settings: dict) -> None:
    """Kill and reap every process that the program left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the second of a group of zombies
        os.killpg(program, signal.SIGKILL)
    while True:
        if settings["pid_namespace"] and os.getpid() == 1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all of this namespace but its process 1
        else:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list:
    """List the processes whose parent is this one; none where there is no /proc."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def become(user: int) -> None:
    """Change from root to another user for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def begin(order: dict, settings: dict, folder: str, given: int, message: int, announce: int, waiting: int) -> None:
    """Turn this process into the program's: limits, rights, descriptors, environment; then run it. Never returns."""
    os.read(waiting, 1)  # until the parent knows of this process
    os.setpgid(0, 0)
    os.chdir(folder)
    os.dup2(given, 0)
    _close_all_but({0, 1, 2, message, announce})
    for name, limit in settings["rlimits"].items():
        _limit(getattr(resource, name), limit)
    if settings["tasks"] is not None:
        _limit(resource.RLIMIT_NPROC, settings["tasks"] + settings["processes"])
    if settings["user"]:
        become(settings["user"])
    if linux is not None:
        linux.die_with_parent()
        linux.drop_capabilities()
        with contextlib.suppress(OSError):  # known since `isolate` and reported there
            linux.filter_system_calls(only_itself=not settings["pid_namespace"])
    os.environ.clear()
    os.environ.update(HOME=folder, TMPDIR=folder, PATH="/usr/bin:/bin", LANG="C.UTF-8")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115 - for life
    _conclude(message, os.getpid(), _draw_token(announce), _outcome(order))


def _close_all_but(kept: set) -> None:
    previous = -1
    for descriptor in [*sorted(kept), 4096]:
        if previous + 1 < descriptor:  # an empty range from 0 would close everything
            os.closerange(previous + 1, descriptor)
        previous = descriptor


def _limit(kind: int, value: int) -> None:
    """Lower a limit for good; one that is lower already stays."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError) as error:
        if sys.platform != "darwin":  # macOS refuses RLIMIT_AS; `isolate` reported it
            raise OSError(errno.EPERM, f"setrlimit {kind}: {error}") from error


def _draw_token(announce: int) -> bytes:
    token = os.urandom(TOKEN_BYTES)
    os.write(announce, token)
    os.close(announce)
    return token


def _conclude(
    message: int,
    pid: int,
    token: bytes,
    outcome: bytes,
    getpid: Callable[[], int] = os.getpid,
    write: Callable[[int, bytes], int] = os.write,
    end: Callable[[int], NoReturn] = os._exit,
) -> NoReturn:
    """Leave the message and end, without exit handlers; a fork of the program that came here leaves none."""
    if getpid() == pid:
        data = token + outcome
        while data:
            data = data[write(message, data) :]
    end(0)


def _outcome(order: dict) -> bytes:
    """Run the model's code; the first line says how it ended, the rest is the value or the reason.

    How it ended follows from the flow of control alone, never from a function that the code may have replaced.
    """
    module = types.ModuleType(order["module"])
    for name in ("__main__", "_sandbox_runner", "_sandbox_linux"):
        sys.modules.pop(name, None)
    sys.modules["__main__"] = sys.modules[order["module"]] = module
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # otherwise made by `site`, which is left out
    try:
        value = _execute(order, module)
    except SystemExit as error:
        return b"exit\n" + _describe(error, order)
    except BaseException as error:
        return b"error\n" + _describe(error, order)
    return b"end\n" + value


def _execute(order: dict, module: types.ModuleType) -> bytes:
    for name, source in order["parts"]:
        exec(compile(source, f"<{name}>", "exec", dont_inherit=True), module.__dict__)
    value = b""
    if order["call"] is not None:
        name, arguments = order["call"]["function"], order["call"]["arguments"]
        owner = module.__dict__.get("Solution")
        function = module.__dict__[name] if owner is None else getattr(owner(), name)
        value = json.dumps(function(*arguments)).encode("ascii")
    if order["module"] == "__main__" and "threading" in sys.modules:
        threading = sys.modules["threading"]
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    return value


def _describe(error: BaseException, order: dict) -> bytes:
    """Say what was raised, and where in the given sources."""
    try:
        sources = {f"<{name}>": source for name, source in order["parts"]}
        where, trace = "", error.__traceback__
        while trace is not None:
            name = trace.tb_frame.f_code.co_filename
            if name in sources:
                line = sources[name].split("\n")[trace.tb_lineno - 1].strip()
                where = f"{name[1:-1]}, line {trace.tb_lineno} ({line[:200]}): "
            trace = trace.tb_next
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        text = f"{error}"[:500]
        return f"{where}{type(error).__name__}{': ' if text else ''}{text}".encode("utf-8", "replace")
    except BaseException:  # the code's own exception may do anything when it is printed
        return b"an exception that cannot be described"
