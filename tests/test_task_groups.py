"""Groups of tasks, and what runs where not all data are at hand."""

import logging

import choice_records as records
import generation_records
import pytest
from choice_runs import FOLDER, evaluate, knowing, manager_of, replace_hub, write_rows
from conftest import ROOT
from lm_eval.tasks._yaml_loader import load_yaml

from lightning_dsv3.evaluation import data, groups


@pytest.fixture(scope="module")
def manager():
    return manager_of()


@pytest.fixture
def hub(monkeypatch):
    return replace_hub(monkeypatch)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DSV3_DATA", str(tmp_path))
    return tmp_path


def test_benchmarks_of_the_table_have_tasks(manager):
    several = {"mmmlu", "mgsm"}
    assert {groups.task_name(name) for name in data.BENCHMARKS if name not in several} <= set(manager.all_subtasks)
    assert {f"dsv3_{name}" for name in several} <= set(manager.all_groups)


def test_every_task_has_a_golden_prompt_and_no_other_has(manager):
    goldens = {path.stem for path in (ROOT / "tests" / "golden" / "prompts").glob("*.txt")}
    assert goldens == set(manager.all_subtasks)


def test_a_named_task_without_its_file_is_an_error_that_names_it(folder, manager):
    with pytest.raises(data.MissingDataError, match=r"dsv3_hellaswag: no file .*/hellaswag/hellaswag_val\*"):
        manager.load("dsv3_hellaswag")
    write_rows(folder / "arc" / "arc_easy.test.jsonl", records.ARC["test"])
    with pytest.raises(data.MissingDataError, match=r"dsv3_mmlu: no file .*/mmlu/test/abstract_algebra_test\*"):
        manager.load("dsv3_mmlu")


def test_a_group_runs_what_is_there_and_names_what_is_not(folder, manager, caplog):
    write_rows(folder / "c3" / "c3-m-dev.json", records.C3)
    write_rows(folder / "ccpm" / "valid.jsonl", records.CCPM)
    with caplog.at_level(logging.WARNING, "lightning_dsv3"):
        results, _ = evaluate(manager, ["dsv3_zh"], knowing)
    assert results["group_subtasks"]["dsv3_zh"] == ["dsv3_c3", "dsv3_ccpm"]
    assert results["results"]["dsv3_zh"]["alias"] == "dsv3_zh (partial: 2 of 6)"
    assert results["results"]["dsv3_zh"]["acc_ppl,none"] == 1.0
    (message,) = [record.getMessage() for record in caplog.records if record.name.endswith("groups")]
    assert "4 of 6 tasks are absent, its score is partial" in message
    for name in ("cluewsc", "ceval", "cmmlu", "cmrc"):
        assert f"dsv3_{name}: no file" in message


def test_a_group_without_any_data_is_an_error(folder, manager):
    with pytest.raises(
        data.DataError, match=r"dsv3_zh: none of its tasks has its data(.|\n)*dsv3_ccpm: no file .*/ccpm/valid\*"
    ):
        manager.load("dsv3_zh")


def test_the_small_group_has_the_tasks_for_small_models_without_shots(hub, manager):
    cloze = {name for name in manager.all_subtasks if name.endswith("_cloze")}
    assert len(cloze) == 6
    assert {member["task"]: member["num_fewshot"] for member in groups.dsv3_small} == dict.fromkeys(cloze, 0)
    results, _ = evaluate(manager, ["dsv3_small"], knowing)
    assert {results["n-shot"][name] for name in cloze} == {0}
    assert all("bpb,none" in results["results"][name] for name in cloze)
    assert {groups.benchmark_of(name.removeprefix("dsv3_"))[0] for name in cloze} == {
        *("mmlu", "arc_easy", "arc_challenge", "cmmlu", "ceval", "c3")
    }


def test_groups_of_the_hub_are_those_of_the_tables(hub):
    base = [name if isinstance(name, str) else name["task"] for name in groups.dsv3_base]
    assert len(base) == len(set(base)) == len(data.BENCHMARKS) == 32
    assert base == [groups.task_name(name) for name in groups.GROUPS["dsv3_base"]]
    parts = [groups.dsv3_en, groups.dsv3_code, groups.dsv3_math, groups.dsv3_zh]
    assert sorted(base) == sorted([name for part in parts for name in part] + ["dsv3_mmmlu"])
    assert groups.dsv3_base_alias == "dsv3_base"
    with pytest.raises(AttributeError, match="no attribute 'dsv3_nothing'"):
        _ = groups.dsv3_nothing


