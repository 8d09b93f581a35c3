"""Tables 3, 4 and 5 of the report, for results of one's own beside the published numbers.

The rule of the report's Table 3: scores whose gap does not exceed 0.3 are at the same level. It is about percent. Bits
per byte have a scale of their own, for which the report has no rule; here 0.003 bits per byte are the same level, which
is 0.3 on the hundredfold scale. Gaps are those of the numbers as they are, not as they are rounded for print.

Two results are compared in a row only where their settings agree (`lightning_dsv3.evaluation.result_files`), and with a
published number only where the result is that of the whole protocol; for the rest the reason is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from lightning_dsv3.config import ConfigError
from lightning_dsv3.evaluation import published_results as published
from lightning_dsv3.evaluation.data_table import BENCHMARKS
from lightning_dsv3.evaluation.groups import task_name
from lightning_dsv3.evaluation.result_files import ResultFile, Row, Score

# Gaps that are the same level: in percent, and in bits per byte.
SAME_LEVEL, SAME_LEVEL_BITS = 0.3, 0.003
_FOR_SMALL = "For small models"
_RULES = (
    "Bold: the best of a row, and what is at its level.",
    f"Same level (=): a gap of {SAME_LEVEL} at most, as in the report; of bits per byte, for which the report has no "
    f"rule, {SAME_LEVEL_BITS}.",
    "±: one standard error. That of a difference is of independent samples, or of pairs where both results have the "
    "samples of the same records beside them; published numbers have none and count as exact.",
    "~: a gap of more than that, but within two standard errors.",
    "Of published numbers neither seeds nor window are known; a result is held against them by its shots and records.",
)


@dataclass(frozen=True)
class Column:
    """A model of a table.

    Attributes:
        name: Its heading.
        architecture: ``MoE``, ``Dense``, or None where it is not stated.
        activated: Parameters that a token uses, as printed.
        total: Parameters, as printed.
        tokens: Tokens that it was trained on, as printed.
        scores: Score of each row that it has.
        missing: Why it has no score of the others.
        source: The file that it is from; None for published numbers.
    """

    name: str
    architecture: str | None
    activated: str | None
    total: str | None
    tokens: str | None
    scores: Mapping[Row, Score]
    missing: Mapping[Row, str] = field(default_factory=dict)
    source: ResultFile | None = None


@dataclass(frozen=True)
class Comparison:
    """One row of two columns.

    Attributes:
        gap: First minus second, in the row's unit; None where they are not compared.
        stderr: Its standard error; None where it is not known.
        level: ``same``, or whether the first is ``better`` or ``worse``; None where they are not compared.
        paired: Whether the standard error is that of pairs.
        reason: Why they are not compared.
    """

    gap: float | None = None
    stderr: float | None = None
    level: str | None = None
    paired: bool = False
    reason: str = ""

    @property
    def in_noise(self) -> bool:
        """Whether the gap, though more than the same level, is within two standard errors."""
        if self.gap is None or self.stderr is None or self.level == "same":
            return False
        return abs(self.gap) <= 2 * self.stderr


@dataclass(frozen=True)
class Cell:
    """A cell of a printed table: its text, whether it is bold, and the note that it refers to."""

    text: str
    bold: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A printed table; a line of one cell is the heading of a section."""

    title: str
    head: list[str]
    lines: list[list[Cell]]


@dataclass(frozen=True)
class Report:
    """All that is printed, and what a figure and a CSV file are made of.

    Attributes:
        title: Heading of the whole.
        tables: The tables, the main ones first.
        remarks: Sentences below them, by their heading.
        rows: The rows.
        columns: The columns; those with a source are results.
        pairs: Columns that are held against each other, as in first minus second.
        differences: Whether the figure is of the pairs; else of the scores.
    """

    title: str
    tables: list[Table]
    remarks: dict[str, list[str]]
    rows: list[Row]
    columns: list[Column]
    pairs: list[tuple[Column, Column]]
    differences: bool = False


