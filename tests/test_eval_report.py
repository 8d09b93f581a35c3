"""``dsv3 report eval``: published numbers, results beside them, what is compared and what is not.

Results are made up, in the form that `test_eval_report_files` holds against that of lm-eval.
"""

import copy
import math

import pytest
from eval_results import LEAVES, ROWS, changed, column, lines_of, result, runner, section, tables, writer

from lightning_dsv3.evaluation import published_results as published
from lightning_dsv3.evaluation import report as reports
from lightning_dsv3.evaluation.data_table import BENCHMARKS
from lightning_dsv3.evaluation.groups import GROUPS, task_name
from lightning_dsv3.evaluation.result_files import Score

V3 = published.BASE_MODELS["deepseek-v3"].scores


@pytest.fixture
def write(tmp_path):
    return writer(tmp_path)


@pytest.fixture
def run(capsys):
    return runner(capsys)


# Published numbers


def test_published_rows_are_those_of_our_benchmarks():
    assert list(published.ROWS) == GROUPS["dsv3_base"]
    assert list(published.ABLATION_SHOTS) == GROUPS["dsv3_ablation"]
    for benchmark, row in published.ROWS.items():
        assert row.title == BENCHMARKS[benchmark].title.replace(" 2018", "")
        assert (row.shots or 0) == BENCHMARKS[benchmark].shots
    of_section = {row.section: [] for row in published.ROWS.values()}
    for benchmark, row in published.ROWS.items():
        of_section[row.section].append(benchmark)
    assert list(of_section) == ["English", "Code", "Math", "Chinese", "Multilingual"]
    assert [of_section["English"], of_section["Chinese"]] == [GROUPS["dsv3_en"], GROUPS["dsv3_zh"]]
    assert [of_section["Code"], of_section["Math"]] == [GROUPS["dsv3_code"], GROUPS["dsv3_math"]]


def test_published_numbers_add_up():
    """A sum over each column of the report's tables, so that no number changes unseen."""
    sums = {key: round(math.fsum(model.scores.values()), 3) for key, model in published.BASE_MODELS.items()}
    assert sums == {
        "deepseek-v2": 2162.806,
        "qwen2.5-72b": 2267.338,
        "llama-3.1-405b": 2231.942,
        "deepseek-v3": 2394.748,
    }
    ablations = {
        key: [round(math.fsum(arm.scores.values()), 3) for arm in arms]
        for key, arms in published.ABLATION_MODELS.items()
    }
    assert ablations == {
        "4-small": [301.129, 324.329],
        "4-large": [517.858, 534.057],
        "5-small": [305.227, 311.824],
        "5-large": [503.856, 520.252],
    }


def test_the_table_has_every_row_of_the_report_and_its_models(write, run):
    path = write("a", result(dict(V3)))
    main = lines_of(run(path).out, "Table 3")
    assert [name for name in main if name.endswith(")") and name != "Benchmark (Metric)"] == [
        row.label for row in ROWS.values()
    ]
    assert main["Architecture"] == {
        "Benchmark (Metric)": "Architecture",
        "# Shots": "-",
        "DeepSeek-V2 Base": "MoE",
        "Qwen2.5 72B Base": "Dense",
        "LLaMA-3.1 405B Base": "Dense",
        "DeepSeek-V3 Base": "MoE",
        "a/last.ckpt": "MoE",
    }
    assert main["# Activated Params"]["a/last.ckpt"] == "2.4B"
    assert list(main["# Total Params"].values())[2:] == ["236B", "72B", "405B", "671B", "15.7B"]
    assert [main["DROP (F1)"]["# Shots"], main["Pile-test (BPB)"]["# Shots"]] == ["3-shot", "-"]
    for benchmark, row in ROWS.items():
        line = main[row.label]
        digits, stderr = (3, "") if row.bits else (1, " ± 1.0")
        for model in published.BASE_MODELS.values():
            assert line[model.name].strip("*") == f"{model.scores[benchmark]:.{digits}f}"
        assert line["a/last.ckpt"].strip("*") == f"{V3[benchmark]:.{digits}f}{stderr}"


