"""Records of the benchmarks: from a fake hub, from published files of every kind, and what is said of bad ones.

Records are look-alikes; those of the data sets may not be copied, so the tests on them need the folder that
LIGHTNING_DSV3_DATA names.
"""

import fnmatch
import os
from pathlib import Path

import choice_records
import datasets
import generation_records
import pytest
from choice_runs import write_csv, write_json, write_rows

from lightning_dsv3.evaluation import data
from lightning_dsv3.evaluation.data_records import Row

REAL = os.environ.get("LIGHTNING_DSV3_DATA")
# Table 3 of the report, in its order, and its methods (section 4.4.1).
TABLE_3 = """
    Pile-test -, BBH 3, MMLU 5, MMLU-Redux 5, MMLU-Pro 5, DROP 3, ARC-Easy 25, ARC-Challenge 25, HellaSwag 10, PIQA 0,
    WinoGrande 5, RACE-Middle 5, RACE-High 5, TriviaQA 5, NaturalQuestions 5, AGIEval 0, HumanEval 0, MBPP 3,
    LiveCodeBench-Base 3, CRUXEval-I 2, CRUXEval-O 2, GSM8K 8, MATH 4, MGSM 8, CMath 3, CLUEWSC 5, C-Eval 5, CMMLU 5,
    CMRC 2018 1, C3 0, CCPM 0, MMMLU-non-English 5
"""
PERPLEXITY = """
    HellaSwag, PIQA, WinoGrande, RACE-Middle, RACE-High, MMLU, MMLU-Redux, MMLU-Pro, MMMLU-non-English, ARC-Easy,
    ARC-Challenge, C-Eval, CMMLU, C3, CCPM
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DSV3_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """The look-alikes of both kinds; asked tells what was asked for."""
    splits = {**generation_records.hub(), **choice_records.hub()}
    asked = []

    def load(path, name=None, *, split, data_files=None):
        key = data_files[split][0] if data_files else path, name, split
        asked.append(key)
        return splits[key]

    monkeypatch.delenv("LIGHTNING_DSV3_DATA", raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    splits["asked"] = asked
    return splits


# The table


def test_the_table_is_table_3():
    expected = {}
    for entry in " ".join(TABLE_3.split()).split(", "):
        title, _, shots = entry.rpartition(" ")
        expected[title] = 0 if shots == "-" else int(shots)
    assert {entry.title: entry.shots for entry in data.BENCHMARKS.values()} == expected
    perplexity = set(" ".join(PERPLEXITY.split()).split(", "))
    assert {entry.title for entry in data.BENCHMARKS.values() if entry.method == "perplexity"} == perplexity
    others = {entry.title: entry.method for entry in data.BENCHMARKS.values() if entry.title not in perplexity}
    assert others.pop("Pile-test") == "bits per byte"
    assert set(others.values()) == {"generation"}


def test_metrics_are_those_of_the_report():
    metrics = {name: entry.metric for name, entry in data.BENCHMARKS.items()}
    assert {name for name, metric in metrics.items() if metric == "acc_uncond"} == {"arc_easy", "arc_challenge"}
    passed = {"humaneval", "mbpp", "livecodebench", "cruxeval_i", "cruxeval_o"}
    assert {name for name, metric in metrics.items() if metric == "pass@1"} == passed
    assert metrics["drop"] == "f1"
    assert metrics["pile_test"] == "bits_per_byte"


# Files


def test_any_file_that_begins_with_the_stem_counts(folder):
    write_rows(folder / "ccpm" / "valid.part1.jsonl", choice_records.CCPM[:1])
    write_rows(folder / "ccpm" / "valid.part2.jsonl", choice_records.CCPM[1:])
    write_rows(folder / "ccpm" / "test_public.jsonl", [{"translation": "?", "choices": ["a", "b", "c", "d"]}])
    (folder / "ccpm" / "valid.txt").write_text("no records")
    assert data.used_files("ccpm") == ["ccpm/valid.part1.jsonl", "ccpm/valid.part2.jsonl"]
    assert [record["answer"] for record in data.load_records("ccpm")] == [0, 2]


def test_files_that_lie_beside_the_records_are_left_alone(folder):
    write_rows(folder / "winogrande" / "dev.jsonl", choice_records.WINOGRANDE["validation"])
    (folder / "winogrande" / "dev-labels.lst").write_text("1\n2\n")
    write_rows(folder / "gsm8k" / "test.jsonl", generation_records.GSM8K["test"])
    write_rows(folder / "gsm8k" / "test_socratic.jsonl", [{"question": "?", "answer": "Why? #### 1"}])
    for name in ("dev_0", "dev_few_all"):
        rows = [{**row, "label": str(row["label"]).lower()} for row in generation_records.CLUEWSC["validation"]]
        write_rows(folder / "cluewsc" / f"{name}.json", rows)
    files = {name: data.used_files(name) for name in ("winogrande", "gsm8k", "cluewsc")}
    assert files == {
        "winogrande": ["winogrande/dev.jsonl"],
        "gsm8k": ["gsm8k/test.jsonl"],
        "cluewsc": ["cluewsc/dev_few_all.json"],
    }
    assert len(data.load_records("cluewsc")) == len(generation_records.CLUEWSC["validation"])


def test_a_file_belongs_to_the_longest_stem(folder):
    names = ["sat-en", "sat-en-without-passage", "sat-math", "math"]
    for name in names:
        write_rows(folder / "agieval" / f"{name}.jsonl", generation_records.AGIEVAL[name])
    assert {name: data.used_files("agieval", name) for name in names} == {
        name: [f"agieval/{name}.jsonl"] for name in names
    }
    assert data.coverage("agieval").present == ("math", "sat-en", "sat-en-without-passage", "sat-math")


def test_the_same_record_in_two_files_is_an_error(folder):
    write_rows(folder / "ccpm" / "valid.jsonl", choice_records.CCPM)
    write_rows(folder / "ccpm" / "valid.head.jsonl", choice_records.CCPM[1:])
    with pytest.raises(data.DataError, match=r"valid\.jsonl, record 2: is in valid\.head\.jsonl too"):
        data.load_records("ccpm")


# One shape


def test_every_benchmark_loads_from_the_hub(hub):
    for name, entry in data.BENCHMARKS.items():
        assert data.load_records(name), name
        if entry.pool is not None:
            assert data.load_records(name, split="shots"), name
        elif entry.pool_of is None:
            with pytest.raises(ValueError, match=f"{name} has no part 'shots'"):
                data.load_records(name, split="shots")


@pytest.mark.parametrize("kind", ["letters without a header", "numbers under a header"])
def test_mmlu_files_give_the_records_of_the_hub(hub, folder, monkeypatch, kind):
    monkeypatch.delenv("LIGHTNING_DSV3_DATA")
    expected = data.load_records("mmlu", "abstract_algebra")
    assert set(hub["asked"]) == {("cais/mmlu", "all", "test")}
    monkeypatch.setenv("LIGHTNING_DSV3_DATA", str(folder))
    rows = [row for row in choice_records.MMLU_TEST if row["subject"] == "abstract_algebra"]
    table = [[row["question"], *row["choices"], row["answer"]] for row in rows]
    if kind == "letters without a header":
        table = [[*row[:-1], "ABCD"[row[-1]]] for row in table]
    else:
        table = [["question", "choice0", "choice1", "choice2", "choice3", "answer"], *table]
    write_csv(folder / "mmlu" / "test" / "abstract_algebra_test.csv", table)
    write_rows(folder / "mmlu" / "dev" / "abstract_algebra_dev.jsonl", rows)
    assert data.load_records("mmlu", "abstract_algebra") == expected
    assert expected[0]["answer"] == 1  # of a class label


def test_files_and_hub_give_the_same_records(hub, folder, monkeypatch):
    """Published files of another shape than the hub's rows."""
    c3 = [
        [row["context"], [{name: row[name] for name in ("question", "choice", "answer")}], "1"]
        for row in choice_records.C3
    ]
    write_json(folder / "c3" / "c3-m-dev.json", c3[:1])
    write_json(folder / "c3" / "c3-d-dev.json", c3[1:])
    race = choice_records.RACE["middle"]
    articles = {row["article"]: [one for one in race if one["article"] == row["article"]] for row in race}
    write_json(
        folder / "race" / "test.middle.json",
        [
            {
                "article": article,
                **{
                    name + "s" if name != "options" else name: [one[name] for one in rows]
                    for name in ("question", "options", "answer")
                },
            }
            for article, rows in articles.items()
        ],
    )
    piqa = choice_records.PIQA
    write_rows(
        folder / "piqa" / "valid.half.jsonl", [{key: row[key] for key in ("goal", "sol1", "sol2")} for row in piqa]
    )
    (folder / "piqa" / "valid-labels.half.lst").write_text("".join(f"{row['label']}\n" for row in piqa))
    drop = {}
    for row in generation_records.DROP:
        section = drop.setdefault(row["section_id"], {"passage": row["passage"], "qa_pairs": []})
        more = without_ids(row["validated_answers"])
        others = [dict(zip(more, values, strict=True)) for values in zip(*more.values(), strict=True)]
        section["qa_pairs"].append(
            {**{name: row[name] for name in ("question", "query_id", "answer")}, "validated_answers": others}
        )
    write_json(folder / "drop" / "drop_dataset_dev.json", drop)
    write_json(
        folder / "triviaqa" / "wikipedia-dev.json",
        {
            "Data": [
                {
                    "Question": row["question"],
                    "Answer": {"Value": row["answer"]["value"], "Aliases": row["answer"]["aliases"]},
                }
                for row in generation_records.TRIVIAQA["validation"]
            ]
        },
    )
    cmrc = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "answers": [{"text": text} for text in row["answers"]["text"]],
                }
            ],
        }
        for row in generation_records.CMRC
    ]
    write_json(folder / "cmrc2018" / "cmrc2018_dev.json", {"data": [{"paragraphs": cmrc}]})
    arc = []
    for row in choice_records.ARC["test"]:
        pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
        stem = {"stem": row["question"], "choices": [{"text": text, "label": label} for text, label in pairs]}
        arc.append({"id": row["id"], "question": stem, "answerKey": row["answerKey"]})
    write_json(folder / "arc" / "ARC-Easy-Test.json", arc)
    names = ["c3", "race_middle", "arc_easy", "piqa", "drop", "triviaqa", "cmrc"]
    of_files = {name: data.load_records(name) for name in names}
    monkeypatch.delenv("LIGHTNING_DSV3_DATA")
    for name in names:
        of_hub = data.load_records(name)
        if name == "drop":  # the hub's have the ids of annotators too
            of_hub = [{**record, "validated_answers": without_ids(record["validated_answers"])} for record in of_hub]
        assert of_files[name] == of_hub, name


