"""The ``dsv3`` command: what there is and what a run would do, before it is run.

Every command is one function from its words to an exit code. torch is imported only by the commands that need it, so
that presets, configurations and help answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lightning_dsv3.config import (
    ConfigError,
    DeepSeekV3Config,
    RunConfig,
    Schedule,
    did_you_mean,
    load_run_config,
    preset_names,
    read_preset,
)

_HELP = """\
usage: dsv3 COMMAND [options] [key=value ...]

Looks at models, configurations and data before a run, and at a run after it.

commands:
  presets   the models that model=NAME selects: parameters, layers, experts, context
  config    the whole configuration of a run, checked, as YAML; --plot draws its schedules
  corpus    the text that a run trains on: sources, sizes, licences, what is there and what is not
  report    a run folder as one HTML page; "report eval": results beside the report's tables
  generate  text from a checkpoint of any kind, with drafts where asked
  eval      a checkpoint on the report's benchmarks; the benchmarks themselves, and what a training text holds of them
  plan      redundant experts for serving, planned from measured loads; a drift of the load replayed through plans
  doctor    what this machine can do, and which implementation each operation takes here, with the reasons

"dsv3 COMMAND --help" tells more, with examples. "python -m lightning_dsv3 COMMAND" is the same.
A run is started by "lightning run model examples/train.py [key=value ...]", which takes the same words.
"""

_WORDS = """\
key=value words, in any order:
  model=NAME|FILE  train=NAME|FILE  study=NAME|FILE   select a preset, or a YAML file of your own
  model.hidden_size=320  train.total_tokens=2000000   change one value of it
  kernels.router=torch                                force an implementation; "dsv3 doctor" shows all of them
  config=FILE                                         lay a whole run's YAML over the presets
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``dsv3`` command.

    Args:
        argv: The words after ``dsv3``; by default those of this process.

    Returns:
        The exit code: 0, or 2 for a command line or a configuration that cannot work; 141 where the reader of the
        output has closed it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    command, *rest = words
    try:
        if command not in COMMANDS:
            raise ConfigError(f"{command!r}: there is no such command; {did_you_mean(command, COMMANDS)}")
        code = COMMANDS[command](rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, as in `dsv3 config | head`, has enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ConfigError as error:
        print(f"dsv3: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def presets(words: Sequence[str]) -> int:
    """Print a table of model presets."""
    parser = _parser(
        "presets",
        "Shows the models that model=NAME selects. Parameters are counted exactly and nothing is built.",
        """\
columns:
  total      parameters of the main model, routing bias included, MTP modules left out
  mtp        parameters of the MTP modules; embedding and head are shared and not counted again
  activated  parameters that one token uses, embedding and head included
  layers     blocks, and how many of them have experts
  experts    routed experts of such a layer + shared ones
  K          routed experts that a token uses
  context    longest sequence in tokens

examples:
  dsv3 presets
  dsv3 presets 16b my_model.yaml        some of them, and a file of your own
""",
    )
    parser.add_argument("names", nargs="*", metavar="NAME|FILE", help="presets or YAML files; all presets without any")
    names = parser.parse_args(words).names or preset_names("model")
    configs = {name: DeepSeekV3Config.from_dict(read_preset("model", name)) for name in names}
    rows = [["preset", "total", "mtp", "activated", "layers", "experts", "K", "context"]]
    for name, config in sorted(configs.items(), key=lambda item: item[1].num_parameters().total):
        count = config.num_parameters()
        rows.append(
            [
                name,
                f"{count.total:,}",
                f"{count.mtp:,}",
                f"{count.activated:,}",
                f"{config.num_hidden_layers} ({config.num_moe_layers})",
                f"{config.n_routed_experts} + {config.n_shared_experts}",
                str(config.num_experts_per_tok),
                f"{config.max_position_embeddings:,}",
            ]
        )
    print(table(rows, left=(0,)))
    for group in ("train", "study", "data"):
        if known := preset_names(group):
            print(f"{group}=  {', '.join(known)}")
    return 0


def config(words: Sequence[str]) -> int:
    """Print, check and perhaps draw a run's configuration."""
    parser = _parser(
        "config",
        "Prints the configuration that a run with these words would have, as YAML that config=FILE reads back.\n"
        "Every value is checked: an unknown key or an impossible value is one error, exit code 2.",
        f"""\
{_WORDS}
examples:
  dsv3 config model=671b train=report
  dsv3 config train.total_tokens=4000000 > run.yaml && dsv3 config config=run.yaml seed=1
  dsv3 config model=671b train=report --plot schedules.png
""",
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="see below")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw learning rate, MTP weight, bias rate and batch size over tokens (needs matplotlib)",
    )
    options = parser.parse_intermixed_args(words)
    run = load_run_config(options.words)
    if options.plot is not None:
        _plot(run, options.plot)
    print("\n".join(f"# {line}" for line in _summary(run)))
    print(run.to_yaml(), end="")
    return 0


def corpus(words: Sequence[str]) -> int:
    """Print a table of the text sources."""
    parser = _parser(
        "corpus",
        "Shows the text that a run with these words would train on. Nothing is downloaded unless --fetch asks for it;\n"
        "what is here is tokenised once into the cache, as a run would do (seconds).",
        f"""\
{_WORDS}
examples:
  dsv3 corpus                              what is here, and what a run would fetch
  dsv3 corpus --fetch                      fetch and tokenise it now, for a run without a network later
  dsv3 corpus --offline                    what a run with data.offline=true has
  dsv3 corpus model.vocab_size=8192 data.cache_dir=texts
""",
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="see below")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--fetch", action="store_true", help="fetch what is missing")
    network.add_argument("--offline", action="store_true", help="as in a run with data.offline=true: fetch nothing")
    options = parser.parse_intermixed_args(words)
    offline = ["data.offline=true"] if options.offline else []
    run = load_run_config([*options.words, *offline])
    if options.fetch and run.data.offline:
        raise ConfigError("--fetch: data.offline=true forbids it; leave one of them out")
    # torch comes with this import.
    from lightning_dsv3.cli.corpus_report import print_corpus

    print_corpus(run, fetch=options.fetch)
    return 0


def report(words: Sequence[str]) -> int:
    """Write a run's HTML page, or the tables of evaluations."""
    if words and words[0] == "eval":
        from lightning_dsv3.cli.eval_report import report as report_evaluations

        return report_evaluations(words[1:])
    parser = _parser(
        "report",
        "Writes a run folder's summary, figures, expert loads and configuration as one HTML page that needs no other\n"
        "file. A run that is still going on, or was killed, is shown as far as it has come.",
        """\
examples:
  dsv3 report runs/20261125-101500-tiny
  dsv3 report runs/20261125-101500-tiny --output page.html

"dsv3 report eval A.json [B.json ...]" prints results of evaluations beside the tables of the DeepSeek-V3 report.
""",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="where to; report.html in the run folder")
    options = parser.parse_args(words)
    output = options.output or options.run / "report.html"
    from lightning_dsv3.cli.run_report import write_report

    try:
        write_report(options.run, output)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written ({error.strerror or error})") from error
    print(f"dsv3: wrote {output}", file=sys.stderr)
    return 0


def generate(words: Sequence[str]) -> int:
    """Generate text from a checkpoint."""
    from lightning_dsv3.cli.generate import generate as run_generate

    return run_generate(words)


def evaluate(words: Sequence[str]) -> int:
    """Evaluate a checkpoint, or tell of the benchmarks."""
    from lightning_dsv3.cli.evaluate import evaluate as run_evaluate

    return run_evaluate(words)


def plan(words: Sequence[str]) -> int:
    """Plan redundant experts, or simulate a drift of the load."""
    from lightning_dsv3.cli.plan import plan as run_plan

    return run_plan(words)


def doctor(words: Sequence[str]) -> int:
    """Print what this machine can do."""
    from lightning_dsv3.cli.doctor import doctor as run_doctor

    return run_doctor(words)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "presets": presets,
    "config": config,
    "corpus": corpus,
    "report": report,
    "generate": generate,
    "eval": evaluate,
    "plan": plan,
    "doctor": doctor,
}