def base_rows() -> list[Row]:
    """Return the rows of Table 3."""
    return [_row(benchmark, facts.shots) for benchmark, facts in published.ROWS.items()]


def ablation_rows() -> list[Row]:
    """Return the rows of Tables 4 and 5."""
    return [_row(benchmark, shots) for benchmark, shots in published.ABLATION_SHOTS.items()]


def small_rows() -> list[Row]:
    """Return the rows that tell small models apart: options as text, and bits per byte of the right option."""
    rows = []
    for benchmark, entry in BENCHMARKS.items():
        if entry.method == "perplexity":
            cloze, title = f"{benchmark}_cloze", published.ROWS[benchmark].title
            rows += [
                Row(_FOR_SMALL, f"{title}, cloze (EM)", entry.shots, cloze, entry.metric),
                Row(_FOR_SMALL, f"{title}, cloze, right option (BPB)", entry.shots, cloze, "bpb", bits=True),
                Row(_FOR_SMALL, f"{title}, right option (BPB)", entry.shots, benchmark, "bpb", bits=True),
            ]
    return rows


def _row(benchmark: str, shots: int | None) -> Row:
    facts, entry = published.ROWS[benchmark], BENCHMARKS[benchmark]
    label = f"{facts.title} ({facts.metric})"
    return Row(facts.section, label, shots, benchmark, entry.metric, bits=entry.method == "bits per byte")


def result_columns(files: Sequence[tuple[str | None, Path]], rows: Sequence[Row]) -> list[Column]:
    """Read results.

    Args:
        files: Each with the name of its column; None for one made of the model's.
        rows: The rows to read.

    Raises:
        ConfigError: A file is no result, or lacks what belongs to a score; a name is given twice.
    """
    results = [ResultFile(path) for _, path in files]
    taken = [model.name for model in published.BASE_MODELS.values()]
    taken += [arm.name for pair in published.ABLATION_MODELS.values() for arm in pair]
    for name, path in files:
        if name in taken:
            raise ConfigError(f"{name}={path}: there is a column of this name already; give another name")
        taken += [name] if name is not None else []
    columns = []
    for name, result in zip(_names([name for name, _ in files], results), results, strict=True):
        found = {row: result.score(row) for row in rows}
        model = result.model
        columns.append(
            Column(
                name,
                model.architecture,
                _as_printed(model.activated),
                _as_printed(model.total),
                None,
                {row: score for row, score in found.items() if isinstance(score, Score)},
                {row: reason for row, reason in found.items() if isinstance(reason, str)},
                result,
            )
        )
    return columns


def published_column(model: published.PublishedModel, rows: Sequence[Row]) -> Column:
    """Return a published model as a column."""
    scores = {row: Score(model.scores[row.benchmark]) for row in rows if row.benchmark in model.scores}
    return Column(model.name, model.architecture, model.activated, model.total, model.training_tokens, scores)


def compare(row: Row, first: Column, second: Column) -> Comparison:
    """Hold two columns against each other in a row."""
    a, b = first.scores.get(row), second.scores.get(row)
    if a is None or b is None:
        return Comparison(reason=f"no score of {first.name if a is None else second.name}")
    if reason := _hindrance(a, b):
        return Comparison(reason=reason)
    gap, stderr = a.value - b.value, None
    known = [score.stderr for score in (a, b) if score.stderr is not None]
    pairs = _paired_stderr(row, first, second)
    # A result whose own standard error is not known leaves that of the difference unknown.
    if all(score.stderr is not None for score in (a, b) if score.settings):
        stderr = math.hypot(*known) if known else None
    tolerance = SAME_LEVEL_BITS if row.bits else SAME_LEVEL
    # 89.2 - 88.9 is 0.29999999999999716 and 0.545 - 0.542 is 0.0030000000000000027.
    if round(abs(gap), 9) <= tolerance:
        level = "same"
    else:
        level = "better" if (gap < 0) == row.bits else "worse"
    return Comparison(gap, stderr if pairs is None else pairs, level, paired=pairs is not None)


