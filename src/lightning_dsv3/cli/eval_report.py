"""``dsv3 report eval``: results of evaluations beside the report's tables, as Markdown, HTML or CSV."""

from __future__ import annotations

import argparse
import base64
import csv
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from lightning_dsv3.config import ConfigError, did_you_mean
from lightning_dsv3.evaluation import published_results as published
from lightning_dsv3.evaluation import report as reports
from lightning_dsv3.evaluation.report import Cell, Column, Report, Table, compare
from lightning_dsv3.evaluation.result_files import Row
from lightning_dsv3.plots import plot_benchmarks, plotting_problem

_DESCRIPTION = """\
Prints results of evaluations beside the published numbers of the DeepSeek-V3 report: its Table 3, or Tables 4 and 5.
The files are those that "dsv3 eval --output" and "lm_eval --output_path" write, with the model dsv3, hf or another of
lm-eval's, on the tasks dsv3_*.
"""

_EPILOG = """\
Scores whose gap is 0.3 at most are at the same level, as in the report. Results that differ in task version, shots,
seed, window or records are not compared but named, as are those of a part of a benchmark beside published numbers.
Where samples were logged beside both results (--log-samples), standard errors of differences are of pairs.

--layout ablation takes the results by pairs, A and B, and gives B minus A: one pair, or one for each size.

published columns:
  base       deepseek-v2, qwen2.5-72b, llama-3.1-405b, deepseek-v3
  ablation   4-small, 4-large (multi-token prediction), 5-small, 5-large (loss-free balancing): pairs
  none       results alone

examples:
  dsv3 report eval results/tiny/results_2026-11-25T10-15-00.json
  dsv3 report eval ours=a/results_A.json hf=b/results_B.json --output table3.html
  dsv3 report eval baseline=A.json mtp=B.json --layout ablation --columns 4-small --figure mtp.png
"""