def test_ablation_group_has_the_shots_of_tables_4_and_5(hub):
    named = {"pile_test", "bbh", "mmlu", "drop", "triviaqa", "naturalquestions", "humaneval", "mbpp", "gsm8k", "math"}
    members = groups.dsv3_ablation
    assert {"task": "dsv3_drop", "num_fewshot": 1} in members
    names = {member if isinstance(member, str) else member["task"] for member in members}
    assert names == {groups.task_name(name) for name in named}
    table = {
        "bbh": 3,
        "mmlu": 5,
        "triviaqa": 5,
        "naturalquestions": 5,
        "humaneval": 0,
        "mbpp": 3,
        "gsm8k": 8,
        "math": 4,
    }
    assert {name: data.BENCHMARKS[name].shots for name in table} == table


@pytest.mark.parametrize("group", [name for name in groups.GROUPS if name != "dsv3_mgsm"])
def test_group_files_ask_for_what_is_at_hand(hub, group):
    (path,) = FOLDER.glob(f"*/{group}.yaml") if group != "dsv3_mmmlu" else FOLDER.glob("mmmlu/mmmlu.yaml")
    config = load_yaml(path)
    assert config["task"] == getattr(groups, group)
    assert config["group_alias"] == config["group"] == group


def test_parts_of_a_benchmark_are_marked(folder, manager, caplog):
    for split, rows in (("test", records.MMLU_TEST), ("dev", records.MMLU_DEV)):
        own = [row for row in rows if row["subject"] == "virology"]
        write_rows(folder / "mmlu" / split / f"virology_{split}.jsonl", own)
    write_rows(folder / "race" / "test.high.part.jsonl", records.RACE["high"])
    loaded = manager.load(["dsv3_mmlu", "dsv3_race_high"])["tasks"]
    assert loaded["dsv3_mmlu"].config.task_alias == "dsv3_mmlu (partial: 1 of 57 subjects)"
    assert loaded["dsv3_race_high"].config.task_alias == "dsv3_race_high (partial: 8 of 3498)"
    assert loaded["dsv3_mmlu"].config.metadata["data"] == ["mmlu/test/virology_test.jsonl"]
    assert "56 of 57 subsets are absent, its score is partial: abstract_algebra, anatomy," in caplog.text


def test_a_score_on_another_split_is_marked(folder, manager):
    write_rows(folder / "race" / "validation.high.jsonl", records.RACE["high"])
    for name, rows in generation_records.NATURALQUESTIONS.items():
        file = {"validation": "NQ-open.dev", "train": "NQ-open.efficientqa.dev.1.1.sample"}[name]
        write_rows(folder / "nq_open" / f"{file}.jsonl", rows)
    names = ["dsv3_race_high", "dsv3_naturalquestions"]
    aliases = [task.config.task_alias for task in manager.load(names)["tasks"].values()]
    assert aliases == [
        "dsv3_race_high (partial: 8 of 3498; partial: validation.high in place of its own split)",
        f"dsv3_naturalquestions (partial: {len(generation_records.NATURALQUESTIONS['validation'])} of 3610; "
        "shots of NQ-open.efficientqa.dev)",
    ]
    write_rows(folder / "race" / "test.high.jsonl", records.RACE["high"])
    write_rows(folder / "nq_open" / "NQ-open.train.jsonl", generation_records.NATURALQUESTIONS["train"])
    aliases = [task.config.task_alias for task in manager.load(names)["tasks"].values()]
    assert not [alias for alias in aliases if "in place of" in alias or "shots" in alias]


def test_shots_of_the_tested_split_are_marked_and_never_the_tested_record(folder, manager, caplog):
    write_rows(folder / "winogrande" / "dev.jsonl", [records._winogrande(n) for n in range(7)])
    results, requests = evaluate(manager, ["dsv3_winogrande"], knowing)
    alias = results["results"]["dsv3_winogrande"]["alias"]
    assert alias == "dsv3_winogrande (partial: 7 of 1267; shots of the test split)"
    assert "Shots are other records of the tested split" in caplog.text
    for request in requests["dsv3_winogrande"]:
        shots = request.args[0].split("\n\n")[:-1]
        assert len(shots) == 5
        years = [shot.rstrip(".").split()[-1] for shot in shots]
        own = request.args[1].rstrip(".").split()[-1]
        assert years == [str(n) for n in range(7) if str(n) != own][:5]
