"""The result of ``reference_points.py`` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TITLES = {
    "dummies": "Dummies: the shortest option, and the one of the most frequent characters",
    "pretrained": "A pretrained model, by lm-eval's hf on our task files",
    "pretrained_texts": "Bits per byte of the pretrained model, three times",
    "trained": "The model of the default training run, by dsv3",
    "trained_subjects": "The same model, subjects with worked examples",
    "trained_generation": "The same model, what it writes",
    "trained_texts": "Bits per byte of the same model, of documents held out from training",
    "same_weights": "The same weights by dsv3 and by hf",
}
# Of a choice these, where they are there; `metric` of the row comes first.
_BESIDE = ("acc", "acc_norm")


def describe(row: Mapping[str, Any]) -> str:
    """Return a row in one line, for the terminal."""
    words = [f"{row['task']}, {row['shots']} shots, {row['records']} records:"]
    words += [
        f"{name} {_value(row, name)}" for name in dict.fromkeys([row["metric"], *_BESIDE]) if name in row["metrics"]
    ]
    if row["chance"] is not None:
        words.append(f"chance {row['chance']:.4f}")
    return "  ".join(words)


def above_chance(row: Mapping[str, Any]) -> float | None:
    """Return how many standard errors ``acc`` is above chance; None where there is no chance or no error."""
    acc = row["metrics"].get("acc")
    if row["chance"] is None or acc is None or not acc["stderr"]:
        return None
    return float((acc["value"] - row["chance"]) / acc["stderr"])


def markdown(result: Mapping[str, Any]) -> str:
    """Return the whole result as a page."""
    lines = ["# Reference points", "", f"The question: {result['question']}."]
    tables = {"pretrained_texts": _three_ways, "trained_texts": _held_out, "same_weights": _sides}
    for name, part in result["parts"].items():
        lines += ["", f"## {_TITLES[name]}", "", *_about(part), "", *tables.get(name, _scores)(part["rows"])]
    return "\n".join(lines) + "\n"


def _about(part: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    words = [f"Model: {part['model']}"]
    if "steps" in part:
        words.append(f"{part['steps']} steps, {part['tokens']:,} tokens of training")
    if "parameters" in part:
        words.append(f"{part['parameters']:,} parameters, {part['activated']:,} of them activated")
    if "window" in part:
        words.append(f"window of {part['window']} tokens")
    return [f"`{part['command']}`", "", f"{', '.join(words)}. {versions}."]


def _scores(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["task", "shots", "records", "headline", "acc", "acc_norm", "chance", "above chance", "bits/byte", "cut"]
    body = []
    for row in rows:
        above = above_chance(row)
        body.append(
            [
                row["task"],
                str(row["shots"]),
                f"{row['records']} of {row['of']}" + (f" ({row['notes']})" if row["notes"] else ""),
                f"{row['metric']} {_value(row, row['metric'])}",
                *(_value(row, name) for name in _BESIDE),
                "" if row["chance"] is None else f"{row['chance']:.4f}",
                "" if above is None else f"{above:+.1f} σ",
                _value(row, "bpb"),
                "" if row["beyond_window"] is None else str(row["beyond_window"]),
            ]
        )
    notes = (
        "± is one standard error; chance is the mean of one over the number of options, and `above chance` is of "
        "acc. `bits/byte` is of the right option. `cut`: records whose prompt loses its beginning, as it is "
        "longer than the window."
    )
    return [*_table(head, body), "", notes]


def _three_ways(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["text", "tokens", "bytes", "windows", "by our task", "by plain forward passes", "by BitsPerByte"]
    body = [
        [row["text"], *(str(row[name]) for name in ("tokens", "bytes", "windows"))]
        + [f"{row[name]:.6f}" for name in ("task", "plain", "metric")]
        for row in rows
    ]
    return _table(head, body)


def _held_out(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["domain", "window", "documents", "bytes", "bits per byte", "validation in training"]
    body = [
        [
            row["domain"],
            str(row["window"]),
            str(row["documents"]),
            f"{row['bytes']:,}",
            _with_error(row["bits_per_byte"], row["stderr"]),
            "" if row["validation"] is None else f"{row['validation']:.4f}",
        ]
        for row in rows
    ]
    notes = (
        "Test documents of the corpus, whole, in windows of the longest text that the model takes and, if shorter, of "
        "the length that it has seen in training. Validation in training is of other documents, in windows of that "
        "length that begin anywhere in a text."
    )
    return [*_table(head, body), "", notes]


def _sides(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["task", "records", "metric", "dsv3", "hf", "answers"]
    body = []
    for row in rows:
        if "equal_texts" in row:
            answers = f"{row['equal_texts']:.0%} of {row['requests']} texts equal"
        elif "bits_apart" in row:
            answers = f"a document at most {row['bits_apart']:.1e} bits per byte apart"
        else:
            answers = f"{row['requests']} log-likelihoods at most {row['difference']:.1e} nats apart"
        values = [f"{row[side]:.6f}" for side in ("ours", "hf")]
        body.append([row["task"], str(row["records"]), row["metric"], *values, answers])
    return _table(head, body)


def _value(row: Mapping[str, Any], name: str) -> str:
    found = row["metrics"].get(name)
    return "" if found is None else _with_error(found["value"], found["stderr"])


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return ["| " + " | ".join(line) + " |" for line in lines]
