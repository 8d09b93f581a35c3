"""Published files of every kind give the same rows, and a broken one is named with the place."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from choice_runs import write_csv, write_json

from lightning_dsv3.evaluation.data_files import DataError, read_rows

ROWS = [{"question": 'He said "no;\nwhy, 二?"', "answer": "B"}, {"question": "x\u2028y", "answer": "A"}]


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_one_content_in_every_kind_of_file(tmp_path):
    lines = as_lines(ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\n\n"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "e.json").write_bytes(lines)  # as FewCLUE's
    write_json(tmp_path / "f.json", ROWS)
    table = [list(ROWS[0]), *[list(row.values()) for row in ROWS]]
    write_csv(tmp_path / "g.csv", table)
    write_csv(tmp_path / "h.csv", table, delimiter=";")
    write_csv(tmp_path / "i.csv", table, encoding="utf-8-sig")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "j.parquet")
    read = {path.name: read_rows(path) for path in tmp_path.iterdir()}
    assert len(read) == 10
    assert all(rows == ROWS for rows in read.values()), read


def test_tsv_has_no_header(tmp_path):
    (tmp_path / "a.tsv").write_text('Is "1" more?\t1\r\n2\u2028?\t2,125\n', encoding="utf-8")
    assert read_rows(tmp_path / "a.tsv") == [{"0": 'Is "1" more?', "1": "1"}, {"0": "2\u2028?", "1": "2,125"}]


def test_csv_of_a_spreadsheet(tmp_path):
    (tmp_path / "a.csv").write_bytes("question,answer\ncaf\xe9,1\n".encode("latin-1"))
    assert read_rows(tmp_path / "a.csv") == [{"question": "café", "answer": "1"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: is no JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl, line 2: must be an object of fields, not a list"),
        ("a.json", '{"a": ', r"a\.json: is no JSON"),
        ("a.json", "[1]", r"a\.json, record 1: must be an object or a list, not a int"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, record 2: has 1 cells where the header has 2"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_a_truncated_archive_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(as_lines(ROWS).encode() * 99)[:80])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: cannot be read"):
        read_rows(tmp_path / "a.jsonl.gz")
