"""The ``lightning`` command: ``lightning run model SCRIPT ...``, and a way through to all else it can mean.

Lightning dropped ``lightning run model`` after 2.4 and kept the launcher behind it as ``fabric run``. This
module puts the command back on top of that launcher. The name ``lightning`` also belongs to the package
``lightning_sdk``; whichever is installed later owns the script. So every other word is handed to that
package, or to ``fabric`` without it, and ``python -m lightning_dsv3 run model`` always works.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lightning_dsv3.cli.launch_options import LaunchError, parse_launch_options

_USAGE = "usage: lightning run model [launcher options] SCRIPT [key=value ...]"

_HELP = f"""\
{_USAGE}

Runs a training script with one process per device.

examples:
  lightning run model examples/train.py
  lightning run model examples/train.py model=tiny trainer.max_steps=20
  lightning run model --devices 2 --accelerator cpu examples/train.py
  lightning run model --devices 8 --precision bf16-mixed examples/train.py model=16b
  lightning run model --num-nodes 2 --node-rank 0 --main-address 10.0.0.1 --devices 8 examples/train.py

launcher options, before or after the script, with a space or '=':
  --devices N|LIST|auto   processes per machine: a number, a list of devices (0,2), or all (default: 1)
  --accelerator NAME      auto, cpu, gpu, cuda or mps (default: what the machine has)
  --strategy NAME         any strategy of the Trainer: ddp, fsdp, ddp_find_unused_parameters_true, ...
  --precision NAME        any precision of the Trainer: 32-true, bf16-mixed, bf16-true, ..., or fp8-block
  --num-nodes N           machines that take part (default: 1)
  --node-rank N           which of them this is, from 0; run the same command on each
  --main-address HOST     the machine with node rank 0
  --main-port PORT        a port there (default: a free one, or 29400 with several machines)
  --help                  this text

key=value, anywhere:
  goes to the script, which reads it over its defaults: model=16b chooses a preset, model.num_hidden_layers=4
  changes one field of it. trainer.devices, trainer.num_nodes, trainer.accelerator, trainer.strategy and
  trainer.precision mean the same as the options above, so give either.
  kernels.router=torch forces an implementation ("dsv3 doctor" lists them).
  Unknown options after the script, and everything after '--', also go to the script.

Ctrl-C lets the script save and ends with exit code 130; a second Ctrl-C ends it at once.
"python -m lightning_dsv3 run model" is the same command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``lightning`` command.

    Args:
        argv: the words after ``lightning``; by default those of this process.

    Returns:
        The exit code: 0, 2 for a command line that cannot be run, 130 after Ctrl-C, or the script's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["run", "model"]:
        return _run_model(words[2:])
    if not words or words[0] in ("-h", "--help"):
        print(f"{_USAGE}\n       see lightning run model --help; all other commands:\n", flush=True)
    return _hand_over(words)


def _run_model(words: list[str]) -> int:
    before_separator = words[: words.index("--")] if "--" in words else words
    if "-h" in before_separator or "--help" in before_separator:
        print(_HELP, end="")
        return 0
    try:
        options = parse_launch_options(words)
        # torch comes with this import, a few seconds that --help and a slip of the pen do without.
        from lightning_dsv3.cli.launch_processes import launch

        return launch(options)
    except LaunchError as error:
        print(
            f"lightning run model: {error}\n{_USAGE}\n       lightning run model --help tells more",
            file=sys.stderr,
        )
        return 2


def _hand_over(words: list[str]) -> int:
    """Give a command that is not ours to ``lightning_sdk`` when that is installed, else to ``fabric``."""
    # `lightning run script.py` was Lightning's as well, and is `fabric run script.py` now.
    is_fabric_run = words[:1] == ["run"] and any(word.endswith(".py") for word in words)
    command = None if is_fabric_run else _sdk_command()
    if command is None:
        command = _fabric_command()
    sys.argv = ["lightning", *words]
    result = command()
    return result if isinstance(result, int) else 0


def _sdk_command() -> Callable[[], Any] | None:
    """Find the ``lightning`` command of ``lightning_sdk``, or None when that is not installed."""
    try:
        scripts = importlib.metadata.distribution("lightning-sdk").entry_points
    except importlib.metadata.PackageNotFoundError:
        return None
    for script in scripts:
        if script.group == "console_scripts" and script.name == "lightning":
            try:
                return script.load()
            except ImportError as error:
                raise SystemExit(f"lightning: lightning_sdk is installed but cannot be imported: {error}") from error
    return None


def _fabric_command() -> Callable[[], Any]:
    from lightning.fabric import cli

    if not hasattr(cli, "_main"):
        raise SystemExit("lightning: Lightning's own command line needs click: pip install click")
    return cli._main
