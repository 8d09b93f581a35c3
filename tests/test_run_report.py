"""``dsv3 report``: a run folder as one page that needs no other file."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lightning_dsv3.cli import dsv3
from lightning_dsv3.config import RunConfig, load_run_config

LOADS = {
    "format": 1,
    "layers": ["layer_1", "mtp_1"],
    "domains": ["code", "<prose>"],
    "counts": {"code": [[6, 2, 0, 0], [1, 1]], "<prose>": [[2, 6, 0, 0], [3, 3]]},
    "tokens": {"code": 4, "<prose>": 4},
}
SUMMARY = {
    "name": "trial & error", "balance": ["aux_free"], "steps": 3, "tokens": 3000,
    "bits_per_byte": {"code": {"model": 2.5, "gzip": 3.0, "xz": 2.75}, "<prose>": {"model": None}},
    "max_violation": {"training_batch_start": 4.5, "training_batch_end": 0.5, "held_out_end": 0.25},
    "parameters": {"total": 7_000_000, "mtp": 2_000_000, "activated": 3_000_000, "activated_without_embedding": 1},
    "tokens_per_second": 1234.5, "training_seconds": 2.0, "stopped_by": None, "versions": {"torch": "2.13.0"},
}  # fmt: skip
METRICS = """\
step,train/tokens,train/loss,moe/max_violation,moe/layer_1/max_violation,val/code/bpb
0,1000,8.0,4.5,4.5,
1,2000,7.0,1.5,1.5,
2,3000,6.0,0.5,0.5,2.5
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "20260101-000000-trial"
    folder.mkdir()
    config: RunConfig = load_run_config(["name=trial"])
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "loads.json").write_text(json.dumps(LOADS))
    return folder


class Page(HTMLParser):
    """Text of the cells row by row, and what the page refers to. Unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.references: list[str] = []
        self.warnings: list[str] = []
        self._open: list[tuple[str, str | None]] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.references += [values[key] for key in ("src", "href") if key in values]
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "img", "br"):
            self._open.append((tag, values.get("class")))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if self._open and self._open[-1][0] in ("td", "th"):
            self.rows[-1].append(data)
            if self._open[-1][1] == "warn":
                self.warnings.append(data)


def test_the_page_has_every_figure_of_the_run_and_needs_no_other_file(run: Path) -> None:
    assert dsv3.main(["report", str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert ["tokens", "3,000 in 3 optimizer steps"] in page.rows
    assert ["code", "2.500", "3.000", "2.750"] in page.rows
    # 8 of 16 choices go to each of two of the four experts: (8 - 4) / 4; two bits of four choices would be 1.
    assert ["layer_1", "4", "1.000", "0.5000", "2"] in page.rows
    assert ["mtp_1", "2", "0.000", "1.0000", "0"] in page.rows
    assert page.warnings == ["2"]
    assert len(page.references) == 4
    assert all(re.match(r"data:image/png;base64,iVBOR", reference) for reference in page.references)


def test_names_are_shown_as_they_are(run: Path) -> None:
    dsv3.main(["report", str(run)])
    text = (run / "report.html").read_text()
    assert "<title>trial &amp; error</title>" in text
    assert "<td>&lt;prose&gt;</td>" in text
    assert "<prose>" not in text


def test_a_run_that_was_killed_is_shown_as_far_as_it_came(run: Path, tmp_path: Path) -> None:
    (run / "summary.json").unlink()
    (run / "loads.json").unlink()
    assert dsv3.main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "It has seen 3,000 tokens" in text
    assert len(Page(text).references) == 2  # loss and MaxVio


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "config.yaml").unlink(), ["no run folder", "config.yaml"]),
        (lambda run: (run / "summary.json").write_text("{"), ["summary.json", "cannot be read"]),
        (lambda run: (run / "loads.json").write_text("[]"), ["loads.json", "object"]),
        (lambda run: (run / "metrics.csv").write_text("step,train/loss\n0,abc\n"), ["metrics.csv", "abc"]),
    ],
)
def test_what_cannot_be_read_is_one_line_and_leaves_no_page(spoil, words, run: Path, capsys) -> None:
    spoil(run)
    assert dsv3.main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)
    assert not list(run.glob("*.html*"))


def test_a_folder_that_cannot_be_written_is_said(run: Path, capsys) -> None:
    assert dsv3.main(["report", str(run), "--output", str(run / "absent" / "page.html")]) == 2
    assert "--output" in capsys.readouterr().err