def without_ids(answers):
    return {name: answers[name] for name in ("number", "spans", "date")}


def test_redux_table_of_a_careless_hand(folder):
    header = ["question", "choices", "answer", "correct_answer", "error_type", "source", "potential_reason"]
    choices = str(["a", "b", "c", "d"])
    rows = [
        ["one?", choices, "1", "", "OK", "", ""],
        ["two?", choices, "0", "C", "Wrong Groundtruth", "", ""],
        ["three?", choices, "0", "3", "wrong_groundtruth", "", ""],
        ["four?", choices, "0", "b", "wrong groundtruth", "", ""],
        ["five?", choices, "0", "depends", "Wrong groundtruth", "", ""],
        ["six?", choices, "0", "1", " Bad Question  Clarity", "", ""],
    ]
    write_csv(folder / "mmlu_redux" / "mmlu_virology.csv", [header, *rows], delimiter=";")
    write_csv(folder / "mmlu" / "dev" / "virology_dev.csv", [["why?", "a", "b", "c", "d", "A"]])
    records = data.load_records("mmlu_redux", "virology")
    assert [record["corrected"] for record in records] == [1, 2, 3, 1, None, None]
    assert [record["answer"] for record in records] == [1, 0, 0, 0, 0, 0]
    assert [record["error_type"] for record in records[:2]] == ["ok", "wrong_groundtruth"]
    assert records[-1]["error_type"] == "bad_question_clarity"
    assert data.load_records("mmlu_redux", "virology", "shots")[0]["question"] == "why?"