# The rule of 0.3


def published_pair(benchmark: str, first: float, second: float) -> reports.Comparison:
    row = ROWS[benchmark]
    a, b = (
        reports.Column(name, None, None, None, None, {row: Score(value)})
        for name, value in {"a": first, "b": second}.items()
    )
    return reports.compare(row, a, b)


@pytest.mark.parametrize(
    ("benchmark", "first", "second", "level"),
    [
        ("mmlu", 89.2, 88.9, "same"),  # 0.29999999999999716
        ("mmlu", 66.9, 67.2, "same"),  # -0.29999999999999716
        ("mmlu", 0.3, 0.6, "same"),
        ("mmlu", 1.1, 1.4, "same"),  # -0.2999999999999998
        ("mmlu", 70.4, 70.1, "same"),  # 0.30000000000001137
        ("mmlu", 88.9, 89.21, "worse"),
        ("mmlu", 89.301, 89.0, "better"),
        ("pile_test", 0.545, 0.542, "same"),  # 0.0030000000000000027
        ("pile_test", 0.546, 0.542, "worse"),
        ("pile_test", 0.542, 0.548, "better"),
    ],
)
def test_gaps_up_to_three_tenths_are_the_same_level(benchmark, first, second, level):
    assert published_pair(benchmark, first, second).level == level
    other_way = {"same": "same", "better": "worse", "worse": "better"}[level]
    assert published_pair(benchmark, second, first).level == other_way


def bold(line: dict[str, str]) -> set[str]:
    return {name for name, cell in line.items() if cell.startswith("**")}


def test_the_best_of_a_row_and_what_is_at_its_level_are_bold(write, run):
    scores = {"hellaswag": 50.0, "mmlu": 87.39, "ccpm": 93.4, "pile_test": 0.5445, "cmrc": 78.0}
    main = lines_of(run(f"ours={write('a', result(scores))}").out, "Table 3")
    assert bold(main["HellaSwag (EM)"]) == {"LLaMA-3.1 405B Base", "DeepSeek-V3 Base"}
    assert bold(main["MMLU (EM)"]) == {"DeepSeek-V3 Base", "ours"}
    assert bold(main["CCPM (EM)"]) == {"ours"}
    assert bold(main["Pile-test (BPB)"]) == {"LLaMA-3.1 405B Base", "ours"}
    assert bold(main["CMRC (EM)"]) == {"ours"}
    assert bold(main["ARC-Challenge (EM)"]) == {"LLaMA-3.1 405B Base", "DeepSeek-V3 Base"}


def test_any_two_columns_are_counted(write, run):
    out = run(f"ours={write('a', result({'mmlu': 85.1, 'gsm8k': 70.0, 'bbh': 90.0}))}").out
    counts = lines_of(out, "Any two columns")
    assert len(counts) == 10

    def numbers(pair: str) -> list[int]:
        return [int(cell) for cell in list(counts[pair].values())[1:]]

    # 0.1 of MMLU is the same level; 19.6 and 7.1 points are far beyond two standard errors of 1.
    assert numbers("ours against Qwen2.5 72B Base") == [1, 1, 1, 0, 0]
    a, b = (published.BASE_MODELS[key].scores for key in ("llama-3.1-405b", "deepseek-v3"))
    gaps = {name: round((a[name] - b[name]) * (-100 if name == "pile_test" else 1), 6) for name in a}
    expected = [sum(gap > 0.3 for gap in gaps.values()), sum(abs(gap) <= 0.3 for gap in gaps.values())]
    expected += [sum(gap < -0.3 for gap in gaps.values())]
    assert numbers("LLaMA-3.1 405B Base against DeepSeek-V3 Base") == [*expected, 0, 0]


# Standard errors


