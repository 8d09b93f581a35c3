"""docs/: the table of router families is what trying every class of the installed transformers gives.

`python tests/test_docs.py` writes it anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

import transformers
from foreign_models import family_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "balance.md"
BEGIN = "<!-- supported families: the table that the scan of transformers generates goes between these two marks -->"
END = "<!-- end of supported families -->"


def release() -> str:
    return ".".join(transformers.__version__.split(".")[:2])


def generated_table() -> str:
    """Every router class, whether the callback attaches to it, and where its bias is."""
    lines = [
        f"Generated with transformers {release()}.",
        "",
        "| family | class | bias | the callback |",
        "|---|---|---|---|",
    ]
    for row in sorted(family_table(), key=lambda row: (row.family, row.router)):
        home = f"`{row.bias}`" if row.bias else ""
        lines.append(f"| {row.family} | `{row.router}` | {home} | {row.status} |")
    return "\n".join(lines)


def written_table() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def test_the_table_of_families_is_what_the_installed_transformers_gives() -> None:
    written = written_table()
    generated = generated_table()
    if written.splitlines()[0] == generated.splitlines()[0]:
        assert written == generated
    else:  # another release has other families; those that both know must not have changed
        rows = dict(line.split("` | ", 1) for line in written.splitlines()[4:])
        known = {
            key: value for line in generated.splitlines()[4:] for key, value in [line.split("` | ", 1)] if key in rows
        }
        assert len(known) > 40
        assert known == {key: rows[key] for key in known}


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{generated_table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    sys.exit(0 if END in rest else "docs/balance.md has lost the marks of the table")