def test_gsm8k_shots_are_eight_rows_in_their_order(hub, folder, monkeypatch):
    rows = (6931, 5146, 3040, 7236, 1915, 1856, 150, 440)
    train = generation_records.GSM8K["train"]
    write_rows(folder / "gsm8k" / "train.jsonl", train)
    questions = [train[number]["question"] for number in rows]
    assert [record["question"] for record in data.load_records("gsm8k", split="shots")] == questions
    write_rows(folder / "gsm8k" / "train.v2_report_8shots.jsonl", [train[number] for number in rows])
    assert data.used_files("gsm8k", split="shots") == ["gsm8k/train.v2_report_8shots.jsonl"]
    assert [record["question"] for record in data.load_records("gsm8k", split="shots")] == questions
    write_rows(folder / "gsm8k" / "train.v2_report_8shots.jsonl", train[:9])
    with pytest.raises(data.DataError, match="has 9 records; rows 6931, "):
        data.load_records("gsm8k", split="shots")
    monkeypatch.delenv("LIGHTNING_DSV3_DATA")
    assert [record["question"] for record in data.load_records("gsm8k", split="shots")] == questions


def test_rows_that_are_shots_are_not_tested(folder):
    rows = [{"grade": 1, "input": f"{n}加一？", "golden": str(n + 1)} for n in range(600)]
    write_rows(folder / "cmath" / "cmath_dev.jsonl", rows)
    assert [record["golden"] for record in data.load_records("cmath", split="shots")] == ["501", "502", "503"]
    tested = [record["golden"] for record in data.load_records("cmath")]
    assert len(tested) == 597
    assert not {"501", "502", "503"} & set(tested)
    (checked,) = data.check_data(["cmath"])
    assert checked.records == 600
    write_rows(folder / "cmath" / "cmath_test.jsonl", rows[:4])
    assert len(data.load_records("cmath")) == 4