def test_errors_of_differences(write, run):
    a = result({"mmlu": 60.0, "gsm8k": 50.0, "bbh": 40.0, "c3": 62.8, "ccpm": 62.9})
    b = result({"mmlu": 58.0, "gsm8k": 50.2, "bbh": 30.0, "c3": 60.0, "ccpm": 60.0})
    a["results"]["dsv3_mmlu"]["acc_ppl_stderr,none"] = 0.03
    b["results"]["dsv3_mmlu"]["acc_ppl_stderr,none"] = 0.04
    b["results"]["dsv3_bbh"]["exact_match_stderr,none"] = "N/A"
    out = run(f"a={write('a', a)}", f"b={write('b', b)}").out
    gaps = lines_of(out, "Differences: a")
    assert gaps["MMLU (EM)"]["against b"] == "+2.00 ± 5.00 ~"  # 3 and 4 are the legs, and 2 is less than 10
    assert gaps["GSM8K (EM)"]["against b"] == "-0.20 ± 1.41 ="
    assert gaps["C3 (EM)"]["against b"] == "+2.80 ± 1.41 ~"  # two errors are 2.83
    assert gaps["CCPM (EM)"]["against b"] == "+2.90 ± 1.41"
    assert gaps["BBH (EM)"]["against b"] == "+10.00"  # one of the errors is not known
    assert gaps["MMLU (EM)"]["against DeepSeek-V3 Base"] == "-27.10 ± 3.00"  # published numbers have none
    assert lines_of(out, "Table 3")["BBH (EM)"]["b"] == "30.0"


# What is compared


DIFFERENCES = {
    "version": ({"versions__dsv3_mmlu": 2.0}, "version 1.0 against 2.0", False),
    "shots": ({"n-shot__dsv3_mmlu": 4}, "shots 5 against 4", False),
    "few-shot seed": ({"config__fewshot_seed": 7}, "few-shot seed 1234 against 7", True),
    "torch seed": ({"config__torch_seed": 7}, "torch seed 1234 against 7", True),
    "seed not stated": ({"config__numpy_seed": None}, "numpy seed 1234 against not stated", True),
    "drawn": ({"configs__dsv3_mmlu__metadata__fewshot_seed": 3}, "seed of the drawn shots none against 3", False),
    "window": ({"config__dsv3_model_info__max_length": 2048}, "window 4096 against 2048", True),
    "window not stated": ({"config__dsv3_model_info__max_length": None}, "window 4096 against not stated", True),
    "records": ({"n-samples__dsv3_mmlu": {"original": 100, "effective": 10}}, "records 100 against 10", False),
    "decoding": ({"configs__dsv3_mmlu__repeats": 2}, "decoding [null, 1] against [null, 2]", False),
    "chat template": ({"chat_template_sha": "abc"}, "chat template none against abc", True),
    "system instruction": ({"system_instruction_sha": "abc"}, "system instruction none against abc", True),
}