def table(rows: Sequence[Sequence[str]], left: Iterable[int]) -> str:
    """Lay out rows in columns, with a line under the first.

    Args:
        rows: Cells, as many in each row.
        left: Columns that start at the left; numbers end at the right.

    >>> print(table([["name", "n"], ["a", "10"]], left=(0,)))
    name   n
    --------
    a     10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _parser(command: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"dsv3 {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _summary(run: RunConfig) -> list[str]:
    count, train = run.model.num_parameters(), run.train
    first, last = f"{train.batch_sizes.samples(0).stop:,}", f"{train.batch_size:,}"
    sequences = last if first == last else f"{first} to {last}"
    return [
        f"{count.total:,} parameters, {count.activated:,} activated per token, {count.mtp:,} in MTP modules",
        f"{train.total_tokens:,} tokens in {train.max_steps:,} optimizer steps of "
        f"{sequences} sequences x {train.sequence_length:,} tokens",
    ]


def _plot(run: RunConfig, path: Path) -> None:
    from lightning_dsv3.plots import plot_schedules, plotting_problem

    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path}: the figure is a PNG; give a name that ends in .png")
    if problem := plotting_problem():
        raise ConfigError(f"--plot {path}: {problem}")
    rate = run.balance_args.aux_free.update_rate
    scheduled = run.train.scheduled
    try:
        plot_schedules(
            {
                "learning rate": scheduled("learning_rate"),
                "MTP weight": scheduled("mtp_loss_weight"),
                "bias rate": scheduled("bias_update_rate") if rate is None else Schedule.constant(rate),
                "batch size (sequences)": scheduled("batch_size"),
            },
            run.train.total_tokens,
            path,
        )
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error.strerror or error})") from error
    print(f"dsv3: drew {path}", file=sys.stderr)


def _one_line(message: str) -> str:
    first, *rest = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{first} {'; '.join(rest)}" if first.endswith(":") else "; ".join([first, *rest])
