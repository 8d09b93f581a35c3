"""``dsv3 doctor``: what this machine can do, and which implementation each operation takes here, with the reasons."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_dsv3.config import load_run_config

_DESCRIPTION = """\
Shows what this machine can do: versions, devices, what works and why something does not, and which implementation
each operation of a training pass takes here. Nothing is changed and nothing fails: what cannot be found out is told
in its line, and the exit code is 0. Optional libraries are loaded, which may take some seconds.
"""

_EPILOG = """\
key=value words, as a run takes them:
  model=671b                 the widths that decide; the tiny preset without it
  kernels.router=torch       what forcing an implementation would give

examples:
  dsv3 doctor
  dsv3 doctor model=671b
  dsv3 doctor --json > machine.json
  dsv3 doctor --compile              every Triton kernel compiled, for Hopper where there is no GPU (a minute or more)

docs/kernels.md tells what each implementation needs.
"""

_WIDTH = 112


def doctor(words: Sequence[str]) -> int:
    """Print what this machine can do."""
    parser = argparse.ArgumentParser(
        prog="dsv3 doctor",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="see below")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--compile", action="store_true", help="compile the Triton kernels ahead of time")
    options = parser.parse_intermixed_args(words)
    run = load_run_config(options.words)
    try:
        # torch comes with this import.
        from lightning_dsv3.cli.machine import examine
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps({"format": 1, "error": problem}) if options.json else f"torch does not load: {problem}")
        return 0
    if options.compile:
        print("dsv3: compiling the Triton kernels, which takes a minute or more", file=sys.stderr)
    report = examine(run, compile_kernels=options.compile)
    print(json.dumps(report, indent=2) if options.json else as_text(report, run.name))
    return 0


def as_text(report: Mapping[str, Any], model: str) -> str:
    """Lay out what :func:`lightning_dsv3.cli.machine.examine` found.

    Args:
        report: Its answer.
        model: Name of the model that the kernels are for.
    """
    parts = [
        _section("versions", _columns(report["versions"].items())),
        _section("processor", _columns(_processor(report["processor"]))),
        _section("GPUs", _columns(_devices(report))),
        _section("what works", _columns(_abilities(report["abilities"]))),
        _section(*_kernels(report["kernels"], model)),
    ]
    if "compiled" in report:
        parts.append(_section("Triton kernels, compiled", _columns(_compiled(report["compiled"]))))
    return "\n\n".join(parts)


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def _columns(rows: Iterable[tuple[str, Any]]) -> list[str]:
    """Lay out names and values; a long value goes on below itself."""
    listed = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in listed)
    lines = []
    for name, value in listed:
        first, *rest = _wrapped(value, _WIDTH - width - 2) or [""]
        lines += [f"{name.ljust(width)}  {first}", *(" " * (width + 2) + line for line in rest)]
    return lines


def _wrapped(text: str, width: int, further: str = "") -> list[str]:
    # Commands are to be copied, so nothing is broken at a hyphen.
    return textwrap.wrap(text, width, subsequent_indent=further, break_on_hyphens=False)


def _processor(answer: Mapping[str, Any]) -> list[tuple[str, str]]:
    threads = answer["OMP_NUM_THREADS"] or "not set"
    bfloat16 = answer["bfloat16"]
    return [
        ("name", answer["name"]),
        ("cores", f"{answer['cores']} for this process"),
        (
            "threads",
            f"{answer['threads']} used by torch; OMP_NUM_THREADS: {threads}",
        ),
        ("instructions", answer["instructions"]),
        ("BF16 in hardware", ", ".join(bfloat16) or "no" if isinstance(bfloat16, list) else bfloat16),
        ("memory", f"{answer['memory_gib']} GiB; /dev/shm {answer['shared_memory_gib']} GiB"),
    ]


def _devices(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not report["devices"]:
        return [("none", next(a["detail"] for a in report["abilities"] if a["name"] == "CUDA"))]
    rows = []
    for index, device in enumerate(report["devices"]):
        words = [device["name"]]
        if "capability" in device:
            words += [f"capability {device['capability']}", f"{device['memory_gib']} GiB"]
            words += [f"{device['processors']} multiprocessors"]
        rows.append((f"cuda:{index}", ", ".join(words)))
    return rows


def _abilities(answers: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(answer["name"], f"{'yes' if answer['works'] else 'no '}  {answer['detail']}") for answer in answers]


def _kernels(rows: Sequence[Mapping[str, Any]], model: str) -> tuple[str, list[str]]:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    by_op: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_op.setdefault(row["op"], {})[row["dtype"]] = row
    name_width = max(map(len, [*by_op, "operation"]))
    chosen = {op: [_chosen(answers[dtype]) for dtype in dtypes] for op, answers in by_op.items()}
    widths = [max(len(dtype), *(len(cells[i]) for cells in chosen.values())) for i, dtype in enumerate(dtypes)]
    indent = name_width + sum(widths) + 2 * (len(widths) + 1)

    def line(first: str, cells: Sequence[str], reasons: Sequence[str]) -> list[str]:
        start = "  ".join([first.ljust(name_width), *(c.ljust(w) for c, w in zip(cells, widths, strict=True))])
        wrapped = [
            part for reason in reasons for part in textwrap.wrap(reason, _WIDTH - indent, subsequent_indent="  ")
        ]
        return [f"{start}  {wrapped[0] if wrapped else ''}", *(" " * indent + part for part in wrapped[1:])]

    lines = line("operation", dtypes, ["why no other"])
    for op, answers in by_op.items():
        lines += line(op, chosen[op], _reasons(answers))
    device = rows[0]["device"]
    return f"kernels of a training pass on {device}, model {model}; kernels.<operation>=<name> forces one", lines


def _chosen(row: Mapping[str, Any]) -> str:
    if row["chosen"] is None:
        return "error"
    return f"{row['chosen']} (forced)" if row["forced"] else str(row["chosen"])


def _reasons(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return each reason once; with its dtype where the dtypes differ in it and it does not say so itself."""
    dtypes_of: dict[str, list[str]] = {}
    for dtype, row in answers.items():
        told = [row["error"]] if row["chosen"] is None else [f"{k}: {v}" for k, v in row["passed_over"].items()]
        for reason in told:
            dtypes_of.setdefault(reason, []).append(dtype)
    return [
        reason if len(dtypes) == len(answers) or dtypes[0] in reason else f"{reason} ({', '.join(dtypes)})"
        for reason, dtypes in dtypes_of.items()
    ]


def _compiled(answers: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for answer in answers:
        went = answer.get("error") or f"{answer['shared_memory']} bytes of shared memory"
        rows.append(
            (
                answer["kernel"],
                f"{answer['target']}: {went}" + (f", {answer['seconds']} s" if "seconds" in answer else ""),
            )
        )
    return rows or [("none", "there are no Triton kernels")]
