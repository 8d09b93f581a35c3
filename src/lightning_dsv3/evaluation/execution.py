"""Running programs that a language model wrote: each in a fresh process, under limits, and only after a clear word.

`Executor` starts a clean interpreter (no site packages, an environment of its own, one fixed hash seed so that verdicts
repeat) in a session of its own, which shuts itself in as far as the system allows and then forks once per program; see
``_sandbox_runner.py``. The time, the amount of output and the end of everything are watched from outside.

What holds depends on the system. `Executor.limits_in_force` asks a sandbox and says so, limit by limit:

==================  ================================================================================================
Linux, as root      namespaces for network, pids, shared memory and mounts (all files read-only but the program's
                    folder, which is in memory and bounded); the program becomes a user of its own, since RLIMIT_NPROC
                    does not bind root; a system call filter refuses sockets
Linux, as a user    the same within a user namespace, the user stays the same
containers that     time, memory, file size, output and number of processes hold; sockets, signals to others and
refuse namespaces   leaving the process group are refused by the filter; files outside can be written as far as the
                    rights of the user go. Root still becomes another user, unless the interpreter's library is
                    closed to others: then it stays root without capabilities, and processes are not limited
macOS               time, file size and output; no limit on memory or processes, no isolation from network or files
==================  ================================================================================================

Memory is limited per process, so the whole is bounded by memory times processes. The executor is no defence against
somebody who attacks the kernel; it is one against what models write.

Windows is not supported: run under WSL.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

_MIB = 1 << 20
_START_SECONDS = 60.0  # to start an interpreter, on a busy machine
_STOP_SECONDS = 10.0
_BOOT = "import sys; sys.path[0] = {folder!r}; import _sandbox_runner; del sys.path[0]; _sandbox_runner.main()"

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class UnsafeCodeError(PermissionError):
    """Nobody has agreed to run the model's code."""


class SandboxError(RuntimeError):
    """The sandbox itself failed, so nothing is known about the program."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Args:
        seconds: Wall clock from the program's start to its end; the processor time of each process is one second more.
        memory: Bytes of address space of each process.
        file_size: Bytes of one file.
        folder_size: Bytes of all files of one sandbox together, where its folder is in memory.
        output: Bytes of standard output, and as many of standard error.
        processes: Processes and threads at one time, the program included.
        open_files: Descriptors of each process.
    """

    seconds: float = 10.0
    memory: int = 4096 * _MIB
    file_size: int = 16 * _MIB
    folder_size: int = 64 * _MIB
    output: int = 8 * _MIB
    processes: int = 16
    open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Limits.{name} must be positive, not {value}.")
        if self.memory < 64 * _MIB:
            raise ValueError(f"Limits.memory is {self.memory}: an interpreter needs at least {64 * _MIB} bytes.")


@dataclass(frozen=True)
class Call:
    """A function to call when the sources have run: a method of the class ``Solution`` if there is one.

    Args:
        function: Its name.
        arguments: Its positional arguments, as JSON has them.
    """

    function: str
    arguments: Sequence[Any]