def _hindrance(a: Score, b: Score) -> str:
    """Return why two scores are not compared; nothing if they are."""
    if not (a.settings and b.settings):
        return "; ".join(a.departures + b.departures)
    hindrances = []
    for name in dict.fromkeys([*a.settings, *b.settings]):
        mine, other = a.settings.get(name), b.settings.get(name)
        if mine is None and other is None:
            hindrances.append(f"{name} not stated")
        elif mine != other:
            hindrances.append(f"{name} {mine or 'not stated'} against {other or 'not stated'}")
    return "; ".join(hindrances)


def _paired_stderr(row: Row, first: Column, second: Column) -> float | None:
    if first.source is None or second.source is None:
        return None
    a = first.source.samples(row, first.scores[row])
    b = second.source.samples(row, second.scores[row]) if a else None
    if not a or not b or len(a) < 2 or a.keys() != b.keys():
        return None
    gaps = [value - b[key] for key, value in a.items()]
    mean = math.fsum(gaps) / len(gaps)
    return math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))


def best_columns(row: Row, columns: Sequence[Column]) -> set[str]:
    """Return the names of the columns that are best in a row or at the best's level.

    Columns that cannot be compared with one before them take no part. So published ones, which come first, are the
    measure; without them it is the first result.
    """
    partakers: list[Column] = []
    for column in columns:
        if column.scores.get(row) and not any(compare(row, column, other).reason for other in partakers):
            partakers.append(column)
    if len(partakers) < 2:
        return set()
    best = (min if row.bits else max)(partakers, key=lambda column: column.scores[row].value)
    return {column.name for column in partakers if compare(row, column, best).level == "same"}


def base_report(results: Sequence[Column], models: Sequence[str]) -> Report:
    """Lay out Table 3.

    Args:
        results: Results, read for :func:`base_rows` and :func:`small_rows`.
        models: Keys of the published columns.
    """
    rows = base_rows()
    small = [row for row in small_rows() if any(row in column.scores for column in results)]
    columns = [published_column(published.BASE_MODELS[key], rows) for key in models] + list(results)
    # A result comes first, so that a gap tells how far it is ahead.
    pairs = [(a, b) if b.source is None or a.source is not None else (b, a) for a, b in combinations(columns, 2)]
    all_rows = [*rows, *small]
    main = Table(
        "Table 3: base models",
        ["Benchmark (Metric)", "# Shots", *(column.name for column in columns)],
        [*_facts(columns, ("Architecture", "# Activated Params", "# Total Params")), *_score_lines(all_rows, columns)],
    )
    tables = [main, *_difference_tables(all_rows, pairs), _summary(all_rows, pairs)]
    title = "Evaluation: the DeepSeek-V3 report's Table 3"
    return Report(title, tables, _remarks(all_rows, rows, results, pairs), all_rows, columns, pairs)


def ablation_report(results: Sequence[Column], models: Sequence[str]) -> Report:
    """Lay out Tables 4 and 5.

    Args:
        results: Results by pairs (A, B, A, B, ...), read for :func:`ablation_rows`.
        models: Keys of the published pairs, as in ``4-small``.
    """
    rows = ablation_rows()
    own = list(zip(results[::2], results[1::2], strict=True))
    arms = {
        key: (published_column(a, rows), published_column(b, rows))
        for key, (a, b) in published.ABLATION_MODELS.items()
        if key in models
    }
    tables = [] if arms else [Table("Results", *_ablation_lines(rows, own))]
    for number, title in published.ABLATION_TITLES.items():
        if shown := [pair for key, pair in arms.items() if key.startswith(number)]:
            tables.append(Table(title, *_ablation_lines(rows, [*shown, *own])))
    pairs = [(b, a) for a, b in [*arms.values(), *own]]
    columns = [column for b, a in pairs for column in (a, b)]
    remarks = _remarks(rows, rows, results, [(b, a) for a, b in own])
    title = "Evaluation: the DeepSeek-V3 report's Tables 4 and 5"
    return Report(title, [*tables, _summary(rows, pairs)], remarks, rows, columns, pairs, differences=True)


