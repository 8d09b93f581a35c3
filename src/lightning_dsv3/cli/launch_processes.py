"""Starting the script's processes through Lightning's launcher, and ending like an ordinary command.

Lightning's launcher hands the work to torchrun in this very process: it starts one process per device, each
in a session of its own, so the terminal's Ctrl-C reaches only us. torchrun passes a signal on and waits, but
then ends with a traceback of itself, leaves the processes orphaned when the signal comes twice, and overrides
``nohup``. Here:

- the first signal goes to the script, which gets time to save;
- a second Ctrl-C ends the script at once;
- a signal that was ignored when we started (as under ``nohup``) stays ignored;
- the exit code is the shell's: 130 after Ctrl-C, 143 after SIGTERM, otherwise the script's own.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from types import FrameType
from typing import TYPE_CHECKING

from lightning_dsv3.cli.launch_options import LaunchError, LaunchOptions

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

DEFAULT_PORT = 29400
# How long the script may take to save after a signal. torchrun's 30 seconds are short for a large checkpoint.
_SECONDS_TO_SAVE = "600"
_SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
# torchrun's reports of what is said here in one line, or happens on every Ctrl-C.
_REPEATED_REPORTS = ("Received %s death signal", "Sending process %s closing signal", "failed (exitcode: %s)")


def launch(options: LaunchOptions) -> int:
    """Run the script with one process per device, wait for it, and return the exit code for the shell.

    Raises:
        LaunchError: when the devices or the port asked for are not there; nothing was started then.
    """
    forwarder = _SignalForwarder()
    forwarder.install()  # before torch is imported: Ctrl-C in those seconds must not show a traceback either

    from lightning.fabric.cli import main as lightning_launcher
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    devices, num_processes = _resolve_devices(options)
    _prepare_environment(num_processes)
    _quiet_repeated_reports()
    forwarder.take_over_torchrun()
    arguments = Namespace(
        script=str(options.script),
        devices=devices,
        accelerator=options.accelerator,
        strategy=options.strategy,
        precision=options.precision,
        num_nodes=options.num_nodes,
        node_rank=options.node_rank,
        main_address=options.main_address,
        main_port=_choose_port(options),
    )
    try:
        lightning_launcher(arguments, list(options.script_arguments))
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as failure:
        # The script may have ended on the signal before torchrun looked.
        if forwarder.received is not None:
            return 128 + forwarder.received
        return _report_failure(failure, options)
    return 0


def _resolve_devices(options: LaunchOptions) -> tuple[str, int]:
    """Turn ``auto`` and ``-1`` into a number, so that script and launcher agree, and count the processes."""
    from lightning.fabric.accelerators import CUDAAccelerator
    from lightning.fabric.cli import _get_num_processes
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    accelerator = options.accelerator or "auto"
    devices = options.devices
    if devices in ("auto", "-1"):
        if accelerator in ("auto", "cuda", "gpu") and CUDAAccelerator.is_available():
            devices = str(CUDAAccelerator.auto_device_count())
        elif devices == "auto":
            devices = "1"
    try:
        return devices, _get_num_processes(accelerator, devices)
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise LaunchError(f"--devices {devices} --accelerator {accelerator} cannot be had here: {reason}") from error


def _prepare_environment(num_processes: int) -> None:
    # Values of a launcher further out are about its processes, not about ours.
    for name in ("LT_ACCELERATOR", "LT_STRATEGY", "LT_PRECISION"):
        os.environ.pop(name, None)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SECONDS_TO_SAVE)
    # Lightning would give each process as many threads as there are cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // max(1, num_processes))))


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _choose_port(options: LaunchOptions) -> int:
    """Take the port that was named if it is free; else a free one, or the usual one on several nodes."""
    if options.main_port is None:
        return _free_port() if options.num_nodes == 1 else DEFAULT_PORT
    if options.node_rank == 0 and not _is_free(options.main_port):
        raise LaunchError(
            f"--main-port {options.main_port} is in use by another program. Choose another one"
            + (", or leave the option out." if options.num_nodes == 1 else " on all nodes.")
        )
    return options.main_port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As torchrun's own socket: a port that a finished run has just left counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _quiet_repeated_reports() -> None:
    def is_news(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_REPEATED_REPORTS)

    for name in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").addFilter(is_news)


def _report_failure(failed: ChildFailedError, options: LaunchOptions) -> int:
    """Say in one line which process failed. Its own traceback, if it left one, stands above."""
    # torchrun lists failures as it finds them, then ends the other processes by SIGTERM. Its own choice of
    # the first one goes by times in whole seconds, which are often equal.
    failures = sorted(failed.failures.items(), key=lambda item: item[1].exitcode == -signal.SIGTERM)
    rank, failure = failures[0]
    process = f" (rank {rank})" if len(failures) > 1 or rank > 0 else ""
    if failure.exitcode < 0:
        name = failure.signal_name()
        hint = ", often a sign that memory ran out" if name == "SIGKILL" else ""
        print(f"lightning run model: {options.script}{process} was ended by {name}{hint}.", file=sys.stderr)
        return 128 - failure.exitcode
    print(
        f"lightning run model: {options.script}{process} failed with exit code {failure.exitcode}.",
        file=sys.stderr,
    )
    return int(failure.exitcode)


class _SignalForwarder:
    """What a signal means before, during and after the first request to stop."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._ignored: set[int] = set()

    def install(self) -> None:
        """From now on end quietly on a signal, until torchrun takes the signals for itself."""
        for name in _SIGNAL_NAMES:
            number = getattr(signal, name, None)
            if number is None:
                continue
            if signal.getsignal(number) is signal.SIG_IGN:
                self._ignored.add(number)
            else:
                signal.signal(number, self._end_at_once)

    def take_over_torchrun(self) -> None:
        """Be the handler that torchrun installs when it starts the processes."""
        from torch.distributed.elastic.multiprocessing import api

        api._terminate_process_handler = self._forward  # type: ignore[assignment]

    def _end_at_once(self, number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing import SignalException

        if number in self._ignored:
            return
        if self.received is not None:
            if number == signal.SIGINT:
                print("lightning run model: stopping at once, nothing more is saved.", file=sys.stderr)
                _kill_workers()
            return
        self.received = number
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        print(
            f"\nlightning run model: {name}, waiting for the script to save (Ctrl-C again ends it at once).",
            file=sys.stderr,
        )
        raise SignalException(f"got signal {number}", sigval=signal.Signals(number))


def _kill_workers() -> None:
    # torchrun keeps its processes in private attributes that move between releases; they are Popen objects in
    # all. The type is compared, as isinstance() asks every object for its class, and some warn when asked.
    for worker in [thing for thing in gc.get_objects() if type(thing) is subprocess.Popen]:
        if worker.poll() is not None:
            continue
        try:
            os.killpg(worker.pid, signal.SIGKILL)  # a session of its own: data loading processes end with it
        except ProcessLookupError:
            worker.kill()
