"""What is said of a wrong record: file, record, field and what it should be."""

import json
import re

import choice_records
import generation_records
import pytest
from choice_runs import write_json, write_rows

from lightning_dsv3.evaluation import data


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DSV3_DATA", str(tmp_path))
    return tmp_path


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# A benchmark's folder and file, a good row of it, and what is done to it.
BAD = [
    ("ccpm", "ccpm/valid.jsonl", choice_records.CCPM[0], {"answer": None}, "'answer' must be a whole number"),
    ("ccpm", "ccpm/valid.jsonl", choice_records.CCPM[0], {"answer": 4}, "'answer' must be 0 to 3, not 4"),
    (
        "ccpm",
        "ccpm/valid.jsonl",
        choice_records.CCPM[0],
        {"choices": ["a", " "]},
        "'choices' must hold 2 texts or more",
    ),
    ("ccpm", "ccpm/valid.jsonl", choice_records.CCPM[0], {"translation": " "}, "'translation' is empty"),
    ("c3", "c3/c3-m-dev.jsonl", choice_records.C3[0], {"answer": "六点"}, "'answer' must be one of the options"),
    (
        "arc_easy",
        "arc/arc_easy.test.jsonl",
        choice_records.ARC["test"][0],
        {"answerKey": "E"},
        "'answerKey' must be one",
    ),
    ("piqa", "piqa/valid.jsonl", choice_records.PIQA[0], {"label": 2}, "'label' must be 0 to 1"),
    (
        "winogrande",
        "winogrande/dev.jsonl",
        choice_records._winogrande(0),
        {"answer": "0"},
        "'answer' must be 1 to 2, not 0",
    ),
    (
        "winogrande",
        "winogrande/dev.jsonl",
        choice_records._winogrande(0),
        {"sentence": "No gap."},
        "'sentence' must have one gap",
    ),
    (
        "race_high",
        "race/test.high.jsonl",
        choice_records.RACE["high"][0],
        {"answer": "E"},
        "'answer' must be a letter from A to D",
    ),
    ("mmlu_pro", "mmlu_pro/test.jsonl", choice_records.PRO["test"][0], {"answer": "C"}, "'answer_index' must agree"),
    (
        "hellaswag",
        "hellaswag/hellaswag_val.jsonl",
        choice_records.HELLASWAG["train"][0],
        {"label": ""},
        "'label' must be a whole",
    ),
    (
        "pile_test",
        "pile/test.jsonl",
        choice_records.PILE[0],
        {"meta": {"pile_set_name": "Mine"}},
        "'pile_set_name' must be",
    ),
    (
        "gsm8k",
        "gsm8k/test.jsonl",
        generation_records.GSM8K["test"][0],
        {"answer": "It is 4."},
        "'answer' must end in '#### N'",
    ),
    ("math", "math/test.jsonl", generation_records.MATH["Algebra"][0], {"solution": "It is 4."}, "'solution' has no"),
    ("mbpp", "mbpp/mbpp.jsonl", generation_records.MBPP["test"][0], {"test_list": []}, "'test_list' must hold 1 texts"),
    ("cruxeval_i", "cruxeval/cruxeval.jsonl", generation_records.CRUXEVAL[0], {"output": ""}, "'output' is empty"),
]


@pytest.mark.parametrize(
    ("benchmark", "file", "good", "change", "message"), BAD, ids=[f"{one[0]} {next(iter(one[3]))}" for one in BAD]
)
def test_a_bad_record_is_named_with_file_record_and_field(folder, benchmark, file, good, change, message):
    path = folder / file
    path.parent.mkdir(parents=True)
    path.write_text(as_lines([good, {**good, **change}, good]), encoding="utf-8")
    with pytest.raises(data.DataError, match=f"{re.escape(file)}, record 2: the field {message}"):
        data.load_records(benchmark)
    (checked,) = data.check_data([benchmark])
    assert checked.records == 3
    assert len(checked.problems) == 1


def test_a_missing_field_is_named_with_those_that_are_there(folder):
    write_rows(folder / "ccpm" / "valid.jsonl", [{"translation": "?", "choices": ["a", "b"]}])
    with pytest.raises(data.DataError, match=r"record 1: the field 'answer' is missing; the record has \['choices', "):
        data.load_records("ccpm")


def test_labels_that_do_not_fit_are_an_error(folder):
    rows = [{key: row[key] for key in ("goal", "sol1", "sol2")} for row in choice_records.PIQA]
    write_rows(folder / "piqa" / "valid.jsonl", rows)
    with pytest.raises(data.MissingDataError, match=r"valid-labels\.lst is missing: the labels of valid\.jsonl"):
        data.load_records("piqa")
    (folder / "piqa" / "valid-labels.lst").write_text("0\n")
    with pytest.raises(data.DataError, match=r"valid-labels\.lst: has 1 labels for 2 records of valid\.jsonl"):
        data.load_records("piqa")


def test_check_data_finds_every_problem_of_every_file(folder):
    good = choice_records.CCPM[0]
    (folder / "ccpm").mkdir()
    (folder / "ccpm" / "valid.a.jsonl").write_text(as_lines([{**good, "answer": 9}, good, {**good, "answer": "x"}]))
    (folder / "ccpm" / "valid.b.jsonl").write_text(as_lines([{**good, "choices": []}]))
    write_rows(folder / "c3" / "c3-m-dev.json", choice_records.C3)
    write_json(folder / "c3" / "c3-d-dev.json", 7)
    found = {checked.benchmark: checked for checked in data.check_data()}
    assert set(found) == {"ccpm", "c3"}
    assert found["ccpm"].records == 4
    assert [problem.partition("ccpm/")[2].partition(": ")[0] for problem in found["ccpm"].problems] == [
        "valid.a.jsonl, record 1",
        "valid.a.jsonl, record 3",
        "valid.b.jsonl, record 1",
    ]
    assert "c3-d-dev.json, record 1: must be an object" in found["c3"].problems[0]


def test_names_that_are_not_there(folder, monkeypatch):
    with pytest.raises(ValueError, match="no benchmark 'mnlu'; there are pile_test, bbh"):
        data.load_records("mnlu")
    with pytest.raises(ValueError, match=r"mmlu has no \['botany'\]; its subsets are \['abstract_algebra'"):
        data.load_records("mmlu", "botany")
    with pytest.raises(ValueError, match="ccpm has no subsets; it has no 'x'"):
        data.load_records("ccpm", "x")
    monkeypatch.setenv("LIGHTNING_DSV3_DATA", str(folder / "nowhere"))
    with pytest.raises(data.DataError, match=r"LIGHTNING_DSV3_DATA=.*nowhere: there is no such folder"):
        data.load_records("ccpm")