def _ablation_lines(rows: Sequence[Row], pairs: Sequence[tuple[Column, Column]]) -> tuple[list[str], list[list[Cell]]]:
    head = ["Benchmark (Metric)", "# Shots"]
    lines = _facts(
        [column for pair in pairs for column in pair],
        ("# Activated Params", "# Total Params", "# Training Tokens"),
        gap_after=2,
    )
    lines += [[Cell(row.label), Cell(_shots(row))] for row in rows]
    for first, second in pairs:
        head += [first.name, second.name, "Difference"]
        for row, line in zip(rows, lines[-len(rows) :], strict=True):
            best = best_columns(row, [first, second])
            line += [_score_cell(row, column, best) for column in (first, second)]
            line.append(_difference_cell(row, second, first))
    return head, lines


def _facts(columns: Sequence[Column], names: Sequence[str], gap_after: int | None = None) -> list[list[Cell]]:
    """Lay out what is said of the models themselves; a cell is left free after each ``gap_after`` columns."""
    attributes = {
        "Architecture": "architecture",
        "# Activated Params": "activated",
        "# Total Params": "total",
        "# Training Tokens": "tokens",
    }
    lines = []
    for name in names:
        line = [Cell(name), Cell("-")]
        for number, column in enumerate(columns, 1):
            line.append(Cell(getattr(column, attributes[name]) or "-"))
            if gap_after and number % gap_after == 0:
                line.append(Cell(""))
        lines.append(line)
    return lines


def _score_lines(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[Cell]]:
    lines: list[list[Cell]] = []
    section = None
    for row in rows:
        if row.section != section:
            section = row.section
            lines.append([Cell(section, bold=True)])
        best = best_columns(row, columns)
        lines.append([Cell(row.label), Cell(_shots(row)), *(_score_cell(row, column, best) for column in columns)])
    return lines


def _difference_tables(rows: Sequence[Row], pairs: Sequence[tuple[Column, Column]]) -> list[Table]:
    """Lay out each result minus every other column, in rows where any can be compared."""
    tables = []
    for name in dict.fromkeys(first.name for first, _ in pairs if first.source is not None):
        of_result = [(first, second) for first, second in pairs if first.name == name]
        lines = [
            [Cell(row.label), *(_difference_cell(row, first, second) for first, second in of_result)]
            for row in rows
            if any(compare(row, first, second).level for first, second in of_result)
        ]
        head = ["Benchmark (Metric)", *(f"against {second.name}" for _, second in of_result)]
        if lines:
            tables.append(Table(f"Differences: {name}", head, lines))
    return tables


def _summary(rows: Sequence[Row], pairs: Sequence[tuple[Column, Column]]) -> Table:
    """Count for any two columns in how many rows they are at the same level."""
    head = ["Columns", "Better", "Same level", "Worse", "Better or worse, but ~", "Not compared"]
    lines = []
    for first, second in pairs:
        comparisons = [compare(row, first, second) for row in rows if row in first.scores and row in second.scores]
        counts = [sum(one.level == level for one in comparisons) for level in ("better", "same", "worse", None)]
        counts.insert(3, sum(one.in_noise for one in comparisons))
        lines.append([Cell(f"{first.name} against {second.name}"), *(Cell(str(count)) for count in counts)])
    return Table("Any two columns: number of rows", head, lines)