@dataclass(frozen=True)
class Program:
    """What to run.

    Args:
        parts: (name, source) in the order they run, in one module. Each is compiled alone, so that no open string or
            bracket of one reaches into the next.
        stdin: The standard input.
        call: What to call at the end; its result is the outcome's ``value``.
        module: Name of the module. As ``"__main__"`` it is a script, whose threads are waited for.
    """

    parts: Sequence[tuple[str, str]]
    stdin: str = ""
    call: Call | None = None
    module: str = "solution"


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Args:
        kind: ``end``: every part ran to its last line. ``exit``: SystemExit. ``error``: another exception. ``killed``:
            by a signal (the system's, of the processor limit, or its own). ``vanished``: the process ended before
            its last line with no exception, as by ``os._exit``. ``timeout`` and ``output``: past that limit.
        detail: What was raised and where, or the signal.
        stdout: Standard output.
        stderr: Standard error.
        value: What the call returned, through JSON.
        seconds: Wall clock.
    """

    kind: Literal["end", "exit", "error", "killed", "vanished", "timeout", "output"]
    detail: str = ""
    stdout: str = ""
    stderr: str = ""
    value: Any = None
    seconds: float = 0.0

    @property
    def reason(self) -> str:
        """One line for people."""
        return self.kind if not self.detail else f"{self.kind}: {self.detail}"


@dataclass(frozen=True)
class LimitInForce:
    """Whether one limit holds on this system, and through what (or why not)."""

    holds: bool
    how: str


@dataclass(frozen=True)
class Executor:
    r"""Runs model-written programs, several at a time.

    Args:
        confirmed: Somebody agreed to run model-written code, as with lm-eval's ``--confirm_run_unsafe_code``. There is
            no default; anything but ``True`` is refused.
        limits: Of each program.
        workers: Programs at one time in `map`.
        preload: Modules of the standard library that the programs are likely to import: imported once per sandbox.

    Raises:
        UnsafeCodeError: If it is not confirmed.
        NotImplementedError: On Windows.

    Example:
        >>> executor = Executor(confirmed=True)
        >>> executor.run(Program([("solution", "print(6 * 7)")])).stdout
        '42\n'
    """

    confirmed: bool = field(kw_only=True)
    limits: Limits = field(default_factory=Limits)
    workers: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    preload: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.confirmed is not True:
            raise UnsafeCodeError(
                "This benchmark runs code that a model wrote. If that is all right on this machine, say so: "
                "--confirm_run_unsafe_code of lm_eval, or Executor(confirmed=True)."
            )
        if os.name != "posix":
            raise NotImplementedError("Running model-written code needs Linux or macOS; on Windows, use WSL.")
        if self.workers < 1:
            raise ValueError(f"Executor.workers must be at least 1, not {self.workers}.")

    @cached_property
    def limits_in_force(self) -> dict[str, LimitInForce]:
        """What holds on this system, asked of a sandbox."""
        with _Sandbox(self.limits, self.preload) as sandbox:
            return sandbox.in_force

    def run(self, program: Program) -> Outcome:
        """Run one program in a sandbox of its own.

        Raises:
            SandboxError: If the sandbox could not be set up.
        """
        (outcome,) = self.run_in_turn([program])
        return outcome

    def run_in_turn(self, programs: Iterable[Program]) -> Generator[Outcome, None, None]:
        """Run programs one after the other in one sandbox, each in a fresh process and an empty folder of it.

        For the tests of one problem. A program is started when its outcome is asked for, so a caller may stop at the
        first failure; one that breaks a limit of time or output ends the sandbox, and the next gets another.
        """
        with contextlib.ExitStack() as stack:
            sandbox = None
            for program in programs:
                if sandbox is None:
                    sandbox = stack.enter_context(_Sandbox(self.limits, self.preload))
                    _say_once(sandbox.in_force)
                yield sandbox.run(program)
                if sandbox.broken:
                    stack.close()
                    sandbox = None

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Apply a function that uses this executor to many items, ``workers`` at a time, results in order."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox") as pool:
            return list(pool.map(function, items))


_said: set[str] = set()


def _say_once(in_force: dict[str, LimitInForce]) -> None:
    broken = [f"{name} ({limit.how})" for name, limit in in_force.items() if not limit.holds]
    text = "Model-written code runs in a sandbox. "
    if broken:
        text += f"On this system it does NOT limit: {'; '.join(broken)}."
    else:
        text += "In force: " + "; ".join(f"{name} ({limit.how})" for name, limit in in_force.items()) + "."
    if text not in _said:
        _said.add(text)
        logger.log(logging.WARNING if broken else logging.INFO, text)


class _Sandbox:
    """One running sandbox: a context manager that serves one program at a time."""

    def __init__(self, limits: Limits, preload: Sequence[str]) -> None:
        self.limits = limits
        self.preload = preload
        self.captured = (bytearray(), bytearray())
        self.pending = b""
        self.broken = False
        self.program: int | None = None  # the process group of a program that runs, unless in a pid namespace

    def __enter__(self) -> _Sandbox:
        self.folder = tempfile.mkdtemp(prefix="lightning_dsv3_program_")
        orders_in, self.orders = os.pipe()
        self.reports, reports_out = os.pipe()
        here = str(Path(__file__).resolve().parent)
        command = [sys.executable, "-s", "-S", "-B", "-X", "utf8", "-c", _BOOT.format(folder=here)]
        try:
            os.chmod(self.folder, 0o711)  # another user must be able to pass
            self.process = subprocess.Popen(
                [*command, str(orders_in), str(reports_out)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(orders_in, reports_out),
                env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},
                cwd=self.folder,
                start_new_session=True,
            )
        except BaseException:
            os.close(self.orders)
            os.close(self.reports)
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        finally:
            os.close(orders_in)
            os.close(reports_out)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.streams = (self.process.stdout, self.process.stderr)
        self.selector = selectors.DefaultSelector()
        for descriptor in (self.reports, *(stream.fileno() for stream in self.streams)):
            os.set_blocking(descriptor, False)
            self.selector.register(descriptor, selectors.EVENT_READ)
        try:
            self._order(self._settings())
            found = self._await_start()["in_force"]
        except BaseException:
            self.__exit__()
            raise
        self.in_force = {name: LimitInForce(*value) for name, value in found.items()}
        return self

    def _settings(self) -> dict[str, Any]:
        limits = self.limits
        rlimits = {"RLIMIT_CPU": math.ceil(limits.seconds) + 1, "RLIMIT_AS": limits.memory, "RLIMIT_CORE": 0}
        rlimits |= {"RLIMIT_FSIZE": limits.file_size, "RLIMIT_NOFILE": limits.open_files}
        return {
            "parent": os.getpid(),
            "folder": self.folder,
            "folder_size": limits.folder_size,
            "processes": limits.processes,
            "rlimits": rlimits,
            "message_size": limits.file_size,
            "preload": list(self.preload),
        }

    def run(self, program: Program) -> Outcome:
        """Run one program; when it breaks a limit that is watched from outside, the sandbox ends with it."""
        for captured in self.captured:
            captured.clear()
        call = None
        if program.call is not None:
            call = {"function": program.call.function, "arguments": list(program.call.arguments)}
        order = {"parts": list(program.parts), "stdin": program.stdin, "call": call, "module": program.module}
        self._order(order)
        self.program = self._await_start()["started"]
        begun = time.monotonic()
        try:
            message = self._await_message(begun + self.limits.seconds)
        except _LimitError as broken:
            self.stop()
            self.broken = True
            return self._outcome(broken.kind, str(broken), None, begun)
        self.program = None
        self._drain()
        if any(len(captured) > self.limits.output for captured in self.captured):
            return self._outcome("output", f"more than {self.limits.output} bytes", None, begun)
        if not message["set_up"]:
            raise SandboxError(f"The sandbox could not be set up: {self._text(1).strip() or message}.")
        if message["message"] is None:
            return self._without_message(message["ended"], begun)
        kind, _, text = message["message"].partition("\n")
        if kind != "end":
            return self._outcome("exit" if kind == "exit" else "error", text, None, begun)
        return self._outcome_of_call(text, begun) if call else self._outcome("end", "", None, begun)

    def _without_message(self, status: int, begun: float) -> Outcome:
        if status < 0:
            with contextlib.suppress(ValueError):
                return self._outcome("killed", signal.Signals(-status).name, None, begun)
            return self._outcome("killed", f"signal {-status}", None, begun)
        return self._outcome("vanished", f"the process left with status {status} before its end", None, begun)

    def _outcome_of_call(self, text: str, begun: float) -> Outcome:
        try:
            return self._outcome("end", "", json.loads(text), begun)
        except (ValueError, RecursionError) as error:
            return self._outcome("error", f"the returned value cannot be read: {error}", None, begun)

    def _outcome(self, kind: Any, detail: str, value: Any, begun: float) -> Outcome:
        return Outcome(kind, detail, self._text(0), self._text(1), value, time.monotonic() - begun)

    def _text(self, stream: int) -> str:
        return self.captured[stream][: self.limits.output].decode("utf-8", "replace")

    def _order(self, order: dict[str, Any]) -> None:
        data = memoryview(json.dumps(order).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self.orders, data) :]
        except BrokenPipeError:
            self._failed()

    def _await_message(self, deadline: float) -> Any:
        """Read on until the keeper has sent a whole line; output is collected on the way."""
        while b"\n" not in self.pending:
            left = deadline - time.monotonic()
            ready = self.selector.select(left) if left > 0 else []
            if not ready:
                raise _LimitError("timeout", f"longer than {self.limits.seconds:g} s")
            self._drain()
            if any(len(captured) > self.limits.output for captured in self.captured):
                raise _LimitError("output", f"more than {self.limits.output} bytes")
            if self.reports in [key.fd for key, _ in ready]:
                self._receive()
        line, _, self.pending = self.pending.partition(b"\n")
        return json.loads(line)

    def _await_start(self) -> Any:
        try:
            return self._await_message(time.monotonic() + _START_SECONDS)
        except _LimitError as broken:
            raise SandboxError(f"The sandbox has not started within {_START_SECONDS:g} s.") from broken

    def _receive(self) -> None:
        data = os.read(self.reports, 1 << 16)
        if not data and self.program is not None:
            raise _LimitError("killed", "with its sandbox")  # seen by it only where the system has no filter
        if not data:
            self._failed()
        self.pending += data

    def _failed(self) -> None:
        self.stop()
        self._drain()
        raise SandboxError(f"The sandbox ended early: {self._text(1).strip() or self.process.returncode}.")

    def _drain(self) -> None:
        """Take what the program has written, a little more than it may write at most."""
        for stream, captured in zip(self.streams, self.captured, strict=True):
            while len(captured) <= self.limits.output:
                try:
                    data = os.read(stream.fileno(), 1 << 16)
                except BlockingIOError:
                    break
                if not data:
                    break
                captured += data

    def stop(self) -> None:
        """End every process of the sandbox."""
        if self.process.poll() is None:
            self.process.terminate()  # the supervisor's sign to kill and reap all others
            self.process.send_signal(signal.SIGCONT)  # should the program have been able to stop it
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_SECONDS)
        for group in filter(None, (self.program, self.process.pid)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        self.program = None
        self.process.wait(_STOP_SECONDS)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.close(self.orders)  # the keeper's sign to end
        try:
            if self.process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.2)
            self.stop()
        finally:
            self.selector.close()
            os.close(self.reports)
            for stream in self.streams:
                stream.close()
            _remove(self.folder)


class _LimitError(Exception):
    """A limit that is watched from outside was broken."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def _remove(folder: str) -> None:
    """Remove a folder whatever rights the program left on its own ones."""
    for parent, names, _ in os.walk(folder):
        for path in (os.path.join(parent, name) for name in names):
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