_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } img { max-width: 100%; } ol, ul { padding-left: 1.3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .9rem .15rem 0; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
td.section { font-weight: 600; padding-top: .8rem; } sup { color: #b00020; }
"""

_SUFFIXES = {".md": "markdown", ".html": "html", ".htm": "html", ".csv": "csv"}
_LAYOUTS = {"base": list(published.BASE_MODELS), "ablation": list(published.ABLATION_MODELS)}


def report(words: Sequence[str]) -> int:
    """Print or write the report; return the exit code."""
    options = _parser().parse_args(words)
    models = _models(options.layout, options.columns)
    if options.figure is not None:
        if options.figure.suffix.lower() != ".png":
            raise ConfigError(f"--figure {options.figure}: the figure is a PNG; give a name that ends in .png")
        if problem := plotting_problem():
            raise ConfigError(f"--figure {options.figure}: {problem}")
    files = [_named(word) for word in options.results]
    if options.layout == "ablation":
        if len(files) % 2:
            raise ConfigError(f"--layout ablation: takes results by pairs, A and B; {len(files)} cannot be paired")
        content = reports.ablation_report(reports.result_columns(files, reports.ablation_rows()), models)
    else:
        rows = [*reports.base_rows(), *reports.small_rows()]
        content = reports.base_report(reports.result_columns(files, rows), models)
    suffix = "" if options.output is None else options.output.suffix.lower()
    text = _FORMATS[options.format or _SUFFIXES.get(suffix, "markdown")](content)
    if options.figure is not None:
        _written("--figure", options.figure, lambda: _draw(content, options.figure))
    if options.output is None:
        print(text, end="")
    else:
        _written("--output", options.output, lambda: _save(text, options.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv3 report eval",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "results", nargs="+", metavar="[NAME=]FILE.json", help="results, each with a name for its column if you like"
    )
    parser.add_argument("--layout", choices=list(_LAYOUTS), default="base", help="Table 3, or Tables 4 and 5; base")
    parser.add_argument("--columns", metavar="A,B", help="published columns, see below; all of the layout")
    parser.add_argument("--format", choices=list(_FORMATS), help="as --output ends in .md, .html or .csv; markdown")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to; standard output")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the scores too (HTML holds the figure)")
    return parser


def _models(layout: str, columns: str | None) -> list[str]:
    known = _LAYOUTS[layout]
    if columns is None:
        return list(known)
    if columns == "none":
        return []
    chosen = [word.strip() for word in columns.split(",") if word.strip()]
    for word in chosen:
        if word not in known:
            raise ConfigError(f"--columns {word}: no published column; {did_you_mean(word, [*known, 'none'])}")
    return list(dict.fromkeys(chosen))


def _named(word: str) -> tuple[str | None, Path]:
    name, sign, path = word.partition("=")
    if not sign or Path(word).exists():
        return None, Path(word)
    if not name or not path:
        raise ConfigError(f"{word}: must be FILE.json or NAME=FILE.json")
    return name, Path(path)


def _written(option: str, path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror or error})") from error
    print(f"dsv3: wrote {path}", file=sys.stderr)


def _save(text: str, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _draw(content: Report, path: Path) -> None:
    if content.differences:
        pairs = {f"{first.name} - {second.name}": (first, second) for first, second in content.pairs}
        drawn = {name: _gaps(content.rows, *pair) for name, pair in pairs.items()}
        results = [name for name, (first, _) in pairs.items() if first.source is not None]
        labels = "difference (points)", "difference (bits per byte; below 0 is better)"
        bands = dict(zip(labels, (reports.SAME_LEVEL, reports.SAME_LEVEL_BITS), strict=True))
    else:
        drawn = {
            column.name: {row.label: (score.value, score.stderr) for row, score in column.scores.items()}
            for column in content.columns
        }
        results = [column.name for column in content.columns if column.source is not None]
        labels, bands = ("score (percent)", "bits per byte (lower is better)"), None
    known = {label for scores in drawn.values() for label in scores}
    panels = {
        label: [row.label for row in content.rows if row.label in known and row.bits == bits]
        for label, bits in zip(labels, (False, True), strict=True)
    }
    if not known:
        raise ConfigError("no figure: there is nothing to draw, as no row has a score or none can be compared")
    plot_benchmarks(drawn, panels, results, path, bands)


def _gaps(rows: Sequence[Row], first: Column, second: Column) -> dict[str, tuple[float, float | None]]:
    found = {row.label: compare(row, first, second) for row in rows}
    return {label: (one.gap, one.stderr) for label, one in found.items() if one.gap is not None}


class _Notes:
    """Numbers for what is told below a table, in the order in which it is met."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, cell: Cell) -> int | None:
        """Return the number of a cell's note."""
        if not cell.note:
            return None
        if cell.note not in self.texts:
            self.texts.append(cell.note)
        return self.texts.index(cell.note) + 1


def _markdown(content: Report) -> str:
    notes = _Notes()
    parts = [f"# {content.title}"]
    for table in content.tables:
        parts += [f"## {table.title}", _markdown_table(table, notes)]
    if notes.texts:
        parts += ["## Notes", "\n".join(f"{n}. {_plain(text)}" for n, text in enumerate(notes.texts, 1))]
    for title, sentences in content.remarks.items():
        if sentences:
            parts += [f"## {title}", "\n".join(f"- {_plain(sentence)}" for sentence in sentences)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table, notes: _Notes) -> str:
    def shown(cell: Cell) -> str:
        text = f"**{_plain(cell.text)}**" if cell.bold else _plain(cell.text)
        number = notes.number(cell)
        return text if number is None else f"{text} [{number}]"

    width = len(table.head)
    lines = [[_plain(text) for text in table.head], ["---", *["---:"] * (width - 1)]]
    lines += [[*map(shown, line), *[""] * (width - len(line))] for line in table.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Keep what a name may have in it from being taken for Markdown."""
    return "".join(f"\\{char}" if char in "\\|*_`[]<~" else char for char in text)


def _html(content: Report) -> str:
    notes = _Notes()
    body = [f"<h1>{escape(content.title)}</h1>"]
    for number, table in enumerate(content.tables):
        body += [f"<h2>{escape(table.title)}</h2>", _html_table(table, notes)]
        if number == 0:
            body.append(_html_figure(content))
    if notes.texts:
        body.append("<h2>Notes</h2><ol>" + "".join(f"<li>{escape(text)}</li>" for text in notes.texts) + "</ol>")
    for title, sentences in content.remarks.items():
        if sentences:
            items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
            body.append(f"<h2>{escape(title)}</h2><ul>{items}</ul>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(content.title)}</title>'
        f"<style>\n{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _html_table(table: Table, notes: _Notes) -> str:
    def shown(cell: Cell) -> str:
        text = f"<b>{escape(cell.text)}</b>" if cell.bold else escape(cell.text)
        number = notes.number(cell)
        return f"<td>{text}</td>" if number is None else f"<td>{text}<sup>{number}</sup></td>"

    lines = ["<tr>" + "".join(f"<th>{escape(text)}</th>" for text in table.head) + "</tr>"]
    for line in table.lines:
        if len(line) == 1:
            lines.append(f'<tr><td class="section" colspan="{len(table.head)}">{escape(line[0].text)}</td></tr>')
        else:
            lines.append(f"<tr>{''.join(map(shown, line))}</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _html_figure(content: Report) -> str:
    if problem := plotting_problem():
        return f"<p>No figure: {escape(problem)}</p>"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        try:
            _draw(content, path)
        except ConfigError as error:
            return f"<p>{escape(str(error)).capitalize()}</p>"
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="scores by benchmark" src="data:image/png;base64,{data}"></p>'


def _csv(content: Report) -> str:
    """Write a line for each row: the scores, and the difference of each pair. Numbers are not rounded."""
    head = ["section", "benchmark", "unit", "shots"]
    for column in content.columns:
        head += [column.name, *([] if column.source is None else [f"{column.name}: stderr", f"{column.name}: note"])]
    for first, second in content.pairs:
        name = f"{first.name} - {second.name}"
        head += [name, f"{name}: stderr", f"{name}: level", f"{name}: note"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for name in ("architecture", "activated", "total", "tokens"):
        facts = [getattr(column, name) for column in content.columns]
        if any(facts):
            line = ["model", name, "", ""]
            for column, fact in zip(content.columns, facts, strict=True):
                line += [fact or "", *([] if column.source is None else ["", ""])]
            writer.writerow([*line, *[""] * (len(head) - len(line))])
    for row in content.rows:
        writer.writerow(_csv_line(row, content))
    return text.getvalue()


def _csv_line(row: Row, content: Report) -> list[str]:
    unit = "bits per byte" if row.bits else "percent"
    line = [row.section, row.label, unit, "" if row.shots is None else str(row.shots)]
    for column in content.columns:
        score = column.scores.get(row)
        line.append("" if score is None else _digits(score.value))
        if column.source is not None:
            note = column.missing.get(row, "") if score is None else "; ".join(score.departures)
            line += ["" if score is None else _digits(score.stderr), note]
    for first, second in content.pairs:
        line += _csv_pair(row, first, second)
    return line


def _csv_pair(row: Row, first: Column, second: Column) -> list[str]:
    found = compare(row, first, second)
    if found.gap is None:
        level = "not compared" if row in first.scores and row in second.scores else ""
        return ["", "", level, found.reason]
    note = "pairs" if found.paired else ""
    return [_digits(found.gap), _digits(found.stderr), found.level or "", note]


def _digits(value: float | None) -> str:
    return "" if value is None else repr(round(value, 9))


_FORMATS: dict[str, Callable[[Report], str]] = {"markdown": _markdown, "html": _html, "csv": _csv}
