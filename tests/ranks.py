"""Running a function on several real processes with a gloo group, for tests.

The processes are forked from one server that has imported torch and Lightning once, and has no threads yet (a
process that has run a backward cannot be forked: its autograd engine would not survive)."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

_TIMEOUT_S = 90


def run_on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` in `world_size` processes; return what each returned, by rank.

    `function` has to be importable. A Trainer with `devices=world_size, strategy="ddp"` finds its place
    through the environment, as under a launcher."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "torch.distributed"])
    with TemporaryDirectory() as folder:
        port = _free_port()
        processes = [
            context.Process(target=_run, args=(rank, world_size, port, folder, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_TIMEOUT_S)
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        errors = [path.read_text() for path in Path(folder).glob("*.error")]
        assert not errors, "\n".join(errors)
        assert not hanging, f"ranks {hanging} hang"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
    }
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
        # Rank 0 keeps the store that the others may still be reading: nobody leaves before all are done.
        deadline = time.monotonic() + 60
        while len(list(Path(folder).glob("*.pt"))) < world_size and time.monotonic() < deadline:
            if list(Path(folder).glob("*.error")):
                break
            time.sleep(0.02)
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        # Without the others' wait for a collective that never comes.
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
