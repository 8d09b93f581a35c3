"""The command line of ``lightning run model``, read without importing torch.

Three kinds of words may come in any order:

- launcher options (``--devices 2``, ``--devices=2``), which decide what processes are started and where;
- ``key=value``, which goes to the script, except the keys of ``_OPTION_OF_KEY``: they say the same as a
  launcher option, and as processes exist before the script runs, the launcher must know them;
- the script, the first word of neither kind. Words and unknown options after it belong to the script, as
  does everything after ``--``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


class LaunchError(ValueError):
    """A command line that cannot be run: one message that names the word and the remedy."""


@dataclass(frozen=True)
class LaunchOptions:
    """What to run and on what.

    Args:
        script: the Python file.
        script_arguments: what the script gets, in the order given.
        devices: processes per node: a number, ``auto``, ``-1`` (all), or a list such as ``0,2``.
        accelerator: kind of device; None leaves the choice to Lightning.
        strategy: name of a Trainer strategy; None leaves the choice to the Trainer.
        precision: a Trainer precision or fp8-block; None leaves the choice to the script.
        num_nodes: machines that take part.
        node_rank: which of them this one is.
        main_address: address of the machine with node rank 0.
        main_port: port on that machine; None takes a free one, which only works on a single node.
    """

    script: Path
    script_arguments: tuple[str, ...] = ()
    devices: str = "1"
    accelerator: str | None = None
    strategy: str | None = None
    precision: str | None = None
    num_nodes: int = 1
    node_rank: int = 0
    main_address: str = "127.0.0.1"
    main_port: int | None = None


_OPTIONS = (
    "--accelerator",
    "--devices",
    "--main-address",
    "--main-port",
    "--node-rank",
    "--num-nodes",
    "--precision",
    "--strategy",
)
_OPTION_OF_KEY = {
    "trainer.accelerator": "--accelerator",
    "trainer.devices": "--devices",
    "trainer.num_nodes": "--num-nodes",
    "trainer.precision": "--precision",
    "trainer.strategy": "--strategy",
}
_ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
_KEY_VALUE = re.compile(r"[+~]?[A-Za-z_][\w.@/-]*=")
_NEGATIVE_NUMBER = re.compile(r"-\d+")
_DEVICES = re.compile(r"auto|-1|\d+|\d+(,\d+)+,?|\d+,")
# Strategies that start processes themselves. The launcher has started them, so the plain form is right.
_STARTS_PROCESSES = re.compile(r"_?(spawn|fork|notebook)(?=_|$)")


def parse_launch_options(words: Sequence[str]) -> LaunchOptions:
    """Read the words after ``lightning run model``.

    Raises:
        LaunchError: for a missing script, an unknown option, an impossible value, two values for one thing.

    Example:
        >>> script = __file__
        >>> options = parse_launch_options([script, "--devices=2", "model=tiny", "trainer.accelerator=cpu"])
        >>> options.devices, options.accelerator, options.script_arguments
        ('2', 'cpu', ('model=tiny',))
    """
    script: str | None = None
    script_arguments: list[str] = []
    given: dict[str, tuple[str, str]] = {}  # option -> (the words it was given with, its value)

    rest = iter(words)
    for word in rest:
        if word == "--":
            script_arguments.extend(rest)
        elif word.startswith("-") and word != "-":
            name, has_value, value = word.partition("=")
            name = name.replace("_", "-")
            if name in _OPTIONS:
                value = value if has_value else _next_value(name, rest)
                _set_once(given, name, value, source=f"{name} {value}")
            else:
                _refuse_unknown_option(word, script)
                script_arguments.append(word)
        elif _is_key_value(word):
            key, _, value = word.partition("=")
            if key in _OPTION_OF_KEY:
                _set_once(given, _OPTION_OF_KEY[key], value, source=word)
            else:
                script_arguments.append(word)
        elif script is None:
            script = word
        else:
            script_arguments.append(word)

    path = _existing_script(script)
    values = {name: value for name, (_, value) in given.items() if value not in ("null", "none", "None")}
    return _checked(path, tuple(script_arguments), values)


def _is_key_value(word: str) -> bool:
    return bool(_KEY_VALUE.match(word)) and not Path(word).is_file()


def _next_value(name: str, rest: Iterator[str]) -> str:
    value = next(rest, None)
    if value is None or (value.startswith("-") and not _NEGATIVE_NUMBER.fullmatch(value)):
        raise LaunchError(f"{name} needs a value, for example: {name} {_example(name)}")
    return value


def _example(name: str) -> str:
    return {
        "--accelerator": "cpu",
        "--main-address": "10.0.0.1",
        "--main-port": "29400",
        "--node-rank": "1",
        "--precision": "bf16-mixed",
        "--strategy": "ddp",
    }.get(name, "2")


def _set_once(given: dict[str, tuple[str, str]], name: str, value: str, source: str) -> None:
    value = _without_brackets(value) if name == "--devices" else value.strip()
    if not value:
        raise LaunchError(f"{source.strip()!r} has no value, for example: {name} {_example(name)}")
    earlier = given.setdefault(name, (source, value))
    if earlier[1] != value:
        raise LaunchError(
            f"{earlier[0]!r} and {source!r} contradict each other: both choose {name[2:]}. Give one of them."
        )


def _without_brackets(devices: str) -> str:
    """Write a list in the config's manner, ``[0, 1]``, as the launcher's ``0,1``, and ``[0]`` as ``0,``."""
    devices = devices.strip()
    if devices.startswith("[") and devices.endswith("]"):
        items = [item.strip() for item in devices[1:-1].split(",") if item.strip()]
        return ",".join(items) + ("," if len(items) == 1 else "")
    return devices.replace(" ", "")


def _refuse_unknown_option(word: str, script: str | None) -> None:
    """An option that is not ours belongs to the script, unless it comes first or looks like a slip."""
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name.replace("_", "-"), _OPTIONS, n=1, cutoff=0.8)
    hint = f" Did you mean {near[0]}?" if near else ""
    if near or script is None:
        raise LaunchError(
            f"unknown launcher option {name!r}.{hint} Options of the script itself go after '--' at the end."
        )


def _existing_script(script: str | None) -> Path:
    if script is None:
        raise LaunchError("no script was given.")
    path = Path(script)
    if path.is_file():
        return path
    what = f"{script!r} is a folder, not a script." if path.is_dir() else f"there is no file {script!r}."
    near = _similar_scripts(path)
    if near:
        what += " Did you mean " + " or ".join(near) + "?"
    else:
        what += f" The current folder is {Path.cwd()}."
    raise LaunchError(what)


def _similar_scripts(path: Path) -> list[str]:
    """Python files with a similar name: in the folder that was named, here, or one folder down."""
    if path.is_dir():
        return sorted(str(file) for file in path.glob("*.py"))[:5]
    candidates = [*path.parent.glob("*.py"), *Path().glob("*.py"), *Path().glob("*/*.py")]
    by_stem: dict[str, list[str]] = {}
    for file in dict.fromkeys(candidates):
        by_stem.setdefault(file.stem, []).append(str(file))
    stems = difflib.get_close_matches(path.stem, by_stem, n=3, cutoff=0.6)
    return [file for stem in stems for file in sorted(by_stem[stem])][:3]


def _checked(script: Path, script_arguments: tuple[str, ...], values: dict[str, str]) -> LaunchOptions:
    options = LaunchOptions(
        script=script,
        script_arguments=script_arguments,
        devices=_checked_devices(values.get("--devices", "1")),
        accelerator=_checked_accelerator(values.get("--accelerator")),
        strategy=_checked_strategy(values.get("--strategy")),
        precision=values.get("--precision"),
        num_nodes=_integer("--num-nodes", values.get("--num-nodes", "1"), low=1),
        node_rank=_integer("--node-rank", values.get("--node-rank", "0"), low=0),
        main_address=values.get("--main-address", "127.0.0.1"),
        main_port=_integer("--main-port", values["--main-port"], 1, 65535) if "--main-port" in values else None,
    )
    if options.node_rank >= options.num_nodes:
        raise LaunchError(
            f"--node-rank {options.node_rank} is out of range: with --num-nodes {options.num_nodes} "
            f"the ranks are 0 to {options.num_nodes - 1}."
        )
    if options.num_nodes > 1 and "--main-address" not in values:
        raise LaunchError(
            f"--num-nodes {options.num_nodes} needs --main-address: that of the machine with --node-rank 0."
        )
    return options


def _checked_devices(devices: str) -> str:
    if not _DEVICES.fullmatch(devices) or devices == "0":
        raise LaunchError(
            f"--devices {devices!r} is not understood: give a number (2), a list (0,2), or 'auto' for all."
        )
    return devices


def _checked_accelerator(accelerator: str | None) -> str | None:
    if accelerator == "tpu":
        raise LaunchError("--accelerator tpu cannot be started by this launcher; run the script with python itself.")
    if accelerator is not None and accelerator not in _ACCELERATORS:
        raise LaunchError(f"--accelerator {accelerator!r} is unknown; choose one of: {', '.join(_ACCELERATORS)}.")
    return accelerator


def _checked_strategy(strategy: str | None) -> str | None:
    """Pass on any name, as the Trainer knows more of them than the launcher; refuse what cannot work here."""
    if strategy is not None and _STARTS_PROCESSES.search(strategy):
        plain = _STARTS_PROCESSES.sub("", strategy) or "ddp"
        raise LaunchError(
            f"--strategy {strategy} starts its own processes, as this launcher does. Use --strategy {plain}."
        )
    return strategy


def _integer(name: str, value: str, low: int, high: int | None = None) -> int:
    try:
        number = int(value)
    except ValueError:
        raise LaunchError(f"{name} {value!r} is not a whole number.") from None
    if number < low or (high is not None and number > high):
        raise LaunchError(f"{name} {value} is out of range: it must be {low} {f'to {high}' if high else 'or more'}.")
    return number