def test_splits_of_one_file(folder):
    rows = [generation_records._mbpp(task, f"f{task}") for task in (1, 10, 11, 510, 511)]
    write_rows(folder / "mbpp" / "mbpp.jsonl", rows)
    assert [record["task_id"] for record in data.load_records("mbpp")] == [11, 510]
    assert [record["task_id"] for record in data.load_records("mbpp", split="shots")] == [1, 10]


def test_window_of_livecodebench(hub):
    dates = [record["contest_date"][:10] for record in data.load_records("livecodebench")]
    assert dates == ["2024-08-01", "2024-11-01"]  # of four, both ends of the window


def test_exams_say_what_kind_of_answer_they_want():
    from lightning_dsv3.evaluation.data_generation_records import agieval

    base = {"passage": None, "question": "?", "options": ["(A)v", "(B)w", "(C)x", "(D)y", "(E)z"], "answer": None}
    (letter,) = agieval(Row({**base, "label": "B"}, "logiqa-zh"))
    (two,) = agieval(Row({**base, "label": ["E", "D", "C", "A"]}, "gaokao-physics"))
    (one,) = agieval(Row({**base, "label": ["C"]}, "jec-qa-kd"))
    (none,) = agieval(Row({**base, "label": []}, "jec-qa-kd"))
    (written,) = agieval(Row({**base, "options": None, "label": None, "answer": "$2$"}, "math"))
    (hub,) = agieval(Row({"query": "Q", "choices": ["(A)x", "(B)y"], "gold": [1, 0]}, "jec-qa-ca"))
    kinds = [(record["kind"], record["answer"]) for record in (letter, two, one, none, written, hub)]
    assert kinds == [
        ("letter", "B"),
        ("letters", "ACDE"),
        ("letters", "C"),
        ("letters", ""),
        ("cloze", "$2$"),
        ("letters", "AB"),
    ]


# What is at hand


def test_list_of_a_folder(folder):
    write_rows(folder / "ccpm" / "valid.jsonl", choice_records.CCPM)
    for subset in ("navigate", "snarks"):
        write_json(folder / "bbh" / "bbh" / f"{subset}.json", {"examples": generation_records.BBH})
    rows = {row["name"]: row for row in data.list_benchmarks()}
    assert len(rows) == 32
    assert rows["dsv3_ccpm"] == {
        "name": "dsv3_ccpm",
        "title": "CCPM",
        "method": "perplexity",
        "shots": 0,
        "metric": "acc_ppl",
        "source": f"{folder}/ccpm/valid*",
        "found": True,
        "licence": "none stated",
    }
    assert rows["dsv3_bbh"]["found"] == "2 of 27"
    assert rows["dsv3_bbh"]["source"] == f"{folder}/bbh/bbh/{{subset}}* or {{subset}}*"
    assert rows["dsv3_mmlu"]["found"] is False
    assert all(row["licence"] for row in rows.values())