@pytest.mark.parametrize(("changes", "reason", "all_rows"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_results_that_differ_are_not_compared_but_named(changes, reason, all_rows, write, run):
    data = result({"mmlu": 60.0, "gsm8k": 50.0})
    a, b = write("a", data), write("b", changed(data, **changes))
    out = run(f"a={a}", f"b={b}", "--columns", "none").out
    labels = "MMLU (EM), GSM8K (EM)" if all_rows else "MMLU (EM)"
    assert f"- a and b, {reason}: {labels}\n" in section(out, "Not compared")
    assert bold(lines_of(out, "Table 3")["MMLU (EM)"]) == set()
    counts = lines_of(out, "Any two columns")["a against b"]
    assert [counts["Same level"], counts["Not compared"]] == (["0", "2"] if all_rows else ["1", "1"])
    same = run(f"a={a}", f"b={a}", "--columns", "none").out
    assert section(same, "Not compared") == ""
    assert bold(lines_of(same, "Table 3")["MMLU (EM)"]) == {"a", "b"}


def test_a_window_that_nobody_states_is_no_agreement(write, run):
    path = write("a", changed(result({"mmlu": 60.0}), config__dsv3_model_info__max_length=None))
    assert "- a and b, window not stated: MMLU (EM)" in section(run(f"a={path}", f"b={path}").out, "Not compared")


def test_halves_of_one_size_are_not_compared(write, run):
    data = result({"winogrande": 60.0})
    data["results"]["dsv3_winogrande"]["alias"] = "dsv3_winogrande (partial: 633 of 1267)"
    halves = {}
    for half in ("first", "second"):
        data["configs"]["dsv3_winogrande"]["metadata"]["data"] = [f"winogrande/dev.{half}_half.jsonl"]
        halves[half] = write(half, data)
    words = [f"{name}={path}" for name, path in halves.items()]
    reason = "data winogrande/dev.first_half.jsonl against winogrande/dev.second_half.jsonl"
    assert f"first and second, {reason}: WinoGrande" in section(run(*words).out, "Not compared")


def test_a_third_result_does_not_part_two_that_agree(write, run):
    data = result({"mmlu": 60.0})
    other = write("c", changed(data, config__torch_seed=7))
    a = write("a", data)
    main = lines_of(run(f"a={a}", f"b={a}", f"c={other}", "--columns", "none").out, "Table 3")
    assert bold(main["MMLU (EM)"]) == {"a", "b"}


DEPARTURES = {
    "limited": ({"n-samples__dsv3_ccpm": {"original": 100, "effective": 99}}, "limited: 99 of 100 records"),
    "shots": ({"n-shot__dsv3_ccpm": 2}, "2-shot, the table has 0-shot"),
    "partial": ({"results__dsv3_ccpm__alias": "dsv3_ccpm (partial: 9 of 2720)"}, "partial: 9 of 2720"),
    "pool": ({"results__dsv3_ccpm__alias": "dsv3_ccpm (shots of the test split)"}, "shots of the test split"),
}


@pytest.mark.parametrize(("changes", "note"), DEPARTURES.values(), ids=DEPARTURES)
def test_departures_are_marked_and_not_held_against_published_numbers(changes, note, write, run):
    out = run(f"a={write('a', changed(result({'ccpm': 99.0, 'c3': 99.0}), **changes))}").out
    line = lines_of(out, "Table 3")["CCPM (EM)"]
    assert line["a"] == "99.0 ± 1.0 [1]"
    assert bold(line) == {"DeepSeek-V2 Base"}
    assert section(out, "Notes").strip().splitlines()[-1] == f"1. {note}"
    assert "CCPM (EM)" not in lines_of(out, "Differences: a")
    assert bold(lines_of(out, "Table 3")["C3 (EM)"]) == {"a"}
    ours = column(write("a", changed(result({"ccpm": 99.0}), **changes)))
    theirs = reports.published_column(published.BASE_MODELS["deepseek-v3"], [ROWS["ccpm"]])
    for pair in ((ours, theirs), (theirs, ours)):
        assert reports.compare(ROWS["ccpm"], *pair).reason == note


def test_languages_that_are_missing_from_a_group_are_named(write, run):
    data = result({"mgsm": 70.0})
    data["group_subtasks"]["dsv3_mgsm"] = [name for name in LEAVES["dsv3_mgsm"] if name[-2:] not in ("bn", "th")]
    out = run(f"a={write('a', data)}", f"whole={write('b', result({'mgsm': 70.0}))}").out
    assert "1. partial: 9 of 11 tasks, without bn, th" in section(out, "Notes")
    assert "a and whole, records " in section(out, "Not compared")


def test_options_counted_in_bytes_are_not_those_counted_in_tokens(write, run):
    """lm-eval's other models do not say how many tokens an option has, and ``acc_ppl`` divides by them."""
    data = result({"hellaswag": 60.0, "mmlu": 60.0, "winogrande": 60.0})
    for task in ("dsv3_hellaswag", "dsv3_winogrande"):  # texts have bits per byte, letters have none
        data["results"][task]["bpb,none"] = 0.7
    theirs = changed(data, config__dsv3_model_info=None)
    theirs |= {"max_length": 4096, "model_name": "org/model"}
    theirs["config"] |= {"model": "hf", "model_num_parameters": 15_706_484_224}
    out = run(f"ours={write('a', data)}", write("b", theirs)).out
    assert "- ours and model, length of options tokens against bytes: HellaSwag (EM)\n" in section(out, "Not compared")
    main = lines_of(out, "Table 3")
    assert [main["HellaSwag (EM)"]["ours"], main["HellaSwag (EM)"]["model"]] == ["60.0 ± 1.0", "60.0 ± 1.0 [1]"]
    facts = [main[name]["model"] for name in ("Architecture", "# Activated Params", "# Total Params")]
    assert facts == ["-", "-", "15.7B"]


def test_a_number_of_parameters_that_lm_eval_does_not_know(write):
    theirs = changed(result({"mmlu": 1.0}, model_num_parameters=-1), config__dsv3_model_info=None)
    assert column(write("a", theirs)).total is None


# Missing rows


def test_missing_rows_are_named_with_the_reason(write, run):
    data = result({"mmlu": 60.0, "gsm8k": 50.0, "drop": 40.0, "mgsm": 30.0})
    del data["results"]["dsv3_mgsm"], data["group_subtasks"]["dsv3_mgsm"]
    for task in LEAVES["dsv3_mgsm"][1:]:
        del data["results"][task]
    data["group_subtasks"]["dsv3_zh"] = ["dsv3_c3"]
    data["results"]["dsv3_mmlu"]["acc,none"] = data["results"]["dsv3_mmlu"].pop("acc_ppl,none")
    data["results"]["dsv3_gsm8k"]["exact_match,none"] = math.nan
    data["results"]["dsv3_drop"]["f1,other"] = 0.5
    data["results"]["hellaswag"] = {"alias": "hellaswag", "acc,none": 0.5}
    missing = section(run(f"a={write('a', data)}").out, "Missing")
    zh = ", ".join(f"{ROWS[name].label} (dsv3_{name})" for name in GROUPS["dsv3_zh"])
    for line in (
        "- a, no acc_ppl among its metrics (acc): MMLU (EM) (dsv3_mmlu)",
        "- a, its exact_match is nan, no number: GSM8K (EM) (dsv3_gsm8k)",
        "- a, its f1 is there 2 times (f1,none, f1,other): DROP (F1) (dsv3_drop)",
        "- a, the file has lm-eval's own task, which is another protocol: HellaSwag (EM) (dsv3_hellaswag)",
        "- a, only dsv3_mgsm_bn ran and not the group: MGSM (EM) (dsv3_mgsm)",
        f"- a, dsv3_zh ran without it, as its data were not at hand (see dsv3 eval --list): {zh}",
        "- a, not run: Pile-test (BPB) (dsv3_pile_test), BBH (EM) (dsv3_bbh)",
    ):
        assert line in missing
    named = sum(missing.count(f"({task_name(name)})") for name in ROWS)
    assert named == len(ROWS)


def test_math_goes_by_both_of_its_names(write):
    data = result({"math": 33.0})
    for part in ("results", "configs", "versions", "n-shot", "n-samples"):
        data[part]["dsv3_math"] = data[part].pop("dsv3_hendrycks_math")
    assert column(write("a", data)).scores[ROWS["math"]].value == pytest.approx(33.0)
    # As a group it has no score of its own.
    grouped = result({"gsm8k": 1.0})
    grouped["results"]["dsv3_math"] = {"alias": "dsv3_math"}
    assert ROWS["math"] not in column(write("b", grouped)).scores


def test_rows_for_small_models_stand_below_the_table_only_if_they_are_there(write, run):
    data = result({"arc_easy": 30.0, "c3": 30.0})
    assert "For small models" not in run(write("a", data)).out
    data["results"]["dsv3_c3"] |= {"bpb,none": 1.25, "bpb_stderr,none": 0.0625}
    for part in ("results", "configs", "versions", "n-shot", "n-samples"):
        data[part]["dsv3_arc_easy_cloze"] = copy.deepcopy(data[part]["dsv3_arc_easy"])
    data["results"]["dsv3_arc_easy_cloze"]["bpb,none"] = 0.75
    out = run(f"a={write('a', data)}").out
    names = list(lines_of(out, "Table 3"))
    small = names[names.index("**For small models**") + 1 :]
    assert small == ["ARC-Easy, cloze (EM)", "ARC-Easy, cloze, right option (BPB)", "C3, right option (BPB)"]
    assert lines_of(out, "Table 3")["C3, right option (BPB)"]["a"] == "1.250 ± 0.062"
    assert "cloze" not in section(out, "Missing")


# Tables 4 and 5


def test_ablations_are_laid_out_by_pairs(write, run):
    scores = {"humaneval": 20.0, "drop": 40.0, "pile_test": 0.729}
    a = changed(result(scores), **{"n-shot__dsv3_drop": 1})
    b = changed(result({**scores, "humaneval": 23.0, "pile_test": 0.72}), **{"n-shot__dsv3_drop": 1})
    words = [f"A={write('a', a)}", f"B={write('b', b)}", "--layout", "ablation"]
    out = run(*words).out
    found = tables(out)
    assert [title[:7] for title in found][:2] == ["Table 4", "Table 5"]
    heads, rows = out.split("| Benchmark (Metric) | ")[1].splitlines()[0], lines_of(out, "Table 4")
    assert heads.rstrip(" |").split(" | ")[-3:] == ["A", "B", "Difference"]

    def cells(table: str, label: str) -> list[str]:
        line = next(line for line in out.split(f"## {table}")[1].splitlines() if line.startswith(f"| {label}"))
        return [cell.strip() for cell in line.strip("|").split("|")][2:]

    assert list(rows) == [
        "# Activated Params",
        "# Total Params",
        "# Training Tokens",
        *(ROWS[name].label for name in GROUPS["dsv3_ablation"]),
    ]
    assert cells("Table 4", "HumanEval") == [
        *["20.7", "**26.8**", "+6.1"],
        *["44.5", "**53.7**", "+9.2"],
        *["20.0 ± 1.0", "**23.0 ± 1.0**", "+3.00 ± 1.41"],
    ]
    assert cells("Table 5", "DROP") == [
        *["38.1", "**39.0**", "+0.9"],
        *["**67.1**", "**67.1**", "+0.0 ="],
        *["**40.0 ± 1.0**", "**40.0 ± 1.0**", "+0.00 ± 1.41 ="],
    ]
    assert cells("Table 5", "Pile-test")[-3:] == ["0.729", "**0.720**", "-0.0090"]
    assert cells("Table 4", "# Training Tokens") == ["1.33T", "1.33T", "", "540B", "540B", "", "-", "-", ""]
    alone = run(*words, "--columns", "none").out
    assert next(iter(tables(alone))) == "Results"
    assert "Baseline" not in alone
    small = run(*words, "--columns", "5-small").out
    assert next(iter(tables(small))) == "Table 5: auxiliary-loss-free balancing"
    assert "Table 4:" not in small
    assert "Large" not in small


def test_the_ablations_have_drop_with_one_shot(write, run):
    three = write("a", result({"drop": 40.0}))
    one = write("b", changed(result({"drop": 40.0}), **{"n-shot__dsv3_drop": 1}))
    ablation = run(three, three, "--layout", "ablation").out
    assert "1. 3-shot, the table has 1-shot" in ablation.replace("\\", "")
    assert "has 1-shot" not in run(one, one, "--layout", "ablation").out
    assert "1. 1-shot, the table has 3-shot" in run(one).out.replace("\\", "")