def _remarks(
    rows: Sequence[Row], required: Sequence[Row], results: Sequence[Column], pairs: Sequence[tuple[Column, Column]]
) -> dict[str, list[str]]:
    differing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for first, second in pairs:
            if row in first.scores and row in second.scores and (reason := compare(row, first, second).reason):
                who = f"{first.name} and {second.name}", reason
                if second.source is None:  # what parts a result from one published column parts it from all
                    who = f"{first.name} and published numbers", "see the notes"
                labels = differing.setdefault(who, [])
                labels += [row.label] if row.label not in labels else []
    absent: dict[tuple[str, str], list[str]] = {}
    for column in results:
        for row in required:
            if row in column.missing:
                label = f"{row.label} ({task_name(row.benchmark)})"
                absent.setdefault((column.name, column.missing[row]), []).append(label)
    files = [
        f"{column.name}: {column.source.path.name}, window of {column.source.model.window or 'unknown'} tokens"
        for column in results
        if column.source is not None
    ]
    return {
        "How to read": [*_RULES],
        "Results": files,
        "Not compared": [f"{who}, {reason}: {', '.join(labels)}" for (who, reason), labels in differing.items()],
        "Missing": [f"{who}, {reason}: {', '.join(labels)}" for (who, reason), labels in absent.items()],
    }


def _score_cell(row: Row, column: Column, best: set[str]) -> Cell:
    score = column.scores.get(row)
    if score is None:
        return Cell("-")
    return Cell(_with_error(row, score.value, score.stderr), column.name in best, "; ".join(score.departures))


def _difference_cell(row: Row, first: Column, second: Column) -> Cell:
    if row not in first.scores or row not in second.scores:
        return Cell("-")
    found = compare(row, first, second)
    if found.gap is None:
        return Cell("not compared")
    # Of two published numbers there are no more digits.
    finer = first.source is not None or second.source is not None
    mark = " =" if found.level == "same" else " ~" if found.in_noise else ""
    return Cell(_with_error(row, found.gap, found.stderr, finer=finer, sign="+") + mark)


def _with_error(row: Row, value: float, stderr: float | None, *, finer: bool = False, sign: str = "") -> str:
    digits = (3 if row.bits else 1) + finer
    error = "" if stderr is None else f" ± {stderr:.{digits}f}"
    number = f"{value:{sign}.{digits}f}"
    if not float(number):  # no -0.0
        number = f"{0:{sign}.{digits}f}"
    return number + error


def _shots(row: Row) -> str:
    return "-" if row.shots is None else f"{row.shots}-shot"


def _as_printed(count: int | None) -> str | None:
    """Write a number of parameters as the report does.

    >>> _as_printed(671026419200), _as_printed(15_706_484_224), _as_printed(77_992)
    ('671B', '15.7B', '78.0K')
    """
    if count is None:
        return None
    unit, letter = (1e9, "B") if count >= 1e9 else (1e6, "M") if count >= 1e6 else (1e3, "K")
    number = count / unit
    return f"{number:.0f}{letter}" if number >= 100 else f"{number:.1f}{letter}"


def _names(given: Sequence[str | None], results: Sequence[ResultFile]) -> list[str]:
    """Name columns by the ends of their models' paths, as long as it takes to tell them apart."""
    parts = [[part for part in Path(result.model.name).parts if part != "checkpoints"] for result in results]
    # The name of a checkpoint's file says little.
    lengths = [2 if path and path[-1].endswith(".ckpt") else 1 for path in parts]
    names: list[str] = []
    for _ in range(1 + max(map(len, parts), default=0)):
        names = [own or "/".join(path[-n:]) for own, path, n in zip(given, parts, lengths, strict=True)]
        lengths = [n + (names.count(name) > 1) for n, name in zip(lengths, names, strict=True)]
    return [
        own or (name if names.count(name) == 1 else f"{name} #{index + 1}")
        for index, (own, name) in enumerate(zip(given, names, strict=True))
    ]
