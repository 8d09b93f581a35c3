"""Contamination against the same thing written with sets of tuples, whatever the blocks and passes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dsv3.evaluation import contamination
from lightning_dsv3.evaluation.contamination import Overlap, Record, find_overlaps, words

text = st.lists(st.sampled_from(["a", "b", "C", "\u6c49", "\u5b57", ",", "x1"]), max_size=14).map(" ".join)
records = st.lists(st.lists(text, max_size=3), max_size=5)


def runs(texts: Sequence[str], length: int) -> set[tuple[str, ...]]:
    cut = [list(words(text)) for text in texts]
    return {tuple(found[at : at + length]) for found in cut for at in range(len(found) - length + 1)}


def expected(benchmarks: dict[str, list[Record]], documents: list[str], length: int) -> dict[str, Overlap]:
    there = runs(documents, length)
    overlaps = {}
    for name, of_it in benchmarks.items():
        wanted = {record.id: runs(record.texts, length) for record in of_it}
        shares = {id_: len(some & there) / len(some) for id_, some in wanted.items() if some}
        hits = [(id_, share) for id_, share in shares.items() if share]
        worst = sorted(hits, key=lambda pair: -pair[1])[:5]
        overlaps[name] = Overlap(len(of_it), len(of_it) - len(shares), len(hits), worst)
    return overlaps


@given(
    first=records,
    second=records,
    documents=st.lists(text, max_size=6),
    length=st.integers(1, 4),
    max_runs=st.integers(1, 20),
    block=st.integers(1, 9),
)
def test_overlaps_are_those_of_sets_of_tuples(first, second, documents, length, max_runs, block):
    benchmarks = {
        name: [Record(f"{name}{index}", texts) for index, texts in enumerate(group)]
        for name, group in {"one": first, "two": second}.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "_BLOCK", block)
        found = find_overlaps(benchmarks, lambda: documents, length=length, max_runs=max_runs)
    assert found == expected(benchmarks, documents, length)


def test_case_punctuation_and_width_do_not_hide_an_overlap():
    record = Record("q", ["The CAT sat, on the mat; it's 3.5 kg!"])
    for document in ("said: the cat\nsat on the mat (It's 3.5 kg)", "ＴＨＥ cat sat on the mat it s 3 5 kg"):
        found = find_overlaps({"task": [record]}, lambda document=document: [document], length=9)
        assert found["task"].overlapping == 1, document
    assert not find_overlaps({"task": [record]}, lambda: ["the cat sat on a mat it's 3.5 kg"], length=9)["task"].share


def test_characters_are_words_where_words_are_not_spaced():
    assert list(words("DeepSeek\u6c49\u5b57\u3042 \u0e01\u0e02")) == [
        "deepseek",
        "\u6c49",
        "\u5b57",
        "\u3042",
        "\u0e01",
        "\u0e02",
    ]
    question = "\u5929\u5730\u7384\u9ec4\u5b87\u5b99\u6d2a\u8352\u65e5\u6708\u76c8\u6603\u8fb0\u5bbf"  # 14 characters
    found = find_overlaps({"task": [Record("q", [question])]}, lambda: ["\u5343\u5b57\u6587\uff1a" + question[:13]])
    assert found["task"] == Overlap(1, 0, 1, [("q", 0.5)])


def test_a_word_of_an_indian_script_keeps_its_vowels():
    assert list(words("\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e\u0964")) == [
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\u092d\u093e\u0937\u093e",
    ]


def test_no_run_goes_from_one_text_into_the_next():
    record = Record("q", ["a b c", "d e f"])
    assert find_overlaps({"task": [record]}, lambda: ["a b c d e f"], length=4)["task"] == Overlap(1, 1, 0, [])
    assert find_overlaps({"task": [record]}, lambda: ["a b c", "d e f"], length=2)["task"].worst == [("q", 1.0)]
    assert find_overlaps({"task": [Record("q", ["a b c d"])]}, lambda: ["a b", "c d"], length=3)["task"].share == 0


def test_the_text_is_read_once_for_each_portion_of_the_benchmarks():
    passes = []

    def documents():
        passes.append(1)
        return ["a b c"]

    one = {"task": [Record(str(n), [f"a b c {n}"]) for n in range(8)]}
    find_overlaps(one, documents, length=2, max_runs=100)
    assert len(passes) == 1
    passes.clear()
    found = find_overlaps(one, documents, length=2, max_runs=6)  # two records of three runs each
    assert len(passes) == 4
    assert found["task"].overlapping == 8
    passes.clear()
    find_overlaps({"task": [Record("short", ["a"])]}, documents)
    assert not passes


def test_the_worst_are_kept_among_many():
    many = [Record(str(n), [" ".join(["known"] * (n % 10) + [f"new{n}"] * (12 - n % 10))]) for n in range(1200)]
    found = find_overlaps({"task": many}, lambda: ["known " * 20], length=1, num_worst=2)["task"]
    assert (found.records, found.overlapping) == (1200, 1080)
    assert found.worst == [("1", 0.5), ("2", 0.5)]


def test_what_cannot_be_asked_for():
    with pytest.raises(ValueError, match="length=0"):
        find_overlaps({}, lambda: [], length=0)