def test_shots_that_are_needed_count(folder):
    """Subjects without their shots cannot run; where any other record will do, a benchmark can."""
    write_rows(folder / "cmmlu" / "test" / "virology.jsonl", choice_records.CMMLU_ROWS["virology", "test"])
    assert not data.found("cmmlu")
    assert "cmmlu/dev/virology*" in data.coverage("cmmlu", "virology").missing
    write_rows(folder / "cmmlu" / "dev" / "virology.jsonl", choice_records.CMMLU_ROWS["virology", "dev"])
    assert data.found("cmmlu")
    assert data.coverage("cmmlu").present == ("virology",)
    write_rows(folder / "winogrande" / "dev.jsonl", choice_records.WINOGRANDE["validation"])
    assert data.found("winogrande")


def test_the_hub_counts_as_at_hand_unless_it_is_switched_off(hub, monkeypatch, tmp_path):
    assert data.found("ccpm")
    assert data.coverage("mmlu").source == "hub: cais/mmlu"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert {row["found"] for row in data.list_benchmarks()} == {"to be downloaded"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert {row["found"] for row in data.list_benchmarks()} == {False}
    assert not data.found("mmlu")
    assert "cais/mmlu has not been downloaded" in data.coverage("mmlu").missing
    with pytest.raises(
        data.MissingDataError, match=r"^dsv3_mmlu: hub: cais/mmlu has not .* \(HF_HUB_OFFLINE\).* LIGHTNING_DSV3_DATA$"
    ):
        data.load_records("mmlu")
    (tmp_path / "datasets--cais--mmlu").mkdir()
    assert {row["name"] for row in data.list_benchmarks() if row["found"] is True} == {"dsv3_mmlu"}
    (checked,) = data.check_data()
    assert (checked.benchmark, checked.problems) == ("mmlu", [])
    assert checked.records == len(choice_records.MMLU_TEST) + len(choice_records.MMLU_DEV)
    (tmp_path / "datasets--hails--agieval-math").mkdir()  # a data set for each exam
    assert data.coverage("agieval").present == ("math",)
    assert not data.found("agieval", "sat-math")
    assert {record["subset"] for record in data.load_records("agieval")} == {"math"}


def test_what_the_hub_cannot_give_is_named_with_the_way_out(hub):
    del hub["allenai/ai2_arc", "ARC-Easy", "test"]
    with pytest.raises(
        data.DataError, match=r"dsv3_arc_easy: allenai/ai2_arc ARC-Easy \(test\) cannot be loaded (.|\n)*LIGHTNING_"
    ):
        data.load_records("arc_easy")


def test_class_labels_become_names(hub):
    rows = [{**choice_records.PIQA[0], "label": 0}, {**choice_records.PIQA[1], "label": 1}]
    plain = datasets.Dataset.from_list(rows)
    hub["baber/piqa", None, "validation"] = plain.cast_column("label", datasets.ClassLabel(names=["0", "1"]))
    assert [record["answer"] for record in data.load_records("piqa")] == [0, 1]


# On the real records


@pytest.mark.skipif(not REAL, reason="needs the benchmarks' own files: set LIGHTNING_DSV3_DATA")
def test_real_records_are_good_and_as_many_as_their_list_says():
    listed = Path(REAL) / "README.md"
    counts = {}
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else ():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 4 and cells[3].isdigit():
            counts[f"{cells[1]}/{cells[2].partition(' (')[0]}"] = int(cells[3])
    for checked in data.check_data():
        assert checked.problems == []
        entry = data.BENCHMARKS[checked.benchmark]
        splits = ["test", "shots"] if entry.pool else ["test"]
        files = dict.fromkeys(file for split in splits for file in data.used_files(checked.benchmark, split=split))
        patterns = [next((one for one in counts if fnmatch.fnmatch(file, one)), None) for file in files]
        if None in patterns or "exemplars.json" in str(patterns):
            continue
        expected = sum(counts[one] for one in {one for one in patterns if "*" in one})
        expected += sum(counts[one] for one in patterns if "*" not in one)
        assert checked.records == expected, checked.benchmark


@pytest.mark.skipif(not REAL, reason="needs the benchmarks' own files: set LIGHTNING_DSV3_DATA")
def test_real_test_split_without_answers_is_refused(folder):
    unlabelled = sorted((Path(REAL) / "ccpm").glob("test_public*"))
    if not unlabelled:
        pytest.skip("no test_public of CCPM in LIGHTNING_DSV3_DATA")
    (folder / "ccpm").mkdir()
    (folder / "ccpm" / "valid.jsonl").write_bytes(unlabelled[0].read_bytes())
    with pytest.raises(data.DataError, match=r"ccpm/valid\.jsonl, record 1: the field 'answer' is missing"):
        data.load_records("ccpm")
